"""Numbers of the stored dtypes in torch, and one rounding to nearest, ties to even.

A float64 is not rounded to 16 or 8 bits by way of float32, as torch does it: two roundings to nearest can end on the
wrong side of a tie. It goes to float32 by rounding to odd, which keeps what the second rounding needs to know.
Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd",
IEEE Transactions on Computers 57(4), 2008.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
#: What tensors of a file may be: floats, parts of quantised weights, and numbers of rows, columns and such.
NUMBER_DTYPES: Mapping[str, torch.dtype] = {
    **TORCH_DTYPES,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SLAB = 1 << 14  # elements at a time: what is in between stays in the core's cache, and takes little memory
#: Significant bits, and the power of two of the smallest normal number.
_PRECISION: Mapping[str, tuple[int, int]] = {
    "F64": (53, -1022),
    "F32": (24, -126),
    "F16": (11, -14),
    "BF16": (8, -126),
    "F8_E4M3": (4, -6),
}
#: Of a float64 the bits that hold its power of two.
_POWER = 0x7FF << 52
_NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def view_bytes(raw: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Bytes (uint8, dense) seen as a tensor; no copy."""
    return raw.view(TORCH_DTYPES[dtype]).view(shape)


def seen_as(memory: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The beginning of ``memory`` (uint8) as a dense matrix."""
    return view_bytes(memory[: math.prod(shape) * TORCH_DTYPES[dtype].itemsize], dtype, shape)


def encode_into(target: Tensor, value: Tensor) -> None:
    """Round ``value`` (float32, float64 or bfloat16) into ``target``, once; both dense."""
    if value.dtype != torch.float64 or target.dtype not in _NARROW:
        target.copy_(value)
        return
    for to, part in zip(torch.split(target.view(-1), _SLAB), torch.split(value.view(-1), _SLAB), strict=True):
        to.copy_(_round_to_odd(part))


def _round_to_odd(value: Tensor) -> Tensor:
    """float64 → float32: exact where it fits, else of its two neighbours the one whose last bit is 1."""
    nearest = value.to(torch.float32)
    wide = nearest.double()
    # One step of the bit pattern, which grows with the magnitude, towards the exact value.
    bits = nearest.view(torch.int32)
    inexact = (value != wide).logical_and_((bits & 1) == 0).logical_and_(torch.isfinite(nearest))
    step = (value.abs() > wide.abs_()).to(torch.int32).mul_(2).sub_(1)
    return bits.add_(step.mul_(inexact)).view(torch.float32)


def is_finite(values: Tensor) -> bool:
    """Whether every value is finite; False only means that one may not be.

    A sum is the cheapest pass, and is not finite if a value is not. The sum of large numbers may be infinite, too.
    """
    return math.isfinite(float(values.sum()))


def is_below(values: Tensor, bound: float) -> bool:
    """Whether all magnitudes are below ``bound``; NaN is not."""
    if not values.numel():
        return True
    low, high = values.aminmax()
    return -bound < float(low) and float(high) < bound


def half_unit(magnitude: Tensor, dtype: str) -> Tensor:
    """The most that rounding a number of this magnitude (float64) to a dtype changes it: half a unit of its last place.

    That is 2ᵏ⁻ᵖ of a number from 2ᵏ to 2ᵏ⁺¹ in a dtype of p significant bits, k being no less than that of its
    smallest normal number.
    """
    bits, least = _PRECISION[dtype]
    power = (magnitude.view(torch.int64) & _POWER).view(torch.float64)
    return power.clamp_(min=2.0**least).mul_(2.0**-bits)
