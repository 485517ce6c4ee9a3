"""Decode stored rows of a GGUF tensor, and bound the numbers that they may hold, given base and adapter.

Written from the format's definition, without the code that quantises. A block is 32 elements of a row: d and m as
float16, and an integer q for each element. Byte i of 16 bytes holds the low four bits of q[i] and, above them, those of
q[i + 16]; bit i of the four bytes h is the fifth bit of q[i].

    Q8_0  d, 32 × q as int8        y = d · q           q from -127 to 127, d = max|x| / 127
    Q4_0  d, 16 × 2 q              y = d · (q - 8)     d = x̂ / -8, x̂ being the element of the largest magnitude
    Q5_0  d, h, 16 × 2 q           y = d · (q - 16)    d = x̂ / -16
    Q4_1  d, m, 16 × 2 q           y = d · q + m       m = min, d = (max - min) / 15
    Q5_1  d, m, h, 16 × 2 q        y = d · q + m       m = min, d = (max - min) / 31

**The bound.** Base and adapter make W' ± e in float64 (see `shardmerge.verification.exact`). The steps after that are
exactly defined and monotonic: rounding to the dtype of the checkpoint that would be converted, adding 1 to a norm,
rounding to the file's type. Applied to W' - e and to W' + e they give the least and the largest number that may be
stored, which are mostly the same. Stochastic rounding rounds the first down and the second up.

For blocks, these are the bounds of the quantiser's input x, and

- d and m are the definition's values, rounded to float16; two float32 roundings before that make 2⁻²² of each;
- |y - x| ≤ ½ |D| + r, where D is d before its rounding to float16, with its own least and largest value. The highest
  level of Q4_0 and Q5_0 also holds values up to a whole step above it: with x̂ = -8 D, the opposite value is 8 D, but
  levels end at 7 D. r is the cost of rounding d and m: |d - D| times the largest |q|, and |m - min|;
- float32 errors in x / d: 2⁻²² of D for every level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.codecs.rounding import NUMBER_DTYPES
from shardmerge.verification.decoders import rounded

_BLOCK = 32
_FLOAT32 = 2.0**-22
VALUE = "value"


@dataclass(frozen=True, slots=True)
class _Kind:
    """Bytes of d (and m), whether q has a fifth bit, the q that means 0, and the range of q - zero."""

    scales: int
    fifth: bool
    zero: int
    lowest: int
    highest: int

    @property
    def has_minimum(self) -> bool:
        return self.scales == 4


_KINDS: Mapping[str, _Kind] = {
    "Q8_0": _Kind(2, False, 0, -127, 127),
    "Q4_0": _Kind(2, False, 8, -8, 7),
    "Q5_0": _Kind(2, True, 16, -16, 15),
    "Q4_1": _Kind(4, False, 0, 0, 15),
    "Q5_1": _Kind(4, True, 0, 0, 31),
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """Stored numbers, each with its least and largest allowed value.

    ``what`` names them: values, or the scale or minimum of each block. ``step`` is the elements of a row for each.
    """

    what: str
    found: Tensor
    least: Tensor
    largest: Tensor
    step: int = 1
    of_blocks: bool = True


def between(value: Tensor, error: Tensor, through: str, addend: float, is_stochastic: bool) -> tuple[Tensor, Tensor]:
    """The least and the largest number for W' ± e before the file's type rounds it.

    ``through`` is the dtype of the checkpoint that would be converted; ``addend`` is added after it.
    """
    ends = []
    for end, direction in ((value - error, -1), (value + error, 1)):
        stored = rounded(end, through, direction if is_stochastic else 0)
        if addend:
            stored = rounded(stored + addend, "F16" if through == "F16" else "F32")
        ends.append(stored)
    return ends[0], ends[1]


def compare(data: Tensor, kind: str, least: Tensor, largest: Tensor) -> list[Numbers]:
    """The numbers in rows (rows, bytes) of a file; ``least`` and ``largest``, (rows, columns), are from `between`.

    A block with a value that is not finite has no correct quantisation: whatever it holds is allowed.
    """
    if kind not in _KINDS:
        found = data.view(NUMBER_DTYPES[kind]).double()
        return [Numbers(VALUE, found, rounded(least, kind), rounded(largest, kind), of_blocks=False)]
    rows, columns = least.shape
    blocks = data.view(rows, columns // _BLOCK, -1)
    low, high = (of.view(rows, columns // _BLOCK, _BLOCK) for of in (least, largest))
    return _compare_blocks(blocks, _KINDS[kind], low, high, (rows, columns))


def _compare_blocks(blocks: Tensor, kind: _Kind, low: Tensor, high: Tensor, shape: tuple[int, int]) -> list[Numbers]:
    d, q = _float16(blocks, 0), _levels(blocks, kind)
    m = _float16(blocks, 2) if kind.has_minimum else torch.zeros_like(d)
    found = d.unsqueeze(-1) * q + m.unsqueeze(-1)
    step_low, step_high = _steps(kind, low, high, d)
    step = torch.maximum(step_low.abs(), step_high.abs())
    widening = step * _FLOAT32
    scales = rounded(step_low - widening, "F16"), rounded(step_high + widening, "F16")
    off = torch.maximum((d - step_low).abs(), (d - step_high).abs()) * max(-kind.lowest, kind.highest)
    numbers = [Numbers("scale", d, *scales, _BLOCK)]
    if kind.has_minimum:
        least, largest = low.amin(-1), high.amin(-1)
        numbers.append(Numbers("minimum", m, rounded(least, "F16"), rounded(largest, "F16"), _BLOCK))
        off += torch.maximum((m - least).abs(), (m - largest).abs())
    half = (step * (0.5 + (kind.highest - kind.lowest) * _FLOAT32) + off).unsqueeze(-1)
    down, up = half.expand_as(low).clone(), half.expand_as(low).clone()
    if kind.zero:
        clipped, more = q == kind.highest, (step / 2).unsqueeze(-1)
        positive = (d > 0).unsqueeze(-1)
        down += torch.where(clipped & positive, more, 0.0)
        up += torch.where(clipped & ~positive, more, 0.0)
    numbers.append(Numbers(VALUE, found.reshape(shape), (low - down).reshape(shape), (high + up).reshape(shape)))
    undefined = ~(torch.isfinite(low) & torch.isfinite(high)).all(-1)
    if bool(undefined.any()):
        numbers = [_as_found(of, undefined) for of in numbers]
    return numbers


def _as_found(numbers: Numbers, undefined: Tensor) -> Numbers:
    where = undefined if numbers.step > 1 else undefined.repeat_interleave(_BLOCK, dim=1)
    found, least, largest = (torch.where(where, 0.0, of) for of in (numbers.found, numbers.least, numbers.largest))
    return Numbers(numbers.what, found, least, largest, numbers.step)


def _steps(kind: _Kind, low: Tensor, high: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest D, before it is rounded to float16; x is between ``low`` and ``high``."""
    if kind.has_minimum:
        ranges = low.amax(-1) - high.amin(-1), high.amax(-1) - low.amin(-1)
        return ranges[0].clamp_(min=0.0) / kind.highest, ranges[1] / kind.highest
    if not kind.zero:
        least = torch.maximum(low, -high).clamp_(min=0.0)  # where an interval has both signs, |x| may be 0
        return least.amax(-1) / kind.highest, torch.maximum(high, -low).amax(-1) / kind.highest
    # The sign of d says which end was the larger one; were it not, values beyond the levels' other end would show it.
    negative = torch.where(d == 0, high.amax(-1) > -low.amin(-1), d < 0)
    least = torch.where(negative, high.amax(-1), high.amin(-1)) / kind.lowest
    largest = torch.where(negative, low.amax(-1), low.amin(-1)) / kind.lowest
    return least, largest


def _float16(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1).double()


def _levels(blocks: Tensor, kind: _Kind) -> Tensor:
    """q - zero of every element, in float64."""
    if kind.highest == 127:
        return blocks[..., 2:].contiguous().view(torch.int8).double()
    start = kind.scales + 4 * kind.fifth
    q = torch.cat([blocks[..., start:] & 15, blocks[..., start:] >> 4], dim=-1)
    if kind.fifth:
        bits = blocks[..., kind.scales : start].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
        q = q | ((bits & 1).flatten(-2) << 4)
    return q.double() - kind.zero
