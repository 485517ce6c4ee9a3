"""Read an adapter's factors when a family first asks for them.

An adapter of rank 256 of a large model weighs gigabytes. Only the factors of the weights being merged are in memory,
and of factors that go by rows only the rows of a tile.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.rounding import NUMBER_DTYPES
from shardmerge.errors import NonFiniteError
from shardmerge.execution.devices import Device
from shardmerge.sources.source import Reader
from shardmerge.spec.tensors import ALIGNMENT, DTYPE_BITS, KEPT_WHOLE_BYTES, Orientation, RowRange, TensorRef
from shardmerge.spec.updates import Update


@dataclass(frozen=True, slots=True)
class Made:
    """What a factor is converted to. ``infinite``: whether it may hold infinities."""

    dtype: torch.dtype
    infinite: bool = False


class LazyFactors:
    """Reads factors, and keeps those of the last weights that have begun."""

    def __init__(
        self, reader: Callable[[str], Reader], device: Device, shared_bytes: int = 0, targets: int = 1
    ) -> None:
        """``targets``: how many weights may be merged at a time. ``shared_bytes``: the most bytes of
        factors, as stored, that are kept for later weights.
        """
        self._reader = reader
        self._shared_bytes = shared_bytes
        self._device = device
        self._kept: dict[tuple[TensorRef, torch.dtype], Tensor] = {}
        self._as_stored: dict[TensorRef, Tensor] = {}
        #: What each of these weights needs: factors in a dtype, and factors or parts as they are stored.
        self._wanted: deque[set[tuple[TensorRef, torch.dtype]]] = deque(maxlen=targets)
        self._needed: deque[set[TensorRef]] = deque(maxlen=targets)
        self._threads = torch.get_num_threads()
        #: Held while something is read or built.
        self.lock = threading.RLock()
        #: Adapters, by number, that have had an effect since this was last cleared.
        self.active: set[int] = set()

    def begin(
        self, updates: Sequence[Update], dtypes: Sequence[torch.dtype], parts: Sequence[TensorRef] = ()
    ) -> Mapping[int, UpdateFactors]:
        """Begin another weight. Returns the factors of each update, by its id, in the update's dtype.

        ``parts`` are the weight's own parts beside its values. What the last weights still need is kept: experts that
        the base stores one by one share their adapter's factors.
        """
        with self.lock:
            wanted = {(ref, dtype) for update, dtype in zip(updates, dtypes, strict=True) for _, ref in update.factors}
            self._wanted.append(wanted)
            self._needed.append({*(ref for ref, _ in wanted), *parts})
            wanted, needed = set().union(*self._wanted), set().union(*self._needed)
            for key in [key for key in self._kept if key not in wanted]:
                del self._kept[key]
            room = self._shared_bytes
            for ref in [ref for ref in reversed(self._as_stored) if ref not in needed]:  # the newest first
                room -= ref.nbytes
                if room < 0:
                    del self._as_stored[ref]
        return {id(update): UpdateFactors(self, update, dtype) for update, dtype in zip(updates, dtypes, strict=True)}

    def whole(self, ref: TensorRef, made: Made) -> Tensor:
        """A factor, kept while a weight needs it."""
        if (kept := self._kept.get((ref, made.dtype))) is None:
            kept = self._ready(ref, self._read(ref, RowRange(0, ref.shape[0])), made)
            self._kept[ref, made.dtype] = kept
            self._device.synchronize()
        return kept

    def as_stored(self, ref: TensorRef) -> Tensor:
        """A factor in the dtype of its file and on the CPU, kept while a weight needs it."""
        if (kept := self._as_stored.get(ref)) is None:
            kept = self._stored(ref)
            self._check(ref, kept)
        return kept

    def rows(self, ref: TensorRef, rows: RowRange, made: Made) -> Tensor:
        """Rows of a factor. Where they are not contiguous in the file, the factor's bytes are kept."""
        if ref.strides is None:
            return self._ready(ref, self._read(ref, rows), made, (rows.start,))
        return self._ready(ref, self._stored(ref)[rows.start : rows.stop], made, (rows.start,))

    def part(self, ref: TensorRef, rows: RowRange) -> Tensor:
        """Rows of a part of the base's weight, in the dtype of its file. Of a small part all bytes are kept."""
        with self.lock:
            if ref.nbytes <= KEPT_WHOLE_BYTES:
                stored = self._stored(ref)[rows.start : rows.stop]
            else:
                stored = self._read(ref, rows)
        if stored.dtype.is_floating_point:
            self._check(ref, stored, (rows.start,))
        return stored.to(self._device.device)

    def columns(self, ref: TensorRef, columns: RowRange, made: Made) -> Tensor:
        """Columns of a matrix. Of a small one, or one that is stored transposed, all bytes are kept."""
        first = (0, columns.start)
        if ref.strides is not None or ref.nbytes <= KEPT_WHOLE_BYTES:
            return self._ready(ref, self._stored(ref)[:, columns.start : columns.stop], made, first)
        if columns == RowRange(0, ref.shape[1]):
            return self._ready(ref, self._read(ref, RowRange(0, ref.shape[0])), made, first)
        return self._ready(ref, self._read_columns(ref, columns), made, first)

    def built(self, build: Callable[[], Tensor]) -> Tensor:
        """Call ``build`` with torch's default number of threads, as PEFT does: a decomposition's bits depend on it."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return build()
        finally:
            torch.set_num_threads(threads)
            self._device.synchronize()

    def _stored(self, ref: TensorRef) -> Tensor:
        if (stored := self._as_stored.get(ref)) is None:
            stored = self._as_stored[ref] = self._read(ref, RowRange(0, ref.shape[0]))
        return stored

    def _ready(self, ref: TensorRef, stored: Tensor, made: Made, first: tuple[int, ...] = ()) -> Tensor:
        device, dtype = self._device.device, made.dtype
        if not stored.dtype.is_floating_point:
            return stored.to(device).to(torch.int64).contiguous()
        self._check(ref, stored, first, made.infinite)
        if device.type != "cpu" or stored.numel() * dtype.itemsize <= KEPT_WHOLE_BYTES:
            return stored.to(device).to(dtype).contiguous()
        memory, _, start = _memory(stored.numel() * dtype.itemsize)
        ready = torch.frombuffer(memory, dtype=dtype, offset=start, count=stored.numel()).view(stored.shape)
        return ready.copy_(stored)

    def _check(self, ref: TensorRef, stored: Tensor, first: tuple[int, ...] = (), infinite: bool = False) -> None:
        """Raise `NonFiniteError` for NaN, and for an infinity unless it may be ``infinite``.

        ``first`` is the index in the factor at which ``stored`` begins.
        """
        # The least and the largest value show it; a mask of all values would take memory.
        if not stored.numel():
            return
        if stored.dtype.itemsize == 1:  # torch compares no float8
            stored = stored.float()
        bounds = [float(bound) for bound in torch.aminmax(stored)]
        if any(map(math.isnan, bounds)) or not (infinite or all(map(math.isfinite, bounds))):
            wrong = torch.isnan(stored) if infinite else ~torch.isfinite(stored)
            index = wrong.nonzero()[0].tolist()
            value = float(stored[tuple(index)])
            index = [at + (first[axis] if axis < len(first) else 0) for axis, at in enumerate(index)]
            if ref.orientation is Orientation.TRANSPOSED:
                index.reverse()
            raise NonFiniteError(f"{ref.uri}: {ref.name} holds {value} at {index}; the merge was stopped")

    def _read(self, ref: TensorRef, rows: RowRange) -> Tensor:
        row = math.prod(ref.shape[1:]) * DTYPE_BITS[ref.dtype] // 8
        offset, size = ref.offset + rows.start * row, len(rows) * row
        if ref.strides is not None:
            offset, size = ref.offset, ref.nbytes
        memory, view, start = _memory(size)
        self._reader(ref.uri).read_into(offset, view)
        dtype = NUMBER_DTYPES[ref.dtype]
        flat = torch.frombuffer(memory, dtype=dtype, offset=start, count=size // dtype.itemsize)
        shape = (len(rows), *ref.shape[1:])
        return flat.view(shape) if ref.strides is None else flat.as_strided(shape, ref.strides)

    def _read_columns(self, ref: TensorRef, columns: RowRange) -> Tensor:
        height, width = ref.shape
        dtype = NUMBER_DTYPES[ref.dtype]
        part = len(columns) * dtype.itemsize
        memory, view, start = _memory(height * part)
        reader = self._reader(ref.uri)
        for row in range(height):
            offset = ref.offset + (row * width + columns.start) * dtype.itemsize
            reader.read_into(offset, view[row * part : (row + 1) * part])
        flat = torch.frombuffer(memory, dtype=dtype, offset=start, count=height * len(columns))
        return flat.view(height, len(columns))


def _memory(size: int) -> tuple[bytearray | mmap.mmap, memoryview, int]:
    """``size`` aligned bytes: the memory, a view of the bytes, and their offset in the memory.

    Large memory is mapped, so that it goes back to the system at once; malloc would keep pieces of it.
    """
    if size > KEPT_WHOLE_BYTES:
        pages = mmap.mmap(-1, size)
        return pages, memoryview(pages), 0
    memory = bytearray(size + ALIGNMENT)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % ALIGNMENT
    return memory, memoryview(memory)[start : start + size], start


class UpdateFactors:
    """The factors of one update, by role; see `shardmerge.adapters.methods.base.Factors`."""

    def __init__(self, loader: LazyFactors, update: Update, dtype: torch.dtype) -> None:
        self._loader = loader
        self._update = update
        # An infinity that is copied may be the base's own; `nonfinite` compares them.
        self._made = Made(dtype, infinite=not FAMILIES[update.family].computes)
        self._wholes: dict[str, Tensor] = {}
        self._built: dict[str, Tensor] = {}

    def whole(self, role: str) -> Tensor:
        # Every tile calls this, so it takes no lock and hashes no `TensorRef`.
        if (found := self._wholes.get(role)) is None:
            with self._loader.lock:
                found = self._wholes[role] = self._seen(role, self._loader.whole(self._update.factor(role), self._made))
        return found

    def as_stored(self, role: str) -> Tensor:
        with self._loader.lock:
            return self._seen(role, self._loader.as_stored(self._update.factor(role)))

    def rows(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a factor. A small factor is kept whole."""
        ref, shuffle = self._update.factor(role), self._update.region.shuffle
        if shuffle is not None:
            return self.whole(role)[self._shuffled(shuffle, rows)]
        if ref.nbytes <= KEPT_WHOLE_BYTES:
            part = self.whole(role)[rows.start : rows.stop]
            return part if part.data_ptr() % ALIGNMENT == 0 else part.clone()
        with self._loader.lock:
            return self._seen(role, self._loader.rows(ref, rows, self._made))

    def columns(self, role: str, columns: RowRange) -> Tensor:
        with self._loader.lock:
            return self._seen(role, self._loader.columns(self._update.factor(role), columns, self._made))

    def kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        with self._loader.lock:
            if (kept := self._built.get(name)) is None:
                kept = self._built[name] = self._loader.built(build)
            return kept

    def _shuffled(self, shuffle: tuple[int, int, int], rows: RowRange) -> Tensor:
        """The matrix's rows for stored rows, both counted from the region's start."""
        start = self._update.region.start
        _, outer, inner = shuffle
        stored = torch.arange(rows.start - start, rows.stop - start)
        group, rest = stored // (outer * inner), stored % (outer * inner)
        return start + group * outer * inner + rest % inner * outer + rest // inner

    def _seen(self, role: str, factor: Tensor) -> Tensor:
        active, adapter = self._loader.active, self._update.adapter
        shows = role in FAMILIES[self._update.family].neutral_if_zero
        if adapter not in active and shows and bool(factor.any()):
            active.add(adapter)
        return factor
