"""Codes → numbers by look-up: of eight bits, or of four with two in a byte.

Two values are looked up at a time, as one number of 64 bits: on one core 1.7 · 10⁹ values a second, where torch
converts 0.2 · 10⁹ from float8. Importing this module imports torch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from shardmerge.spec.tensors import even_rows

#: Values that are looked up at a time: their indices take twice as many bytes.
_SLAB = 1 << 17

#: Bits of a code → its value in float32.
E4M3 = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())
#: The same of E2M1: a sign, two bits of exponent, one of fraction.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def look_up(codes: Tensor, values: tuple[float, ...], out: Tensor) -> None:
    """Codes of eight bits (uint8: rows, columns) → ``out`` (float32, of the same shape, contiguous)."""
    for part in _slabs(out):
        here, there = codes[part].reshape(-1), out[part].view(-1)
        if len(here) % 2 == 0 and here.data_ptr() % 2 == 0:
            index = here.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
            torch.index_select(_two_bytes(values, out.device), 0, index, out=there.view(torch.float64))
        else:
            torch.index_select(_one(values, out.device), 0, here.to(torch.int32), out=there)


def look_up_halves(codes: Tensor, values: tuple[float, ...], out: Tensor, high_first: bool = False) -> None:
    """Bytes of two codes each (uint8: rows, columns / 2) → ``out`` (float32: rows, columns, contiguous)."""
    table = _two_halves(values, high_first, out.device)
    for part in _slabs(out):
        index = codes[part].reshape(-1).to(torch.int32)
        torch.index_select(table, 0, index, out=out[part].view(-1).view(torch.float64))


def nearest(values: Tensor, codes: Tensor) -> Tensor:
    """The code of each of ``values`` (float32): ``codes`` has one for each number of 16 bits as the upper half.

    What is below is rounded to odd, so that it stays on its side of a number that is half way between two codes.
    """
    bits = values.view(torch.int32)
    index = (bits & 0xFFFF).clamp_(max=1).bitwise_or_((bits >> 16).bitwise_and_(0xFFFF))
    return torch.index_select(codes, 0, index.view(-1)).view(values.shape)


def upper_halves() -> Tensor:
    """The numbers of float32 whose lower 16 bits are 0, by the upper ones."""
    return (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)


def _slabs(out: Tensor) -> list[slice]:
    pieces = -(-out.numel() // _SLAB)
    return [slice(rows.start, rows.stop) for rows in even_rows(len(out), max(1, min(pieces, len(out))))]


@lru_cache(maxsize=64)
def _one(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _two_bytes(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Two bytes, read as one number, → both values; the first is in the lower byte."""
    one = _one(values, torch.device("cpu"))
    return _pairs(one.repeat(256), one.repeat_interleave(256)).to(device)


@lru_cache(maxsize=16)
def _two_halves(values: tuple[float, ...], high_first: bool, device: torch.device) -> Tensor:
    one = _one(values, torch.device("cpu"))
    low, high = one.repeat(16), one.repeat_interleave(16)
    return (_pairs(high, low) if high_first else _pairs(low, high)).to(device)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1).contiguous().view(torch.float64).view(-1)
