"""The adapter of a training script without PEFT: a flat state dict of ``….A`` and ``….B``.

Its layer computes ``x @ A @ B * scale`` with A (in, r) and B (r, out), so W' = W + scale · Bᵀ Aᵀ: LoRA with both
factors stored transposed. It carries no config: the rank is in the shapes, alpha or scaling come from ours, from
``….alpha`` or from the file's metadata. The wrapped layer's own parameters may be there too, as ``….original.weight``
and ``….original.bias``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from shardmerge.adapters.claims import BaseView, Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.base import AdapterContent, AdapterFormat, Pairs, Tensors
from shardmerge.adapters.formats.checks import Config
from shardmerge.adapters.formats.scales import Scales
from shardmerge.adapters.methods.lora import Lora
from shardmerge.adapters.methods.whole import FrozenCopy
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import Orientation, TensorRef

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<role>[AB]|alpha)")
_FROZEN = re.compile(r"(?P<module>.+)\.original\.(?P<parameter>weight|bias)")


class PurePytorch(AdapterFormat):
    name = "pure-pytorch"
    summary = "the `.pt` of a training loop that computes `x @ A @ B * scale`: `….A` (in, r), `….B` (r, out)"
    pairs = Pairs(
        re.compile(r"(?P<module>.+)\.(?P<role>[AB])"),
        orientation=Orientation.SAME,
        others=re.compile(rf".*\.alpha|{_FROZEN.pattern}"),
    )

    def detect(self, tensors: Tensors, config: Config | None) -> bool:
        return config is None and looks_like(tensors)

    def read(self, content: AdapterContent, base: BaseView) -> Claims:
        scales, claims = content.scales, Claims()
        if problem := scales.unread():
            return Claims.refusal(problem)
        pairs: dict[str, dict[str, TensorRef]] = {}
        for name, ref in content.tensors.items():
            if match := _FROZEN.fullmatch(name):
                module = module_name(match["module"])
                claims.updates.append(ModuleUpdate(module, match["parameter"], FrozenCopy.name, (("copy", ref),)))
            elif match := _FACTOR.fullmatch(name):
                pairs.setdefault(match["module"], {})[match["role"]] = ref
        for name, pair in pairs.items():
            _claim_pair(claims, name, pair, scales)
        unknown = "it carries no config, so its scale is unknown: give alpha (or scaling) in the config"
        scales.finish(claims, unknown, "")
        return claims


def looks_like(names: Collection[str]) -> bool:
    """Whether a file with these tensors is such an adapter."""
    return not all(name.endswith(".alpha") for name in names) and all(
        _FACTOR.fullmatch(name) or _FROZEN.fullmatch(name) for name in names
    )


def _claim_pair(claims: Claims, name: str, pair: Mapping[str, TensorRef], scales: Scales) -> None:
    if missing := {"A", "B"} - pair.keys():
        claims.half(next(iter(pair.values())), f"{name}.{min(missing)}", pair.values())
        return
    a, b = pair["A"], pair["B"]
    claims.updates.append(ModuleUpdate(module_name(name), "weight", Lora.name, (("A", a), ("B", b))))
    rank = a.shape[1] if len(a.shape) == 2 else 1
    scaling = scales.of(claims, rank, pair.get("alpha"), one_if_unsaid=False)
    matrices = len(a.shape) == 2 and len(b.shape) == 2
    if not matrices or a.shape[1] != b.shape[0]:
        hint = ""
        if matrices and a.shape[0] == b.shape[1]:
            hint = "; these are (r, in) and (out, r), PEFT's layout: transpose both, or name them lora_A and lora_B"
        claims.misfit(f"{shown(a, b)}: expected (in, r) and (r, out) of one rank{hint}")
        return
    factors = (("A", a.transposed()), ("B", b.transposed()))
    claims.updates[-1] = claims.updates[-1].changed(factors=factors, scaling=scaling, rank=rank)
