"""Adapter families, a file each, and the readers that turn an adapter's keys into their updates.

To add a method of PEFT: a file with its `PeftMethod` and its `Family` (one class may be both), and a line in `METHODS`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.adapters.formats import bare, kohya, mlx, pure_pytorch
from shardmerge.adapters.formats.peft import Context, Ordered, PeftMethod, Registered, Stored, claim_beside, no_order
from shardmerge.adapters.formats.peft_lora import LoraMethod
from shardmerge.adapters.formats.refused import REFUSED_TYPES
from shardmerge.adapters.formats.scales import ReadNumber, Scales
from shardmerge.adapters.methods.adalora import AdaLora
from shardmerge.adapters.methods.base import Claims, Factors, Family, ModuleUpdate, check_dtypes
from shardmerge.adapters.methods.beft import Beft
from shardmerge.adapters.methods.boft import Boft
from shardmerge.adapters.methods.c3a import C3a
from shardmerge.adapters.methods.deft import Deft
from shardmerge.adapters.methods.delora import Delora
from shardmerge.adapters.methods.difference import Difference
from shardmerge.adapters.methods.fourierft import FourierFt
from shardmerge.adapters.methods.frod import Frod
from shardmerge.adapters.methods.frozen import FrozenCopy
from shardmerge.adapters.methods.glora import Glora, GloraBias
from shardmerge.adapters.methods.gralora import Gralora
from shardmerge.adapters.methods.hira import Hira
from shardmerge.adapters.methods.hra import Hra
from shardmerge.adapters.methods.ia3 import Ia3
from shardmerge.adapters.methods.kasa import Kasa
from shardmerge.adapters.methods.ln_tuning import LnTuning
from shardmerge.adapters.methods.loha import Loha, LohaTucker
from shardmerge.adapters.methods.lokr import Lokr
from shardmerge.adapters.methods.lora import Dora, Lora, LoraBias, LoraBlocks, LoraExperts, LoraGated
from shardmerge.adapters.methods.miss import Bone, Miss, MissBat
from shardmerge.adapters.methods.oft import Oft
from shardmerge.adapters.methods.osf import Osf
from shardmerge.adapters.methods.peanut import Peanut
from shardmerge.adapters.methods.psoft import Psoft
from shardmerge.adapters.methods.pvera import Pvera
from shardmerge.adapters.methods.randlora import RandLora, RandLoraSeeded
from shardmerge.adapters.methods.road import Road
from shardmerge.adapters.methods.shira import Shira
from shardmerge.adapters.methods.supertuning import SuperTuning
from shardmerge.adapters.methods.tinylora import TinyLora
from shardmerge.adapters.methods.trainable_tokens import TrainableTokensMethod
from shardmerge.adapters.methods.unilora import UniLora
from shardmerge.adapters.methods.unilora_seeded import UniLoraSeeded
from shardmerge.adapters.methods.vblora import VbLora
from shardmerge.adapters.methods.vera import Vera, VeraSeeded
from shardmerge.adapters.methods.waveft import WaveFt
from shardmerge.adapters.methods.whole import Overwrite, Replacement, TokenRows
from shardmerge.spec.tensors import TensorRef

__all__ = [
    "FAMILIES",
    "FORMATS",
    "METHODS",
    "REFUSED_TYPES",
    "AdapterContent",
    "Claims",
    "Factors",
    "Family",
    "ModuleUpdate",
    "Ordered",
    "PeftMethod",
    "Registered",
    "Stored",
    "are_factors",
    "are_weights",
    "check_dtypes",
    "claim",
    "claim_beside",
    "detect_format",
    "looks_like_image_trainers",
    "method_of",
    "no_order",
]

#: What can be done to a weight, by name.
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Lora(),
        Dora(),
        LoraExperts(),
        LoraBlocks(),
        LoraGated(),
        LoraBias(),
        Kasa(),
        Replacement(),
        Overwrite(),
        Difference(),
        TokenRows(),
        FrozenCopy(),
        Ia3(),
        Loha(),
        LohaTucker(),
        Lokr(),
        AdaLora(),
        Vera(),
        VeraSeeded(),
        RandLora(),
        RandLoraSeeded(),
        VbLora(),
        Miss(),
        MissBat(),
        Shira(),
        Delora(),
        Hira(),
        Hra(),
        Oft(),
        Boft(),
        Road(),
        C3a(),
        Gralora(),
        Glora(),
        GloraBias(),
        Beft(),
        FourierFt(),
        WaveFt(),
        Pvera(),
        UniLora(),
        UniLoraSeeded(),
        TinyLora(),
        SuperTuning(),
        Deft(),
        Peanut(),
        Osf(),
        Psoft(),
        Frod(),
    )
}

#: How adapters are stored: ``format`` in the config, and what it is.
FORMATS: Mapping[str, str] = {
    "peft": "PEFT's `adapter_config.json` with `adapter_model.safetensors` or `.bin`, any method of the table below; "
    "or its LoRA keys alone, as diffusers and ComfyUI's trainers write them, with the scale in the file or our config",
    "pure-pytorch": "the `.pt` of a training loop that computes `x @ A @ B * scale`: `….A` (in, r), `….B` (r, out)",
    "kohya": "image and video trainers' files: LoRA as `lora_down`, `lora_up` and `alpha` by module, LoKr and LoHa by "
    "LyCORIS' names, whole differences (`diff`, `diff_b`, `w_norm`); names with dots or underscores",
    "mlx": "`adapters.safetensors` of mlx-lm: LoRA, DoRA, or whole tensors",
}

#: How PEFT's files are read, by ``peft_type``.
METHODS: Mapping[str, PeftMethod] = {
    method.peft_type: method
    for method in (
        LoraMethod(),
        TrainableTokensMethod(),
        Ia3(),
        Loha(),
        Lokr(),
        AdaLora(),
        Vera(),
        RandLora(),
        VbLora(),
        Miss(),
        Bone(),
        Shira(),
        Delora(),
        LnTuning(),
        Hira(),
        Hra(),
        Oft(),
        Boft(),
        Road(),
        C3a(),
        Gralora(),
        Glora(),
        Beft(),
        FourierFt(),
        WaveFt(),
        Pvera(),
        UniLora(),
        TinyLora(),
        SuperTuning(),
        Deft(),
        Peanut(),
        Osf(),
        Psoft(),
        Frod(),
    )
}


def detect_format(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> str:
    """``peft``, ``pure-pytorch``, ``kohya`` or ``mlx``, from the config and the names."""
    if config is not None:
        return "mlx" if mlx.is_config(config) else "peft"
    if pure_pytorch.looks_like(tensors):
        return "pure-pytorch"
    return "kohya" if kohya.looks_like(tensors) else "peft"


#: What made an adapter without a config, by PEFT's name for it; and whether tensors' names are image trainers'.
method_of = kohya.method
looks_like_image_trainers = kohya.is_telling


#: Ends of the names of factors, in any format that is read without a config.
_FACTOR = re.compile(
    r".*\.(lora_\w+|lora_[AB]\.\w+|[AB]|alpha|hada_\w+|lokr_\w+|dora_scale|diff|diff_b|w_norm|b_norm)(\.weight|\.bias)?"
)


def are_factors(names: Collection[str]) -> bool:
    """Whether most of these tensors are an adapter's, by their names, and not a model's own."""
    return 2 * sum(_FACTOR.fullmatch(name) is not None for name in names) > len(names)


def are_weights(names: Collection[str]) -> bool:
    """Whether all of these tensors are a model's own, by their names."""
    return bool(names) and not any(map(_FACTOR.fullmatch, names)) and not looks_like_image_trainers(names)


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """What an adapter's files hold, and what our config says of its scale."""

    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] | None
    #: The metadata of the file's header, where it has one.
    metadata: Mapping[str, str]
    alpha: float | None
    scaling: float | None
    #: How B of fused experts is laid out, ``peft`` or ``unsloth``; None where our config does not say.
    expert_layout: str | None
    #: Reads a tensor of one number.
    read_number: ReadNumber
    #: Keys of the config that our config says to leave out.
    ignored: tuple[str, ...] = ()


def claim(
    format_: str,
    content: AdapterContent,
    registered: Registered = lambda module: (),
    stored: Stored | None = None,
    ordered: Ordered = no_order,
) -> Claims:
    """Read an adapter of a format: its updates, and everything that is wrong with it.

    ``registered`` tells in which order a module of the base registers parameters of its own, where that is known;
    ``stored`` tells of a module's parameter in the base, and its dtype, where there is a base; ``ordered``
    of its Linear layers in their order.
    """
    claims = _claim(format_, content, registered, stored, ordered)
    if content.expert_layout == "unsloth" and not claims.problems:  # peft is what is done anyway
        claims.problems += _idle_layout(claims)
    return claims


def _idle_layout(claims: Claims) -> list[str]:
    if any(update.family == LoraExperts.name for update in claims.updates):
        return []
    return ["expert_layout has no effect: it has no LoRA of fused experts in PEFT's keys; remove it"]


def _claim(
    format_: str, content: AdapterContent, registered: Registered, stored: Stored | None, ordered: Ordered
) -> Claims:
    tensors, config = content.tensors, content.config
    if content.ignored and (config is None or format_ != "peft"):
        return Claims(problems=["ignore_keys are of PEFT's adapter_config.json; this adapter has none"], refused=True)
    scales = Scales(content.alpha, content.scaling, content.metadata, content.read_number)
    context = Context(
        config or {},
        registered=registered,
        stored=stored,
        expert_layout=content.expert_layout,
        ignored=content.ignored,
        ordered=ordered,
    )
    if format_ == "pure-pytorch":
        return pure_pytorch.claim(tensors, scales)
    if format_ == "kohya":
        return kohya.claim(tensors, scales, context)
    if config is None:
        return bare.claim(tensors, scales, context)
    if format_ == "mlx":
        return mlx.claim(tensors, config)
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and (method := METHODS.get(peft_type)):
        return method.claim(tensors, context)
    return Claims(problems=[_no_method(peft_type)], refused=True)


def _no_method(peft_type: object) -> str:
    known = ", ".join(sorted(METHODS))
    if peft_type is None:
        return f"adapter_config.json names no peft_type; this version merges {known}"
    if reason := REFUSED_TYPES.get(str(peft_type)):
        return f"peft_type {peft_type}: {reason}"
    near = difflib.get_close_matches(str(peft_type), METHODS, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"peft_type {str(peft_type)[:80]!r} is unknown{hint}; this version merges {known}"
