"""A merge of an adapter into a small quantised base, and what it must give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shardmerge
from tests.support.pack_bases import Packed
from tests.support.peft_oracle import bits, make_config, random, stored, write_adapter
from tests.support.quantised_bases import Quantised

RANK, ALPHA = 4, 6.0
#: A module of the first layer, which programs fuse with others, and one of the second.
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


class Scene:
    """A base, and an adapter of some of its modules."""

    def __init__(self, folder: Path, made: Quantised, modules: Sequence[str] = (Q, DOWN)) -> None:
        self.folder, self.made = folder, made
        self.base = made.write(folder / "base")
        shapes = {module: made.values[f"{module}.weight"].shape for module in modules}
        self.factors = {
            module: (random(RANK, columns, seed=70), random(rows, RANK, seed=71, scale=0.02))
            for module, (rows, columns) in shapes.items()
        }
        self.adapter = write_adapter(folder / "adapter", self.factors, ALPHA)

    def config(self, name: str = "out", **output: Any) -> dict[str, Any]:
        config = make_config(self.folder / name, self.base, [self.adapter])
        config["output"].update(output)
        return config

    def merge(self, name: str = "out", **output: Any) -> dict[str, Tensor]:
        shardmerge.merge(self.config(name, **output))
        return stored(self.folder / name)

    def settings(self, name: str = "out") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "config.json").read_text())
        return found

    def merged(self, module: str) -> Tensor:
        """float32(W) + s · B A in float32, as PEFT computes it; W as the format defines it."""
        if module not in self.factors:
            return self.made.values[module if module in self.made.values else f"{module}.weight"]
        a, b = self.factors[module]
        return self.made.values[f"{module}.weight"] + (b @ a) * (ALPHA / RANK)


def assert_nearest_codes(scene: Scene, made: Packed, found: Mapping[str, Tensor]) -> None:
    """Of the updated weights the codes alone have changed, and no code of the base's grid is nearer."""
    assert found.keys() == made.tensors.keys()
    written = {f"{module}.{made.codes}" for module in scene.factors}
    for name, tensor in made.tensors.items():
        assert (bits(found[name]) == bits(tensor)) != (name in written), name
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
    for module in scene.factors:
        exact = scene.merged(module).double()
        error = (made.stored(module, found).double() - exact).abs()
        assert bool((error <= made.nearest(module, exact) + exact.abs() * 2.0**-22).all())
    assert scene.settings() == made.config
    assert shardmerge.verify(scene.folder / "out", rows=None).ok


def assert_values_stay(scene: Scene, made: Packed, found: Mapping[str, Tensor]) -> None:
    """All but the codes of the adapter's modules has its bytes; these stand for the same values."""
    for name, tensor in made.tensors.items():
        if name.removesuffix(f".{made.codes}") not in scene.factors:
            assert bits(found[name]) == bits(tensor), name
    for module in scene.factors:  # the sign of zero may change
        assert torch.equal(made.stored(module, found), made.stored(module, made.tensors)), module
