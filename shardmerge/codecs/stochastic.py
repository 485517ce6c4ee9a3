"""Stochastic rounding: up or down at random, in proportion to what is nearer, so that nothing is lost in expectation.

Between its two neighbours x₀ ≤ x ≤ x₁ in the narrow dtype, x becomes x₁ with probability (x − x₀) / (x₁ − x₀). An
update far below half a unit of the weights, which rounding to nearest would drop everywhere, so moves the right share
of them by a unit. Source: Croci et al., "Stochastic rounding: implementation, error analysis and applications",
Royal Society Open Science 9, 2022.

Random bits are a hash of the seed, the tensor's name and the element's index, not a stream of random numbers: so the
result does not depend on tiles, threads, devices or a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from shardmerge.spec.tensors import RowRange, even_rows

#: Whole numbers that have as many bits.
_BITS = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
}
#: fmix32 of MurmurHash3 (Austin Appleby, public domain): of each step a shift and a factor, as int32 has it.
_STEPS = ((16, 0x85EBCA6B - (1 << 32)), (13, 0xC2B2AE35 - (1 << 32)), (16, 1))
_COLUMNS = 0x9E3779B9 - (1 << 32)  # 2³² divided by the golden ratio, so that neighbours begin far apart
#: Elements at a time, so that what is in between stays in the core's cache and takes little memory. Those that are cut
#: take less.
_SLAB = 1 << 14
_SLAB_TO_CUT = 1 << 16


def encode_into(target: Tensor, value: Tensor, seed: int, name: str, rows: RowRange) -> None:
    """Round ``value`` (rows, columns), float32 or float64, into a narrower ``target``: rows ``rows`` of a tensor.

    What ``target`` can hold exactly stays as it is, and so does what is not finite.
    """
    cuts = target.dtype == torch.bfloat16 and value.dtype == torch.float32
    for here, mixed in _hashes(value, seed, name, rows, _SLAB_TO_CUT if cuts else _SLAB):
        part_of_value = value[here].contiguous()
        if cuts and _is_finite(part_of_value):
            _cut(target[here], part_of_value, mixed)
        else:
            _choose(target[here], part_of_value, _share(mixed))


def shares(value: Tensor, seed: int, name: str, rows: RowRange) -> Iterator[tuple[slice, Tensor]]:
    """For each element of ``value``, rows ``rows`` of a tensor, a random number in [0, 1), by seed, name and place.

    They are float32 with 24 bits, for some rows at a time: a codec goes up where the share is below how far its value
    is between the code below and the code above.
    """
    for here, mixed in _hashes(value, seed, name, rows, _SLAB):
        yield here, _share(mixed)


def _hashes(value: Tensor, seed: int, name: str, rows: RowRange, slab: int) -> Iterator[tuple[slice, Tensor]]:
    """For some rows of ``value`` at a time the random bits of each element, as int32."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest(), "little", signed=True)
    columns = torch.arange(value.shape[1], dtype=torch.int32, device=value.device) * _COLUMNS
    of_rows = torch.arange(rows.start, rows.stop, device=value.device)
    # Rows are few, yet may be more than 2³²: those of experts, of a tensor seen element by element.
    high, low = (of_rows >> 31).to(torch.int32), (of_rows & 0x7FFFFFFF).to(torch.int32)
    of_rows = _mix(_mix(low ^ key) + high)[:, None]
    for part in even_rows(len(rows), max(1, value.numel() // slab)):
        here = slice(part.start, part.stop)
        yield here, _mix(of_rows[here] ^ columns)


def _share(mixed: Tensor) -> Tensor:
    """The upper 24 bits as a fraction of 2²⁴; ``mixed`` is overwritten."""
    return mixed.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _is_finite(value: Tensor) -> bool:
    return math.isfinite(float(value.sum()))


def _cut(target: Tensor, value: Tensor, mixed: Tensor) -> None:
    """bfloat16 is the upper half of a float32: random bits that are added to the lower half carry into the upper.

    ``mixed`` is overwritten.
    """
    mixed.bitwise_and_(0xFFFF).add_(value.view(torch.int32)).bitwise_right_shift_(16)
    target.view(torch.int16).copy_(mixed)


def _choose(target: Tensor, value: Tensor, share: Tensor) -> None:
    """Of the two neighbours of each value the one that a random ``share``, in [0, 1), selects."""
    nearest = value.to(target.dtype)
    rounded = nearest.to(value.dtype)
    error = value - rounded
    up = error > 0
    # The neighbour on the other side of the exact value: one step of the bit pattern, which grows with the magnitude.
    whole = _BITS[target.dtype]
    bits = nearest.view(whole)
    step = (up == (bits >= 0)).to(whole).mul_(2).sub_(1)
    # Next to zero it is the least number with the sign of the exact value: its last bit, and maybe the sign's.
    least = torch.where(up, 1, torch.iinfo(whole).min + 1).to(whole)
    neighbour = torch.where(nearest == 0, least, bits + step).view(target.dtype)
    gap = neighbour.to(value.dtype).sub_(rounded)
    # A value that is exact has no error, and the error of an infinity is NaN.
    target.copy_(torch.where(error.abs_() > gap.abs_().mul_(share), neighbour, nearest))


def _mix(numbers: Tensor) -> Tensor:
    """Numbers of 32 bits, in int32, thoroughly stirred, in place."""
    shifted = torch.empty_like(numbers)
    for shift, factor in _STEPS:
        torch.bitwise_right_shift(numbers, shift, out=shifted)
        numbers.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return numbers
