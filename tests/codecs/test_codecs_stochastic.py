"""Stochastic rounding: to a neighbour, right on average, and by place alone."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from shardmerge.codecs.stochastic import encode_into
from shardmerge.spec.tensors import RowRange
from tests.support.peft_oracle import random

NARROW = [torch.bfloat16, torch.float16, torch.float32]
WIDE = [torch.float32, torch.float64]
PAIRS = pytest.mark.parametrize(
    ("dtype", "wide"),
    [pytest.param(to, of, id=f"{of}-{to}") for to in NARROW for of in WIDE if to.itemsize < of.itemsize],
)
#: Whole numbers of as many bits.
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def rounded(value: Tensor, dtype: torch.dtype, seed: int = 0, name: str = "w", start: int = 0) -> Tensor:
    target = torch.empty(value.shape, dtype=dtype)
    encode_into(target, value, seed, name, RowRange(start, start + len(value)))
    return target


def neighbours(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of ``dtype`` that is not above, and the least that is not below."""
    nearest = value.to(dtype)
    below = torch.where(nearest.double() > value.double(), _step(nearest, -1), nearest)
    above = torch.where(nearest.double() < value.double(), _step(nearest, 1), nearest)
    return below, above


def _step(number: Tensor, direction: int) -> Tensor:
    towards = torch.full_like(number, direction * math.inf, dtype=torch.float32)
    if number.dtype != torch.float16:
        return torch.nextafter(number, towards.to(number.dtype))
    ordered = number.view(torch.int16).to(torch.int32)
    ordered = torch.where(ordered < 0, -(ordered & 0x7FFF), ordered) + direction
    return torch.where(ordered < 0, -ordered - 0x8000, ordered).to(torch.int16).view(number.dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-40, 60000.0])
@PAIRS
def test_every_value_goes_to_one_of_its_neighbours(dtype: torch.dtype, wide: torch.dtype, scale: float) -> None:
    value = random(40, 301, seed=1).to(wide).clamp(-1, 1) * scale
    found = rounded(value, dtype)
    below, above = neighbours(value, dtype)
    assert bool(((found == below) | (found == above)).all())
    if scale == 1.0:
        assert int((found == below).sum()) > 0 and int((found == above).sum()) > 0


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("start", [1.0, -1.0, 0.0, 1.9921875, 3e-39])
@PAIRS
def test_the_mean_is_the_value(dtype: torch.dtype, wide: torch.dtype, start: float, share: float) -> None:
    first = torch.tensor([start], dtype=wide).to(dtype)
    second = _step(first, 1)
    value = first.to(wide) + share * (second.to(wide) - first.to(wide))
    count = 1 << 17
    found = rounded(value.expand(128, count // 128).contiguous(), dtype)
    went_up = float((found == second).double().mean())
    # Where the wide dtype has few bits left, what it says is what is meant.
    exact = float((value.double() - first.double()) / (second.double() - first.double()))
    assert abs(went_up - exact) < 5 * math.sqrt(0.25 / count)


@PAIRS
def test_what_is_exact_stays(dtype: torch.dtype, wide: torch.dtype) -> None:
    value = random(64, 64, seed=2).to(dtype)
    special = torch.tensor([[0.0, -0.0, math.inf, -math.inf, float(torch.finfo(dtype).max), 1.0]], dtype=dtype)
    for exact in (value, special):
        assert torch.equal(rounded(exact.to(wide), dtype).view(BITS[dtype]), exact.view(BITS[dtype]))
    assert bool(rounded(torch.tensor([[math.nan, 1.0]], dtype=wide), dtype).isnan()[0, 0])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_chance_goes_by_place_and_not_by_tile(dtype: torch.dtype) -> None:
    value = random(100, 777, seed=3)
    value = value.double() * (1 + 2.0**-26) if dtype == torch.float32 else value
    whole = rounded(value, dtype)
    for tile in (1, 7, 33):
        parts = [rounded(value[row : row + tile], dtype, start=row) for row in range(0, 100, tile)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(rounded(value, dtype, seed=1), whole)
    assert not torch.equal(rounded(value, dtype, name="v"), whole)
    assert not torch.equal(rounded(value, dtype, start=1), whole)


def test_places_beyond_32_bits_differ() -> None:
    value = torch.full((1, 4096), 1.001)
    starts = (0, 1 << 31, 1 << 32, 1 << 40)
    found = [rounded(value, torch.bfloat16, start=start) for start in starts]
    assert all(not torch.equal(one, other) for number, one in enumerate(found) for other in found[:number])


def test_the_hash_is_what_it_was() -> None:
    """The same seed gives the same bytes, on every machine and with every version: the hash, in plain integers."""

    def mix(number: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            number = (number ^ number >> shift) * factor & 0xFFFFFFFF
        return number

    key = int.from_bytes(hashlib.blake2b(b"7:model.weight", digest_size=4).digest(), "little")
    value = random(5, 301, seed=4)
    found = rounded(value, torch.bfloat16, seed=7, name="model.weight", start=3)
    bits = value.view(torch.int32).tolist()
    for row in range(5):
        of_row = mix(mix(row + 3 ^ key))
        for column in range(301):
            chance = mix(of_row ^ column * 0x9E3779B9 & 0xFFFFFFFF) & 0xFFFF
            expected = ((bits[row][column] & 0xFFFFFFFF) + chance) >> 16
            assert int(found[row, column].view(torch.int16)) & 0xFFFF == expected
