"""Rounding: one rounding, to nearest, ties to even, from every compute dtype into every stored one."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardmerge.codecs.floats import OVERFLOW
from shardmerge.codecs.rounding import TORCH_DTYPES, encode_into, view_bytes
from tests.support.peft_oracle import bits, nearest_even

SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: Bits of the significand, with the leading one, and the exponent of the least subnormal.
FORMATS = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}
both = pytest.mark.parametrize("dtype", SIXTEEN.values(), ids=SIXTEEN)


def encoded(value: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.full(value.shape, 7.0, dtype=dtype)
    encode_into(target, value)
    return target


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rounded(value: float, dtype: torch.dtype) -> float:
    """The same in rational arithmetic, one number at a time, without a table and without torch."""
    if value == 0 or not math.isfinite(value):
        return value
    significand, least = FORMATS[dtype]
    exact = abs(Fraction(value))
    step = Fraction(2) ** max(math.frexp(value)[1] - significand, least)
    result = round(exact / step) * step  # Fraction rounds ties to even
    if result > Fraction(float(torch.finfo(dtype).max)):
        return math.copysign(math.inf, value)
    return math.copysign(float(result), value)


def neighbourhood(dtype: torch.dtype) -> Iterator[float]:
    """Around each midpoint of two numbers of ``dtype``: the tie, and what float32 would round onto it."""
    limits = torch.finfo(dtype)
    significand, least = FORMATS[dtype]
    starts = [1.0, 1.5, 2.0 - 2.0 ** (1 - significand), float(limits.max), float(limits.tiny), 3 * 2.0**least]
    starts += [2.0**least, 2.0 ** (least + 1), 255 * 2.0**least, float(limits.tiny) * (1 - 2.0 ** (1 - significand))]
    for start in starts:
        step = 2.0 ** max(math.frexp(start)[1] - significand, least)
        for number in (start, start - step):
            tie = number + step / 2
            for tiny in (0.0, 2.0**-20, 2.0**-30, 2.0**-40, 2.0**-44):
                for sign in (1, -1):
                    yield tie + sign * step * tiny
            yield math.nextafter(tie, math.inf)
            yield math.nextafter(tie, -math.inf)


# --- float64 → 16 bits ------------------------------------------------------------------------------------------------


@both
def test_ties_and_their_neighbours_are_rounded_once(dtype: torch.dtype) -> None:
    values = [sign * value for value in neighbourhood(dtype) for sign in (1, -1)]
    found = encoded(doubles(values), dtype)
    assert found.tolist() == [rounded(value, dtype) for value in values]
    assert bits(found) == bits(nearest_even(doubles(values), dtype))


@both
def test_the_ties_are_such_that_rounding_twice_would_show(dtype: torch.dtype) -> None:
    values = doubles(list(neighbourhood(dtype)))
    twice = values.to(torch.float32).to(dtype)
    assert int((twice != nearest_even(values, dtype)).sum()) >= 20


@both
def test_every_number_and_every_midpoint_of_the_dtype(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = patterns[torch.isfinite(patterns)].double()
    assert bits(encoded(numbers, dtype)) == bits(numbers.to(dtype))
    ordered = numbers.sort().values
    middles = (ordered[1:] + ordered[:-1]) / 2
    infinity = torch.full_like(middles, math.inf)
    for values in (middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)):
        assert bits(encoded(values, dtype)) == bits(nearest_even(values, dtype))


@both
@pytest.mark.parametrize(
    "value",
    [5e-324, 1e-310, 1e-100, 2.0**-150, 2.0**-149, 3 * 2.0**-151, 2.0**-134, 2.0**-25, 2.0**-25 * (1 + 2.0**-52)],
    ids=float.hex,
)
def test_what_is_tiny_goes_to_zero_or_to_the_least_subnormal(value: float, dtype: torch.dtype) -> None:
    values = doubles([value, -value])
    found = encoded(values, dtype)
    assert found.tolist() == [rounded(value, dtype), -rounded(value, dtype)]
    assert torch.signbit(found).tolist() == [False, True]


@both
def test_zeros_infinities_and_nan_stay_what_they_are(dtype: torch.dtype) -> None:
    values = doubles([0.0, -0.0, math.inf, -math.inf, math.nan, 1e308, -1e308])
    found = encoded(values, dtype)
    assert found[:4].tolist() == [0.0, 0.0, math.inf, -math.inf]
    assert torch.signbit(found[:2]).tolist() == [False, True]
    assert bool(torch.isnan(found[4]))
    assert found[5:].tolist() == [math.inf, -math.inf]


@both
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=40))
def test_any_float64_is_rounded_once(dtype: torch.dtype, values: list[float]) -> None:
    found = encoded(doubles(values), dtype)
    assert found.tolist() == [rounded(value, dtype) for value in values]


@both
@given(st.integers(-(1 << 15), (1 << 15) - 1), st.integers(-(1 << 30), 1 << 30), st.integers(10, 52))
def test_any_float64_near_a_number_of_the_dtype_is_rounded_once(
    dtype: torch.dtype, pattern: int, offset: int, depth: int
) -> None:
    number = float(torch.tensor([pattern], dtype=torch.int16).view(dtype))
    value = number + number * offset * 2.0**-depth * 2.0**-20
    if math.isfinite(value):
        assert encoded(doubles([value]), dtype).tolist() == [rounded(value, dtype)]


def test_many_random_values_at_once_keep_their_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 70, generator=generator, dtype=torch.float64) * 0.02
    for dtype in SIXTEEN.values():
        assert bits(encoded(values, dtype)) == bits(nearest_even(values, dtype))


# --- the other pairs --------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False))
def test_float64_to_float32_is_rounded_once(value: float) -> None:
    assert encoded(doubles([value]), torch.float32).tolist() == [rounded(value, torch.float32)]


@both
@given(st.floats(allow_nan=False, width=32))
def test_float32_is_rounded_once(dtype: torch.dtype, value: float) -> None:
    assert encoded(torch.tensor([value]), dtype).tolist() == [rounded(value, dtype)]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_bfloat16_is_rounded_once(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = patterns[~torch.isnan(patterns)]
    assert encoded(values, dtype).tolist() == [rounded(value, dtype) for value in values.tolist()]


@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
def test_what_was_stored_in_a_dtype_comes_back_as_the_same_bits(code: str) -> None:
    dtype = TORCH_DTYPES[code]
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (4096,), generator=generator, dtype=torch.int32).to(torch.uint8)
    stored = view_bytes(raw, code, (8, 4096 // 8 // dtype.itemsize))
    numbers = ~torch.isnan(stored)
    for wide in (torch.float32, torch.float64):
        assert torch.equal(encoded(stored.to(wide), dtype)[numbers], stored[numbers])


def test_view_bytes_shares_memory() -> None:
    raw = torch.zeros(24, dtype=torch.uint8)
    view_bytes(raw, "F32", (2, 3))[1, 2] = struct.unpack("<f", b"\x01\x02\x03\x04")[0]
    assert raw[20:].tolist() == [1, 2, 3, 4]


# --- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
def test_the_overflow_limit_is_the_least_magnitude_that_becomes_infinite(code: str) -> None:
    dtype, limit = TORCH_DTYPES[code], OVERFLOW[code]
    below = math.nextafter(limit, 0.0)
    found = encoded(doubles([below, limit, -below, -limit]), dtype).tolist()
    largest = float(torch.finfo(dtype).max)
    assert found == [largest, math.inf, -largest, -math.inf]


@pytest.mark.parametrize(
    ("code", "limit"),
    [("F16", 65520.0), ("BF16", 2.0**128 - 2.0**119), ("F32", 2.0**128 - 2.0**103)],
    ids=["F16", "BF16", "F32"],
)
def test_the_overflow_limits_are_these(code: str, limit: float) -> None:
    assert OVERFLOW[code] == limit
