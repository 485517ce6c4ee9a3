"""LoRA as image trainers write it (kohya's scripts, older diffusers): W' = W + α / r · up · down.

down is (r, in) or, of a convolution, (r, in, k…); up is (out, r) or (out, r, 1…). α is a number in the file; where it
is missing, the scaling is 1. Keys are ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``, with the
module's dots written as underscores, so only the base's own names can tell where they were; or with dots, as diffusers
wrote them: ``unet.down_blocks.0.attentions.0.proj_in.lora.down.weight``.
Source: kohya-ss/sd-scripts, networks/lora.py; diffusers, loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from shardmerge.adapters.base import Claims, ModuleUpdate
from shardmerge.naming import module_name
from shardmerge.spec import TensorRef

_KEY = re.compile(
    r"(?P<module>.+?)(?P<style>\.lora_(?P<role>down|up)\.weight|[._]lora\.(?P<old>down|up)\.weight|\.alpha)"
)
#: What stands before the flattened name, by the part of a pipeline that it is in.
_PARTS = re.compile(r"(lora_(unet|te\d*|transformer|prior_unet|prior_te)|lycoris)_")
_DOTTED_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "prior.")

#: Reads a factor of one number.
ReadNumber = Callable[[TensorRef], float]


def looks_like(names: Mapping[str, TensorRef]) -> bool:
    """Whether a file of these tensors is such an adapter."""
    return any(_KEY.fullmatch(name) and not name.endswith(".alpha") for name in names)


def claim(tensors: Mapping[str, TensorRef], read: ReadNumber, alpha: float | None, scaling: float | None) -> Claims:
    """Pair the factors and compute each scaling; ``alpha`` or ``scaling`` of our config overrule the file's."""
    claims = Claims()
    modules: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        if match := _KEY.fullmatch(name):
            modules.setdefault(match["module"], {})[match["role"] or match["old"] or "alpha"] = ref
    parts = sorted({part for module in modules if (part := _part(module))})
    if len(parts) > 1:
        claims.problems.append(
            f"it holds factors of several models ({', '.join(parts)}); merge them one at a time: give the model's own "
            "directory as base, and prefix for the adapter"
        )
        claims.refused = True
        return claims
    for module, factors in modules.items():
        _claim_pair(claims, module, factors, read, alpha, scaling)
    return claims


def _part(module: str) -> str:
    if match := _PARTS.match(module):
        return match[0]
    return next((part for part in _DOTTED_PARTS if module.startswith(part)), "")


def _claim_pair(
    claims: Claims,
    module: str,
    factors: Mapping[str, TensorRef],
    read: ReadNumber,
    alpha: float | None,
    scaling: float | None,
) -> None:
    if missing := {"down", "up"} - factors.keys():
        there = next(iter(factors.values()))
        claims.half(there, f"{module}.lora_{min(missing)}.weight")
        claims.told |= {ref.name for ref in factors.values()}
        return
    down, up = factors["down"], factors["up"]
    part = _part(module)
    flattened = "." not in module
    name = module_name(module.removeprefix(part))
    update = ModuleUpdate(name, "weight", "lora", (("A", down), ("B", up)), 1.0, flattened=flattened)
    claims.updates.append(update)
    if 0 in down.shape or 0 in up.shape:
        return  # an empty tensor is told of as such
    kernels = up.shape[2:]
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0] or any(size != 1 for size in kernels):
        claims.misfit(
            f"{down.name} {list(down.shape)} and {up.name} {list(up.shape)}: expected (r, in) and (out, r) of one "
            "rank, or of a convolution (r, in, k…) and (out, r, 1…)"
        )
        return
    claims.updates[-1] = update.changed(rank=down.shape[0])
    if scaling is None and alpha is None and "alpha" in factors:
        number = factors["alpha"]
        claims.told.add(number.name)
        if number.shape not in ((), (1,)):
            claims.misfit(f"{number.name} is {list(number.shape)}; expected one number")
            return
        alpha = read(number) or None  # kohya takes 0 for "not given"
    elif "alpha" in factors:
        claims.told.add(factors["alpha"].name)
    if scaling is None:
        scaling = 1.0 if alpha is None else alpha / down.shape[0]
    claims.updates[-1] = update.changed(rank=down.shape[0], scaling=scaling)
