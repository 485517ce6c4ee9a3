"""Adapters of MLX (``mlx_lm.lora``): W' = W + scale · bᵀ aᵀ, with DoRA m / ‖W'‖ · W'.

a is (in, r) and b (r, out), the transposes of PEFT's; of an embedding, whose W is (V, D), a is (V, r) and b (r, D), and
W' = W + scale · a b. m is (out). The scale in adapter_config.json is s itself, not divided by the rank.
A full fine-tune holds whole tensors. Source: mlx-lm, tuner/lora.py, tuner/dora.py and tuner/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from shardmerge.adapters.claims import BaseView, Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.base import AdapterContent, AdapterFormat, Pairs, Tensors
from shardmerge.adapters.formats.checks import Config, is_number
from shardmerge.adapters.formats.wholes import whole_update
from shardmerge.adapters.methods.lora import Dora, Lora
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import Orientation, TensorRef

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>lora_a|lora_b|m)")
_WHOLE = re.compile(r"(?P<module>.+)\.(?P<parameter>\w+)")


class Mlx(AdapterFormat):
    name = "mlx"
    summary = "`adapters.safetensors` of mlx-lm: LoRA, DoRA, or whole tensors"
    config_states_scale = True
    pairs = Pairs(re.compile(r"(?P<module>.+)\.lora_(?P<role>[ab])"), orientation=Orientation.SAME)

    def detect(self, tensors: Tensors, config: Config | None) -> bool:
        return (
            config is not None
            and "peft_type" not in config
            and ("lora_parameters" in config or "fine_tune_type" in config)
        )

    def method(self, tensors: Collection[str], config: Config | None) -> str:
        return str((config or {}).get("fine_tune_type", "LORA"))

    def stated_scale(self, config: Config | None) -> float | None:
        scale = _scale(config or {})
        return float(scale) if isinstance(scale, (int, float)) and is_number(scale) else None

    def read(self, content: AdapterContent, base: BaseView) -> Claims:
        if content.config is None:
            return Claims.refusal("there is no adapter_config.json beside it, in which MLX states the scale")
        return _claim(content.tensors, content.config)


def _scale(config: Config) -> Any:
    parameters = config.get("lora_parameters")
    return parameters.get("scale") if isinstance(parameters, dict) else None


def _claim(tensors: Tensors, config: Config) -> Claims:
    """Pair the factors; every module has the config's one scale."""
    claims = Claims()
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        matches = ((_WHOLE.fullmatch(name), ref) for name, ref in tensors.items())
        claims.updates += [
            whole_update(module_name(match["module"]), match["parameter"], ref) for match, ref in matches if match
        ]
        return claims
    scale = _scale(config)
    if kind not in ("lora", "dora"):
        claims.problems.append(f"adapter_config.json: fine_tune_type must be lora, dora or full, found {kind!r:.80}")
    if not is_number(scale):
        claims.problems.append(
            f"adapter_config.json: lora_parameters.scale must be a finite number, found {scale!r:.80}"
        )
    if claims.problems:
        claims.refused = True
        return claims
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        if match := _KEY.fullmatch(name):
            modules.setdefault(match["module"], {})[match["role"]] = ref
    for module, found in modules.items():
        _claim_pair(claims, module, found, float(scale), kind == "dora")
    return claims


def _claim_pair(claims: Claims, module: str, found: Mapping[str, TensorRef], scale: float, dora: bool) -> None:
    wanted = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    if missing := sorted(wanted - found.keys()):
        claims.half(next(iter(found.values())), f"{module}.{missing[0]}", found.values())
        return
    a, b = found["lora_a"], found["lora_b"]
    if "m" in found and not dora:
        claims.reject([found["m"]], f"{found['m'].name} is a length of DoRA, but fine_tune_type is not dora")
    # The file does not say whether a module is an embedding.
    update = ModuleUpdate(
        module_name(module), "weight", Lora.name, (("A", a), ("B", b)), scale, orientation=Orientation.UNKNOWN
    )
    claims.updates.append(update)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        claims.misfit(
            f"{shown(a, b)}: expected (in, r) and (r, out) of one rank; MLX's own layout of experts is not that of any "
            "checkpoint"
        )
        return
    factors = (("A", a.transposed()), ("B", b.transposed()))
    if dora:
        factors = (*factors, ("magnitude", found["m"]))  # type: ignore[assignment]
    family = Dora.name if dora else Lora.name
    claims.updates[-1] = update.changed(family=family, factors=factors, rank=a.shape[1])
