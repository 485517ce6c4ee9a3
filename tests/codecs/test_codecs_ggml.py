"""Bytes of every type against those of the ``gguf`` package, which are those of llama.cpp's converter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardmerge.codecs import ggml_blocks
from shardmerge.codecs.ggml import BLOCKS, nbytes, overflow_limit
from shardmerge.codecs.ggml_blocks import quantize_into
from tests.support.builders import untimed

TYPES = list(BLOCKS)
OF_BLOCKS = [kind for kind, (block, _) in BLOCKS.items() if block > 1]
#: They keep the least of a block; of two zeros numpy's least is now this one and now that.
SIGNLESS = ("Q4_1", "Q5_1")


def ours(tile: Tensor, kind: str) -> bytes:
    out = torch.full((nbytes(kind, tuple(tile.shape)),), 0xA5, dtype=torch.uint8)
    quantize_into(out, tile, kind)
    return out.numpy().tobytes()


def theirs(tile: Tensor, kind: str) -> bytes:
    with np.errstate(all="ignore"):
        return bytes(quants.quantize(tile.numpy(), GGMLQuantizationType[kind]).tobytes())


def _back(data: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        values: np.ndarray[Any, Any] = quants.dequantize(data.reshape(1, -1), GGMLQuantizationType[kind])
    return values


def numbers(name: str, rows: int = 40, columns: int = 96, seed: int = 0) -> Tensor:
    """Tiles of a kind, float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    uniform = torch.rand(rows, columns, generator=generator)
    return {
        "normal": normal * 0.02,
        "bfloat16": (normal * 0.02).bfloat16().float(),  # ties: two of one magnitude, halves
        "float16": (normal * 0.02).half().float(),
        "integers": (normal * 40).round(),
        "halves": (normal * 40).round() / 2,
        "few values": normal.sign() * (uniform > 0.5),
        "one sign": uniform + 0.5,
        "other sign": -uniform - 0.5,
        "zeros": torch.zeros(rows, columns),
        "negative zeros": -torch.zeros(rows, columns),
        "zeros and one": (torch.arange(columns).expand(rows, columns) % 32 == 7).float() * normal,
        "constant": torch.full((rows, columns), -0.37),
        "outliers": normal * torch.where(uniform > 0.98, 1e4, 1e-3),
        "large": normal * 1e4,
        "too large for d": normal * 1e8,
        "small": normal * 1e-6,
        "d vanishes in float16": normal * 1e-8,
        "subnormal": normal * 1e-41,
        "1 / d overflows": normal * 1e-38,
        "smallest": normal.sign() * 2.0**-149,
    }[name]


NUMBERS = [
    "normal",
    "bfloat16",
    "float16",
    "integers",
    "halves",
    "few values",
    "one sign",
    "other sign",
    "zeros",
    "negative zeros",
    "zeros and one",
    "constant",
    "outliers",
    "large",
    "too large for d",
    "small",
    "d vanishes in float16",
    "subnormal",
    "1 / d overflows",
    "smallest",
]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", NUMBERS)
def test_bytes_are_those_of_gguf(kind: str, name: str) -> None:
    for seed in range(3):
        tile = numbers(name, seed=seed)
        if kind in SIGNLESS:
            tile = tile + 0.0
        assert ours(tile, kind) == theirs(tile, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_many_random_numbers(kind: str) -> None:
    for seed, scale in enumerate((0.02, 1.0, 30.0)):
        tile = numbers("normal", 300, 512, seed) * (scale / 0.02)
        assert ours(tile, kind) == theirs(tile, kind)
        assert ours(tile.bfloat16().float(), kind) == theirs(tile.bfloat16().float(), kind)


@pytest.mark.parametrize("kind", OF_BLOCKS)
@untimed
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_any_finite_block(kind: str, block: list[float]) -> None:
    tile = torch.tensor([block], dtype=torch.float32)
    if kind in SIGNLESS:
        tile = tile + 0.0
    assert ours(tile, kind) == theirs(tile, kind)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@untimed
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_any_plain_number(kind: str, row: list[float]) -> None:
    tile = torch.tensor([row], dtype=torch.float32)
    assert ours(tile, kind) == theirs(tile, kind)


def test_halves_are_rounded_away_from_zero_and_what_is_just_below_them_is_not() -> None:
    below = np.nextafter(np.float32(0.5), np.float32(0))
    row = [127.0, 0.5, -0.5, 1.5, -1.5, float(below), -float(below), 2.5, 126.5] + [0.0] * 23
    tile = torch.tensor([row])
    data = np.frombuffer(ours(tile, "Q8_0"), np.uint8)[2:].view(np.int8)
    assert data[:9].tolist() == [127, 1, -1, 2, -2, 0, 0, 3, 127]
    assert ours(tile, "Q8_0") == theirs(tile, "Q8_0")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(1, 32), (1, 4096), (33, 32), (5, 160), (300, 64)])
def test_slabs_are_all_the_same(kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tile = numbers("bfloat16", *shape)
    whole = ours(tile, kind)
    for slab in (32, 96, 1000):
        monkeypatch.setattr(ggml_blocks, "_SLAB", slab)
        assert ours(tile, kind) == whole == theirs(tile, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_tiles_may_be_views_and_of_16_bits(kind: str) -> None:
    tile = numbers("bfloat16", 64, 64).bfloat16()
    assert ours(tile.T, kind) == theirs(tile.T.float().contiguous(), kind)
    assert ours(tile[3:40], kind) == theirs(tile[3:40].float(), kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["bfloat16", "few values"])
def test_scratch_that_is_brought_holds_anything(kind: str, name: str) -> None:
    tile = numbers(name, 300, 64)
    out = torch.empty(nbytes(kind, (300, 64)), dtype=torch.uint8)
    quantize_into(out, tile.clone(), kind, torch.full((300, 64), float("nan")))
    assert out.numpy().tobytes() == ours(tile, kind) == theirs(tile, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_no_rows(kind: str) -> None:
    assert ours(torch.empty(0, 64), kind) == b""


def test_a_buffer_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="Q8_0 of 2 × 32 takes 68 bytes, not 67"):
        quantize_into(torch.empty(67, dtype=torch.uint8), torch.zeros(2, 32), "Q8_0")
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_into(torch.empty(67, dtype=torch.uint8), torch.zeros(2, 33), "Q8_0")


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "F32"])
def test_below_the_limit_nothing_overflows(kind: str) -> None:
    limit = torch.tensor(overflow_limit(kind), dtype=torch.float64)
    fits = torch.zeros(1, 32)
    fits[0, 3] = torch.nextafter(limit.float(), torch.tensor(0.0)) if limit == limit.float() else limit.float()
    data = np.frombuffer(ours(fits, kind), np.uint8)
    back = _back(data, kind)
    assert np.isfinite(back).all()
    if kind not in SIGNLESS:  # their limit is that of m, which is the least
        fits[0, 3] = limit.float()
        data = np.frombuffer(ours(fits, kind), np.uint8)
        assert not np.isfinite(_back(data, kind)).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("kind", TYPES)
def test_what_is_not_finite_does_not_look_finite(kind: str, value: float) -> None:
    tile = numbers("normal", 1, 32)
    tile[0, 5] = value
    data = np.frombuffer(ours(tile, kind), np.uint8)
    back = _back(data, kind)
    assert not np.isfinite(back).all()
