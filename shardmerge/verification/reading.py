"""Read files into tensors with plain reads, without the engine's direct I/O, tiles and cache of factors.

Floats are widened to float64, integers to int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardmerge.codecs.rounding import NUMBER_DTYPES
from shardmerge.sources.source import OpenReaders
from shardmerge.spec.tensors import DTYPE_BITS, Encoding, RowRange, TensorRef

#: Bytes that are read at a time.
CHUNK = 4 << 20


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's threads in the block. With one, small operations do not wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Files(OpenReaders):
    """The files of the base, the adapters and the output, opened when they are first read."""

    def read(self, uri: str, offset: int, size: int) -> bytearray:
        """``size`` bytes of a file. `SourceError` if it ends before that."""
        data = bytearray(size)
        self.get(uri).read_into(offset, memoryview(data))
        return data

    def rows(self, ref: TensorRef, rows: RowRange, row_elements: int) -> Tensor:
        """Rows of a dense tensor viewed as (…, row_elements), in its own dtype."""
        row = row_elements * DTYPE_BITS[ref.dtype] // 8
        return decode(self.read(ref.uri, ref.offset + rows.start * row, len(rows) * row), ref.dtype, row_elements)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in a file, by its parts. ``columns`` is the weight's row length, whatever shape the file states."""

    values: TensorRef
    columns: int
    encoding: Encoding | None = None
    parts: Mapping[str, TensorRef] = field(default_factory=dict)


#: Decodes rows of a weight to float64, (rows, columns).
Decoder = Callable[[Files, StoredWeight, RowRange], Tensor]


def decode(data: bytearray, dtype: str, row_elements: int) -> Tensor:
    """View bytes as (rows, row_elements) of ``dtype``."""
    if not data:
        return torch.empty(0, row_elements, dtype=NUMBER_DTYPES[dtype])
    return torch.frombuffer(data, dtype=NUMBER_DTYPES[dtype]).view(-1, row_elements)


def wide(values: Tensor) -> Tensor:
    """Widen floats to float64, and integers to int64."""
    return values.to(torch.float64 if values.dtype.is_floating_point else torch.int64)


class Factor:
    """One factor of an update, read whole, by rows or by columns."""

    #: A factor of up to so many bytes is read once and kept.
    _KEPT = 4 << 20

    def __init__(self, files: Files, ref: TensorRef) -> None:
        self.ref = ref
        self._files = files
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        if self._whole is None:
            self._whole = wide(self._as_stored()).contiguous()
        return self._whole

    def rows(self, rows: RowRange) -> Tensor:
        ref = self.ref
        if self._whole is not None or ref.strides is not None or ref.nbytes <= self._KEPT:
            return self.whole()[rows.start : rows.stop]
        width = math.prod(ref.shape[1:])
        return wide(self._files.rows(ref, rows, width)).view(len(rows), *ref.shape[1:])

    def columns(self, columns: RowRange) -> Tensor:
        """Columns of a matrix; those of a large one are read row by row."""
        ref = self.ref
        height, width = ref.shape[0], math.prod(ref.shape[1:])
        if self._whole is not None or ref.strides is not None or ref.nbytes <= self._KEPT or len(columns) == width:
            return self.whole().reshape(height, width)[:, columns.start : columns.stop]
        size = DTYPE_BITS[ref.dtype] // 8
        part = len(columns) * size
        data = bytearray(height * part)
        view = memoryview(data)
        for row in range(height):
            offset = ref.offset + (row * width + columns.start) * size
            self._files.get(ref.uri).read_into(offset, view[row * part : (row + 1) * part])
        return wide(decode(data, ref.dtype, len(columns)))

    def _as_stored(self) -> Tensor:
        ref = self.ref
        flat = torch.frombuffer(self._files.read(ref.uri, ref.offset, ref.nbytes), dtype=NUMBER_DTYPES[ref.dtype])
        return flat.view(ref.shape) if ref.strides is None else flat.as_strided(ref.shape, ref.strides)
