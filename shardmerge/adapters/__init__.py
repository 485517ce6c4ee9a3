"""Adapter families, a file each, and the readers that turn an adapter's keys into their updates.

To add a family: one class with the seam of `Family`, in `FAMILIES`; a reader of its keys, in `claim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardmerge.adapters import peft_lora, pure_pytorch
from shardmerge.adapters.base import Claims, Factors, Family, ModuleUpdate
from shardmerge.adapters.frozen import FrozenCopy
from shardmerge.adapters.lora import LoraLinear
from shardmerge.spec import TensorPlan, TensorRef

__all__ = [
    "FAMILIES",
    "Claims",
    "Factors",
    "Family",
    "ModuleUpdate",
    "claim",
    "detect_format",
    "leftover_kind",
    "work_dtype",
]

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LoraLinear(), FrozenCopy())}

leftover_kind = peft_lora.leftover_kind


def work_dtype(tensor: TensorPlan, compute_dtype: str) -> str:
    """What a tensor is worked on in: the compute dtype where an update changes it.

    Where its dtype is only converted, or its values only compared, F32 holds all of what the three float dtypes can.
    """
    changes = any(FAMILIES[update.family].changes_weight for update in tensor.updates)
    return compute_dtype if changes else "F32"


def detect_format(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> str:
    """``peft`` or ``pure-pytorch``, from the config's presence and the names."""
    return "pure-pytorch" if config is None and pure_pytorch.looks_like(tensors) else "peft"


def claim(
    kind: str,
    tensors: Mapping[str, TensorRef],
    config: Mapping[str, Any] | None,
    alpha: float | None,
    scaling: float | None,
) -> Claims:
    """Read an adapter of a format: its updates, and everything that is wrong with it."""
    if kind == "pure-pytorch":
        return pure_pytorch.claim(tensors, alpha, scaling)
    if config is None:
        return peft_lora.claim_bare(tensors, alpha, scaling)
    peft_type = config.get("peft_type")
    if peft_type == "LORA":
        return peft_lora.claim(tensors, config)
    what = (
        "adapter_config.json names no peft_type" if peft_type is None else f"{peft_type} adapters are not supported yet"
    )
    return Claims(problems=[f"{what}; this version merges LORA"], refused=True)
