"""What one rounding to a dtype does to float64 numbers, written from the formats' definition."""

from __future__ import annotations

import torch
from torch import Tensor

from shardmerge.adapters.work import tile_dtype
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS

#: Of a float64 the bits that say its power of two.
_POWER = 0x7FF << 52


def half_unit(magnitude: Tensor, dtype: str) -> Tensor:
    """The most that rounding a number of this magnitude (float64) to a dtype changes it: half a unit of its last place.

    That is 2ᵏ⁻ᵖ of a number from 2ᵏ to 2ᵏ⁺¹ in a dtype of p significant bits, k being no less than that of its
    smallest normal number.
    """
    bits, least = {"F32": (24, -126), "F16": (11, -14), "BF16": (8, -126)}[dtype]
    power = (magnitude.view(torch.int64) & _POWER).view(torch.float64)
    return power.clamp_(min=2.0**least).mul_(2.0**-bits)


def rounded(value: Tensor, dtype: str, direction: int = 0) -> Tensor:
    """float64 → the nearest number of a dtype, ties to even; with a direction the next one below or above."""
    unit = half_unit(value.abs(), dtype).mul_(2)
    towards = {0: torch.round, -1: torch.floor, 1: torch.ceil}[direction]
    return torch.where(torch.isfinite(value), towards(value / unit) * unit, value)


def goes_by_chance(tensor: TensorPlan, compute_dtype: str, dtype: str) -> bool:
    """Whether stochastic rounding has a say where a tensor is rounded to ``dtype``: it is updated, in wider tiles."""
    return bool(tensor.updates) and DTYPE_BITS[dtype] < DTYPE_BITS[tile_dtype(tensor, compute_dtype)]
