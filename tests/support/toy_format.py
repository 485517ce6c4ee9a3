"""A format of adapters that no trainer writes, in one file: keys ``<module>#a`` and ``<module>#b``, and a scale.

The layer computes y = base(x) + s · x A B with A (in, r) and B (r, out); s is ``toy_scale`` of adapter_config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from shardmerge.adapters.claims import BaseView, Claims, ModuleUpdate
from shardmerge.adapters.formats.base import AdapterContent, AdapterFormat, Config, Pairs, Tensors
from shardmerge.adapters.methods.lora import Lora
from shardmerge.adapters.registry import FORMATS, register
from shardmerge.spec.tensors import Orientation, TensorRef

_KEY = re.compile(r"(?P<module>[^#]+)#(?P<role>[ab])")
SCALE = 0.375


class Toy(AdapterFormat):
    """``format: toy``."""

    name = "toy"
    summary = "keys `<module>#a` (in, r) and `<module>#b` (r, out)"
    config_states_scale = True
    pairs = Pairs(_KEY, orientation=Orientation.SAME)

    def detect(self, tensors: Tensors, config: Config | None) -> bool:
        return config is not None and "toy_scale" in config

    def stated_scale(self, config: Config | None) -> float | None:
        return float((config or {})["toy_scale"])

    def read(self, content: AdapterContent, base: BaseView) -> Claims:
        claims, pairs = Claims(), dict[str, dict[str, TensorRef]]()
        for name, ref in content.tensors.items():
            if match := _KEY.fullmatch(name):
                pairs.setdefault(match["module"], {})[match["role"]] = ref
        for module, pair in pairs.items():
            if missing := {"a", "b"} - pair.keys():
                claims.half(next(iter(pair.values())), f"{module}#{missing.pop()}")
                continue
            factors = (("A", pair["a"].transposed()), ("B", pair["b"].transposed()))
            scale, rank = float((content.config or {})["toy_scale"]), pair["a"].shape[1]
            claims.updates.append(ModuleUpdate(module, "weight", Lora.name, factors, scale, rank))
        return claims


# --- what a test needs around it --------------------------------------------------------------------------------------


@contextmanager
def registered() -> Iterator[None]:
    """Within, the package knows the format."""
    register(Toy)
    try:
        yield
    finally:
        del FORMATS[Toy.name]


def write(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """An adapter with A (in, r) and B (r, out) by module."""
    folder.mkdir()
    tensors = {
        f"{module}#{role}": factor for module, pair in pairs.items() for role, factor in zip("ab", pair, strict=True)
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"toy_scale": SCALE}))
    return folder
