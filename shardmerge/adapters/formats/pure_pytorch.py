"""The adapter of a training script without PEFT: a flat state dict of ``….A`` and ``….B``.

Its layer computes ``x @ A @ B * scale`` with A (in, r) and B (r, out), so W' = W + scale · Bᵀ Aᵀ: LoRA with both
factors stored transposed. It carries no config: the rank is in the shapes, alpha or scaling come from ours, from
``….alpha`` or from the file's metadata. The wrapped layer's own parameters may be there too, as ``….original.weight``
and ``….original.bias``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from shardmerge.adapters.formats.scales import Scales
from shardmerge.adapters.methods.base import Claims, ModuleUpdate
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import TensorRef

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<role>[AB]|alpha)")
_FROZEN = re.compile(r"(?P<module>.+)\.original\.(?P<parameter>weight|bias)")


def looks_like(names: Mapping[str, TensorRef]) -> bool:
    """Whether a file of these tensors is such an adapter."""
    return not all(name.endswith(".alpha") for name in names) and all(
        _FACTOR.fullmatch(name) or _FROZEN.fullmatch(name) for name in names
    )


def claim(tensors: Mapping[str, TensorRef], scales: Scales) -> Claims:
    """Pair the factors, check the pairs, compute each scaling."""
    if problem := scales.unread():
        return Claims(problems=[problem], refused=True)
    claims = Claims()
    pairs: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        if match := _FROZEN.fullmatch(name):
            module = module_name(match["module"])
            claims.updates.append(ModuleUpdate(module, match["parameter"], "frozen-copy", (("copy", ref),), 1.0, 0))
        elif match := _FACTOR.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["role"]] = ref
    for name, pair in pairs.items():
        _claim_pair(claims, name, pair, scales)
    scales.finish(claims, "it carries no config, so its scale is unknown: give alpha (or scaling) in the config", "")
    return claims


def _claim_pair(claims: Claims, name: str, pair: Mapping[str, TensorRef], scales: Scales) -> None:
    if missing := {"A", "B"} - pair.keys():
        there = next(iter(pair.values()))
        claims.half(there, f"{name}.{min(missing)}")
        claims.told |= {ref.name for ref in pair.values()}
        return
    a, b = pair["A"], pair["B"]
    claims.updates.append(ModuleUpdate(module_name(name), "weight", "lora", (("A", a), ("B", b)), 1.0, 0))
    rank = a.shape[1] if len(a.shape) == 2 else 1
    scaling = scales.of(claims, rank, pair.get("alpha"), one_if_unsaid=False)
    if 0 in a.shape or 0 in b.shape:
        return  # an empty tensor is told of as such
    matrices = len(a.shape) == 2 and len(b.shape) == 2
    if not matrices or a.shape[1] != b.shape[0]:
        hint = ""
        if matrices and a.shape[0] == b.shape[1]:
            hint = "; these are (r, in) and (out, r), PEFT's layout: transpose both, or name them lora_A and lora_B"
        claims.misfit(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)}: expected (in, r) and (r, out) of one rank{hint}"
        )
        return
    factors = (("A", a.transposed()), ("B", b.transposed()))
    claims.updates[-1] = dataclasses.replace(claims.updates[-1], factors=factors, scaling=scaling, rank=rank)
