"""Rounding through NF4 gives what bitsandbytes stores and reads again, bit for bit."""

from __future__ import annotations

import pytest
import torch

from shardmerge.adapters.methods.nf4_rounding import dynamic_table
from tests.support import quantised_bnb
from tests.support.base_roundings import DTYPES, rounded, update_of
from tests.support.method_cases import Given, Subject
from tests.support.peft_oracle import bits, random

SHAPES = ((320, 128), (64, 1024), (96, 80), (7, 33), (2, 32), (1, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "nf4-single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_is_stored_and_read_again(shape: tuple[int, int], kind: str, dtype: str) -> None:
    rows = torch.logspace(-3, 1, shape[0])[:, None]
    weight = (random(*shape, seed=1, scale=0.02) * rows).to(DTYPES[dtype])
    subject = Subject(update_of(weight, kind == "nf4", dtype), weight.float())
    is_even = shape[0] % subject.family.row_unit(subject.update) == 0
    for compute in (torch.float32, torch.float64):
        found = subject.applied(Given(subject.update, compute), subject.windows(3) if is_even else subject.whole)
        assert bits(found.to(weight.dtype)) == bits(rounded(weight, kind))
        assert torch.equal(found.to(weight.dtype).to(compute), found)  # it was rounded to the weight's dtype


@pytest.mark.parametrize("kind", ["nf4", "nf4-single"])
def test_what_is_rounded_once_stays(kind: str) -> None:
    """Of single quantisation: there the largest of a block is its absmax."""
    weight = rounded(random(64, 128, seed=2), "nf4-single")
    again = rounded(weight, kind)
    assert torch.equal(again, weight) == (kind == "nf4-single")


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(32, 64)
    subject = Subject(update_of(weight, False), weight)
    assert torch.equal(subject.applied(Given(subject.update, torch.float32)), weight)


def test_the_table_of_absmax() -> None:
    assert list(dynamic_table()) == quantised_bnb.dynamic_map().tolist()
    assert len(set(dynamic_table())) == 256


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
def test_the_library_makes_the_same(double: bool, dtype: str) -> None:
    """In single quantisation bit for bit. In double its codes of 8 bits on a CPU are not always the nearest."""
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.create_dynamic_map().tolist() == list(dynamic_table())
    weight = random(512, 1024, seed=3, scale=0.02).to(DTYPES[dtype])
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    theirs = functional.dequantize_4bit(codes, state)
    subject = Subject(update_of(weight, double, dtype), weight.float())
    ours = subject.applied(Given(subject.update, torch.float32)).to(weight.dtype)
    if not double:
        assert bits(ours) == bits(theirs)
        return
    # Where the nearest code was not taken, all of a block is off.
    blocks = (ours != theirs).view(-1, 64).any(1)
    assert float(blocks.double().mean()) < 0.01
