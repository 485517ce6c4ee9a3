"""Stored rows of a GGUF tensor → numbers, and what those may be, given what base and adapter make.

Written from the format's definition, and not with the code that quantises. A block is 32 elements of a row: d and m as
float16, and a whole number q of each element. Byte i of the 16 after them holds the low four bits of q[i] and, above
them, those of q[i + 16]; bit i of the four bytes h is the fifth bit of q[i].

    Q8_0  d, 32 × q as int8        y = d · q           q from -127 to 127, d = max|x| / 127
    Q4_0  d, 16 × 2 q              y = d · (q - 8)     d = x̂ / -8, x̂ being the element of the largest magnitude
    Q5_0  d, h, 16 × 2 q           y = d · (q - 16)    d = x̂ / -16
    Q4_1  d, m, 16 × 2 q           y = d · q + m       m = min, d = (max - min) / 15
    Q5_1  d, m, h, 16 × 2 q        y = d · q + m       m = min, d = (max - min) / 31

**What a value may be.** Base and adapter make W' ± e in float64 (see `shardmerge.verification.exact`). What follows
is defined to the bit and never turns the order of two numbers around: rounding to the dtype that a checkpoint in
between would have, adding 1 to a norm, rounding to the type of the file. So done to W' - e and to W' + e it gives the
least and the largest number that may be stored, which mostly are the same one. Where rounding is stochastic, the one
end is rounded down and the other up.

For blocks these two, a and b, are what the quantiser was given, and

- d and m are float16 of what the definition makes of them; two float32 roundings before that, 2⁻²² of each;
- |y - x| ≤ ½ |D| + r, D being d before its rounding to float16, of which the definition makes least and largest, too.
  The highest level of Q4_0 and Q5_0 also holds what is up to a whole step above it: x̂ = -8 D has its opposite at
  8 D, and levels end at 7 D. r is what rounding d and m costs: |d - D| times the largest |q|, and |m - min|;
- float32 errors in x / d: 2⁻²² of D for every level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.codecs.rounding import NUMBER_DTYPES
from shardmerge.verification.rounding import rounded

_BLOCK = 32
_FLOAT32 = 2.0**-22
VALUE = "value"


@dataclass(frozen=True, slots=True)
class _Kind:
    """Bytes of d (and m), whether there are fifth bits, the number that q counts from, and the range of q - zero."""

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
    """Numbers of one sort as they are found, with the least and the largest that each may be.

    ``what`` they are: values, or of every block its scale or minimum. ``step``: elements of a row for each.
    """

    what: str
    found: Tensor
    least: Tensor
    largest: Tensor
    step: int = 1
    of_blocks: bool = True


def between(value: Tensor, error: Tensor, through: str, addend: float, is_stochastic: bool) -> tuple[Tensor, Tensor]:
    """(least, largest) number that a file in float32 would hold of W' ± e.

    ``through`` is the dtype of a checkpoint in between; ``addend`` is added after it.
    """
    ends = []
    for end, direction in ((value - error, -1), (value + error, 1)):
        stored = rounded(end, through, direction if is_stochastic else 0)
        if addend:
            stored = rounded(stored + addend, "F16" if through == "F16" else "F32")
        ends.append(stored)
    return ends[0], ends[1]


def compare(data: Tensor, kind: str, least: Tensor, largest: Tensor) -> list[Numbers]:
    """What rows (rows, bytes) of a file hold and may hold; ``least`` and ``largest`` (rows, columns) as `between` says.

    What is not finite has no right quantised value: such blocks come out as they are.
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
