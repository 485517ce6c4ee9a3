"""Factors of the target at hand, read when they are first asked for.

An adapter of rank 256 of a large model weighs gigabytes; of it, only the factors of one target are in memory, and of
those that go by rows only the rows of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shardmerge.adapters import FAMILIES
from shardmerge.codecs import TORCH_DTYPES
from shardmerge.errors import NonFiniteError
from shardmerge.sources import Reader
from shardmerge.spec import ALIGNMENT, DTYPE_BITS, RowRange, TensorRef, Update


class LazyFactors:
    """Reads factors and keeps the whole ones of the current target."""

    def __init__(self, reader: Callable[[str], Reader], device: torch.device) -> None:
        self._reader = reader
        self._dtype = torch.float32
        self._device = device
        self._target = ""
        self._kept: dict[TensorRef, Tensor] = {}
        #: Adapters, by number, that have had an effect in this shard.
        self.active: set[int] = set()

    def begin_shard(self) -> None:
        self.active.clear()

    def of(self, update: Update, dtype: torch.dtype = torch.float32) -> UpdateFactors:
        """The factors of one update, in ``dtype``. A new target drops what was kept for the one before."""
        if update.target != self._target:
            self._kept.clear()
            self._target = update.target
        self._dtype = dtype
        return UpdateFactors(self, update)

    def whole(self, ref: TensorRef) -> Tensor:
        """A factor in the compute dtype, kept until the target changes."""
        if (kept := self._kept.get(ref)) is None:
            kept = self._kept[ref] = self._ready(ref, self._read(ref, RowRange(0, ref.shape[0])), 0)
        return kept

    def rows(self, ref: TensorRef, rows: RowRange) -> Tensor:
        """Rows of a factor in the compute dtype. Where they lie apart in the file, the file's bytes are kept whole."""
        if ref.strides is None:
            return self._ready(ref, self._read(ref, rows), rows.start)
        if (stored := self._kept.get(ref)) is None:
            stored = self._kept[ref] = self._read(ref, RowRange(0, ref.shape[0]))
        return self._ready(ref, stored[rows.start : rows.stop], rows.start)

    def _ready(self, ref: TensorRef, stored: Tensor, first_row: int) -> Tensor:
        wrong = ~torch.isfinite(stored)
        if bool(wrong.any()):
            index = wrong.nonzero()[0].tolist()
            value = float(stored[tuple(index)])
            index[0] += first_row
            if ref.is_transposed:
                index.reverse()
            raise NonFiniteError(f"{ref.uri}: {ref.name} holds {value} at {index}; the merge was stopped")
        return stored.to(device=self._device, dtype=self._dtype).contiguous()

    def _read(self, ref: TensorRef, rows: RowRange) -> Tensor:
        row = math.prod(ref.shape[1:]) * DTYPE_BITS[ref.dtype] // 8
        offset, size = ref.offset + rows.start * row, len(rows) * row
        if ref.strides is not None:
            offset, size = ref.offset, ref.nbytes
        memory = bytearray(size + ALIGNMENT)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % ALIGNMENT
        self._reader(ref.uri).read_into(offset, memoryview(memory)[start : start + size])
        dtype = TORCH_DTYPES[ref.dtype]
        flat = torch.frombuffer(memory, dtype=dtype, offset=start, count=size // dtype.itemsize)
        shape = (len(rows), *ref.shape[1:])
        return flat.view(shape) if ref.strides is None else flat.as_strided(shape, ref.strides)


class UpdateFactors:
    """The factors of one update, by role; what a family's ``apply`` is given."""

    def __init__(self, loader: LazyFactors, update: Update) -> None:
        self._loader = loader
        self._update = update

    def whole(self, role: str) -> Tensor:
        return self._loader.whole(self._update.factor(role))

    def rows(self, role: str, rows: RowRange) -> Tensor:
        factor = self._loader.rows(self._update.factor(role), rows)
        if role in FAMILIES[self._update.family].zero_means_nothing and bool(factor.any()):
            self._loader.active.add(self._update.adapter)
        return factor
