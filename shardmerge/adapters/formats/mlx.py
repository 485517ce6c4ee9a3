"""Adapters of MLX (``mlx_lm.lora``): W' = W + scale · bᵀ aᵀ, with DoRA m / ‖W'‖ · W'.

a is (in, r) and b (r, out), the transposes of what PEFT keeps; of an embedding, whose W is (V, D), a is (V, r) and b
(r, D), and W' = W + scale · a b. m is (out). The scale stands in adapter_config.json as it is, not divided by the rank.
A full fine-tune holds whole tensors. Source: mlx-lm, tuner/lora.py, tuner/dora.py and tuner/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardmerge.adapters.formats.peft import is_number
from shardmerge.adapters.methods.base import Claims, ModuleUpdate
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import TensorRef

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>lora_a|lora_b|m)")
_WHOLE = re.compile(r"(?P<module>.+)\.(?P<parameter>\w+)")


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is MLX's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def claim(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Claims:
    """Pair the factors; every module has the config's one scale."""
    claims = Claims()
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        for name, ref in tensors.items():
            if match := _WHOLE.fullmatch(name):
                factors = (("whole", ref),)
                claims.updates.append(
                    ModuleUpdate(module_name(match["module"]), match["parameter"], "replacement", factors)
                )
        return claims
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
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
        _claim_pair(claims, module, found, float(scale), kind == "dora")  # type: ignore[arg-type]
    return claims


def _claim_pair(claims: Claims, module: str, found: Mapping[str, TensorRef], scale: float, dora: bool) -> None:
    wanted = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    if missing := sorted(wanted - found.keys()):
        claims.half(next(iter(found.values())), f"{module}.{missing[0]}")
        claims.told |= {ref.name for ref in found.values()}
        return
    a, b = found["lora_a"], found["lora_b"]
    if "m" in found and not dora:
        claims.told.add(found["m"].name)
        claims.problems.append(f"{found['m'].name} is a length of DoRA, but fine_tune_type is not dora")
    update = ModuleUpdate(module_name(module), "weight", "lora", (("A", a), ("B", b)), scale)
    claims.updates.append(update)
    if 0 in a.shape or 0 in b.shape:
        return
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        claims.misfit(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)}: expected (in, r) and (r, out) of one rank; MLX's "
            "own layout of experts is not that of any checkpoint"
        )
        return
    factors = (("A", a.transposed()), ("B", b.transposed()))
    if dora:
        factors = (*factors, ("magnitude", found["m"]))  # type: ignore[assignment]
    settings = (("either_way", True),)
    family = "dora" if dora else "lora"
    claims.updates[-1] = update.changed(family=family, factors=factors, rank=a.shape[1], settings=settings)
