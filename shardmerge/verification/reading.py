"""Bytes of files → tensors, by plain reads, without the engine's direct I/O, tiles and cache of factors.

Numbers are float64, whole numbers int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardmerge.codecs.rounding import NUMBER_DTYPES
from shardmerge.sources.open_readers import OpenReaders
from shardmerge.spec.tensors import DTYPE_BITS, Encoding, RowRange, TensorRef

#: Bytes that are read at a time.
CHUNK = 4 << 20


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch use ``count`` threads in the block. With one, small work waits for no other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Files(OpenReaders):
    """The files of the base, the adapters and the output, opened when they are first read."""

    def read(self, uri: str, offset: int, size: int) -> bytearray:
        """So many of the file's bytes. `SourceError` if it ends before."""
        data = bytearray(size)
        self.get(uri).read_into(offset, memoryview(data))
        return data

    def rows(self, ref: TensorRef, rows: RowRange, row_elements: int) -> Tensor:
        """Rows of a dense tensor seen as (…, row_elements), as stored."""
        row = row_elements * DTYPE_BITS[ref.dtype] // 8
        return decode(self.read(ref.uri, ref.offset + rows.start * row, len(rows) * row), ref.dtype, row_elements)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in a file, by its parts: the values have the weight's shape, whatever the file says."""

    values: TensorRef
    columns: int
    encoding: Encoding | None = None
    parts: Mapping[str, TensorRef] = field(default_factory=dict)


#: Rows of a weight as (rows, columns) of float64. Bytes are read by the files' `read`.
Decoder = Callable[[Files, StoredWeight, RowRange], Tensor]


def decode(data: bytearray, dtype: str, row_elements: int) -> Tensor:
    """Bytes seen as (rows, row_elements) of their own dtype; no copy."""
    if not data:
        return torch.empty(0, row_elements, dtype=NUMBER_DTYPES[dtype])
    return torch.frombuffer(data, dtype=NUMBER_DTYPES[dtype]).view(-1, row_elements)


def wide(values: Tensor) -> Tensor:
    """float64, or int64 of whole numbers."""
    return values.to(torch.float64 if values.dtype.is_floating_point else torch.int64)


class Factor:
    """One factor: all of it, or rows or columns of it."""

    #: Up to this size a factor is read once and kept, while its tensor is worked on.
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
        """Columns of a matrix; of a large one they are read row by row."""
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
