"""What one rounding to a dtype does to float64 numbers, written from the formats' definition."""

from __future__ import annotations

import torch
from torch import Tensor

from shardmerge.adapters.work import tile_dtype
from shardmerge.codecs.rounding import half_unit
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS


def rounded(value: Tensor, dtype: str, direction: int = 0) -> Tensor:
    """float64 → the nearest number of a dtype, ties to even; with a direction the next one below or above."""
    unit = half_unit(value.abs(), dtype).mul_(2)
    towards = {0: torch.round, -1: torch.floor, 1: torch.ceil}[direction]
    return torch.where(torch.isfinite(value), towards(value / unit) * unit, value)


def is_stochastic(tensor: TensorPlan, compute_dtype: str, dtype: str) -> bool:
    """Whether stochastic rounding has a say where a tensor is rounded to ``dtype``: it is asked for, in wider tiles."""
    asked = tensor.encoding is not None and tensor.encoding.setting("seed") is not None
    return asked and DTYPE_BITS[dtype] < DTYPE_BITS[tile_dtype(tensor, compute_dtype)]
