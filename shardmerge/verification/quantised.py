"""Second decoders of quantised weights: from the formats' definitions, by table and in float64, without the codecs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shardmerge.spec.tensors import RowRange, TensorRef
from shardmerge.verification.reading import Decoder, Files, StoredWeight


def _e4m3(code: int) -> float:
    """Sign, four bits of exponent with bias 7, three of fraction; no infinity, and one NaN of each sign."""
    exponent, fraction = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    magnitude = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
    return math.copysign(magnitude, -1.0 if code & 128 else 1.0)


_E4M3 = torch.tensor([_e4m3(code) for code in range(256)], dtype=torch.float64)
_E8M0 = torch.tensor([*(math.ldexp(1, code - 127) for code in range(255)), math.nan], dtype=torch.float64)
_TABLES = {"F8_E4M3": _E4M3, "F8_E8M0": _E8M0}


def byte_rows(files: Files, ref: TensorRef, first: int, count: int, each: int) -> Tensor:
    """``count`` rows of ``each`` bytes."""
    data = files.read(ref.uri, ref.offset + first * each, count * each)
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, each)


def scales_of(files: Files, ref: TensorRef, first: int, count: int) -> Tensor:
    """Rows of a grid of scales, in float64."""
    width = math.prod(ref.shape[1:])
    if ref.dtype in _TABLES:
        return _TABLES[ref.dtype][byte_rows(files, ref, first, count, width).long()]
    return files.rows(ref, RowRange(first, first + count), width).double()


def float32(exact: Tensor) -> Tensor:
    """float64 rounded once to float32."""
    return exact.float().double()


def fp8(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """float32(q · scale), with the scale of the block that row and column are in."""
    assert stored.encoding is not None
    (high, wide), height = stored.encoding.setting("block"), stored.encoding.setting("height")
    codes = byte_rows(files, stored.values, rows.start, len(rows), stored.columns).long()
    lines = [row // height * math.ceil(height / high) + row % height // high for row in range(rows.start, rows.stop)]
    grid = scales_of(files, stored.parts["scale"], lines[0], lines[-1] - lines[0] + 1)
    columns = torch.arange(stored.columns) // wide
    return float32(_E4M3[codes] * grid[[line - lines[0] for line in lines]][:, columns])


QUANTISED: Mapping[str, Decoder] = {"fp8": fp8}
