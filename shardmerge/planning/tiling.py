"""Rows → tiles, and how much memory the work takes.

Why tiles are even, and never below 16 rows where the tensor has them: a matrix product of few rows goes through another
kernel than a product of many, and rounds differently. Even tiles of 16 rows and more give the bits of the whole. Not so
where W has one column, since that is a matrix-vector product; such tensors are small, and stay whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import decoded_dtype, dtype_for, narrow_dtype, needs_work, tile_dtype
from shardmerge.codecs.registry import decoder, encoder
from shardmerge.errors import PlanError, ShardmergeError
from shardmerge.spec.plans import MemoryPlan, ShardPlan, TensorPlan
from shardmerge.spec.tensors import (
    ALIGNMENT,
    DTYPE_BITS,
    FACTOR_DTYPES,
    INTEGER_DTYPES,
    KEPT_WHOLE_BYTES,
    MIN_TILE_ROWS,
    PAGE,
    RowRange,
    TensorRef,
    aligned,
)
from shardmerge.spec.updates import Update
from shardmerge.spec.windows import boundaries, locate
from shardmerge.system.limits import cores

#: Buffers in flight: read, waiting, computed, waiting, written, and one to spare.
BUFFERS = 6
#: Threads that compute, where there are cores for them: others are added where memory is left beside the largest
#: buffers. Two keep up with a disk.
WORKERS = 2
AUTO_MEMORY = 48 << 20
#: Weights in the works at a time, where there is memory for the factors of all.
_WEIGHTS = 2
#: Bytes of a buffer, and of a tile of it. Larger buffers would not be faster, nor larger tiles: a tile of this size and
#: its float32 work space stay in a core's cache.
_SIZES = (*((1 << bits, 1 << 19) for bits in (22, 21, 20)), *((1 << bits, 1 << bits) for bits in range(19, 15, -1)))
#: Tensors that are alike in all that their tiles and their memory depend on have the same number.
Kind = int
#: What MKL copies of a factor (r, columns) before it multiplies with it, each thread by itself: so many columns, and so
#: many bytes at most. Measured.
_PANEL_COLUMNS = 3072
_PANEL_BYTES = 3 << 20
#: What products in bfloat16 take beyond `LIBRARY_BYTES`, as they are another library's, oneDNN's: once, and in each
#: thread. Measured with 1 to 6 threads.
_ONEDNN_BYTES = (4 << 20, 1 << 20)
#: Factors that are kept for a later target, at most; who shares more reads them again.
_MOST_SHARED_BYTES = 16 << 20


def itemsize(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8


def tile_all(
    shards: Iterable[ShardPlan],
    compute_dtype: str,
    max_memory: int | None,
    threads: int | None = None,
) -> tuple[tuple[ShardPlan, ...], MemoryPlan]:
    """Give every tensor that is computed its tiles.

    The largest buffers are taken with which the working set stays within ``max_memory`` bytes; then as many threads as
    there are cores and memory, unless ``threads`` says how many. Tiles do not depend on the number. Where even the
    smallest buffers need more memory, the plan needs more: `MemoryPlan.total` says how much, and the caller decides.
    """
    shards = tuple(shards)
    worked = [_workable(tensor) for shard in shards for tensor in shard.tensors if needs_work(tensor)]
    # Layers repeat: the work is done once for each kind of tensor.
    kinds_by_description: dict[tuple[object, ...], Kind] = {}
    kind_of: dict[int, Kind] = {}
    kinds: dict[Kind, TensorPlan] = {}
    for tensor in worked:
        kind = kind_of[id(tensor)] = kinds_by_description.setdefault(_described(tensor), len(kinds))
        kinds.setdefault(kind, tensor)
    neighbours = set(itertools.pairwise(kind_of.values()))
    budget = AUTO_MEMORY if max_memory is None else max_memory
    shared = min(_MOST_SHARED_BYTES, _shared_bytes(worked))
    enough = sum(shard.data_bytes for shard in shards) // (2 * BUFFERS)

    def needed(buffer_bytes: int, tile_bytes: int, workers: int, weights: int) -> MemoryPlan:
        memory = _memory(kinds, neighbours, buffer_bytes, tile_bytes, compute_dtype, workers, weights)
        return dataclasses.replace(memory, shared_bytes=shared)

    available = cores()
    count = threads or min(WORKERS, available)
    for buffer_bytes, size in _SIZES:
        if buffer_bytes > max(enough, size):
            continue  # a model that hardly fills the buffers needs only small ones
        memory = needed(buffer_bytes, size, count, _WEIGHTS)
        if memory.total > budget:
            memory = needed(buffer_bytes, size, count, 1)
        if memory.total <= budget:
            break
    if threads is None and memory.total > budget:  # one thread computes slowly, but it does
        memory = needed(buffer_bytes, size, 1, 1)
    while threads is None and memory.workers < available:
        more = needed(buffer_bytes, size, memory.workers + 1, memory.weights)
        if more.total > budget:
            break
        memory = more
    if memory.total > budget:  # what is shared can be read again
        memory = dataclasses.replace(memory, shared_bytes=max(0, shared - (memory.total - budget)))

    segments = {kind: tile_counts(tensor, size) for kind, tensor in kinds.items()}

    def tiled(tensor: TensorPlan) -> TensorPlan:
        kind = kind_of.get(id(tensor))
        return tensor if kind is None else tensor.tiled(segments[kind])

    return tuple(dataclasses.replace(shard, tensors=tuple(map(tiled, shard.tensors))) for shard in shards), memory


def _workable(tensor: TensorPlan) -> TensorPlan:
    """The tensor. That tiles cannot be made of it would be our mistake: what was matched has asked its family."""
    if decoded_dtype(tensor) not in FACTOR_DTYPES:
        raise ShardmergeError(f"{tensor.source.name} is stored as {tensor.source.dtype}, which cannot be worked on")
    return tensor


def _described(tensor: TensorPlan) -> tuple[object, ...]:
    """Everything that a tensor's tiles and memory depend on."""
    updates = tuple(map(_described_update, tensor.updates)) if tensor.updates else ()
    stored_as = (tensor.source.dtype, tensor.out.dtype, tensor.decoding, tensor.encoding)
    return (*stored_as, tensor.source.shape, tensor.part, updates)


def _described_update(update: Update) -> tuple[object, ...]:
    region, family = update.region, FAMILIES[update.family]
    where = (region.rows, region.start, region.stored_start, region.expert, region.orientation, update.orientation)
    factors = tuple([(ref.dtype, ref.shape, ref.strides) for _, ref in update.factors])
    needs = (family.row_unit(update), family.kept_bytes(update, 1))
    return (update.family, update.shape, where, factors, needs)


def row_bytes(tensor: TensorPlan) -> int:
    """Bytes of buffer that a row takes: it is read into one, and encoded into one."""
    return max(tensor.read_row, tensor.write_row)


def tile_counts(tensor: TensorPlan, buffer_bytes: int) -> tuple[tuple[int, int], ...]:
    """(rows, tiles) of every segment: even tiles, each within a buffer where the least number of rows allows it."""
    if not tensor.goes_by_rows:
        return ((tensor.rows, _count(tensor.rows, row_bytes(tensor), buffer_bytes)),)
    runs = list(itertools.pairwise(boundaries(tensor))) if tensor.rows else [(0, 0)]
    if tensor.row_elements == 1 and tensor.updates:
        return tuple((stop - start, 1) for start, stop in runs)
    together, bytes_per_row = _codec_unit(tensor), row_bytes(tensor)
    if cut := [start for start, _ in runs if (start - tensor.first_row) % together]:
        raise PlanError(
            [
                f"{tensor.source.name}: its rows from {cut[0]} on belong to another matrix, but its format stores "
                f"{together} rows together"
            ]
        )
    return tuple(
        segment
        for start, stop in runs
        for segment in _segments(stop - start, _unit(tensor, start), together, bytes_per_row, buffer_bytes)
    )


def _count(rows: int, bytes_per_row: int, buffer_bytes: int, unit: int = 1) -> int:
    wanted = math.ceil(rows / unit / max(1, buffer_bytes // max(1, bytes_per_row) // unit))
    return max(1, min(wanted, rows // MIN_TILE_ROWS, rows // unit))


def _unit(tensor: TensorPlan, row: int) -> int:
    """The rows that updates need together in the run that begins at ``row``."""
    here = RowRange(row, row + 1)
    units = ((update, FAMILIES[update.family].row_unit(update)) for update in tensor.updates if not update.by_columns)
    return math.lcm(*(unit for update, unit in units if unit > 1 and locate(tensor, update, here)))


def _codec_unit(tensor: TensorPlan) -> int:
    """The rows that the source's or the output's codec wants together."""
    codecs = ((tensor.decoding, decoder), (tensor.encoding, encoder))
    return math.lcm(*(of(tensor).row_unit(encoding) for encoding, of in codecs if encoding is not None))


def _segments(
    rows: int, of_updates: int, of_codec: int, bytes_per_row: int, buffer_bytes: int
) -> list[tuple[int, int]]:
    """A run of rows as segments whose tiles hold whole units: those with a unit more than the others come first.

    Of a codec's units the last may be short; it is in the last tile, with the unit before it.
    """
    unit = math.lcm(of_updates, of_codec)
    if unit == 1 or not rows:
        return [(rows, _count(rows, bytes_per_row, buffer_bytes))]
    rest = rows % of_codec
    if (rows - rest) % unit or rows < unit:
        return [(rows, 1)]
    tiles = _count(rows - rest, bytes_per_row, buffer_bytes, unit)
    units, longer = divmod(rows // unit, tiles)
    shorter = tiles - longer - bool(rest)
    parts = [((units + 1) * unit * longer, longer), (units * unit * shorter, shorter)]
    parts += [(units * unit + rest, 1)] if rest else []
    return [part for part in parts if part[1]]


def _shared_bytes(worked: Sequence[TensorPlan]) -> int:
    """Bytes of factors, at most, that wait in memory for the next tensor that shares them."""
    uses: dict[int, tuple[TensorRef, list[int]]] = {}  # by identity, as there are many and equal ones are the same
    for index, tensor in enumerate(worked):
        for update in tensor.updates:
            for role in FAMILIES[update.family].as_stored:
                ref = update.factor(role)
                uses.setdefault(id(ref), (ref, []))[1].append(index)
    changes: defaultdict[int, int] = defaultdict(int)
    for ref, indices in uses.values():
        for before, after in itertools.pairwise(indices):
            if after > before + 1:
                changes[before + 1] += ref.nbytes
                changes[after] -= ref.nbytes
    return max(itertools.accumulate(changes[index] for index in sorted(changes)), default=0)


def _memory(
    kinds: Mapping[Kind, TensorPlan],
    neighbours: Iterable[tuple[Kind, Kind]],
    buffer_bytes: int,
    tile_bytes: int,
    compute_dtype: str,
    workers: int,
    weights: int,
) -> MemoryPlan:
    """The memory for kinds of tensors, of which ``neighbours`` are worked on one after the other."""
    workspace = code = 0
    largest = buffer_bytes
    factors: dict[Kind, int] = {}
    for kind, tensor in kinds.items():
        rows = max(math.ceil(rows / tiles) for rows, tiles in tile_counts(tensor, tile_bytes))  # of the largest tile
        largest = max(largest, -(-rows * row_bytes(tensor) // PAGE) * PAGE)
        # A tile in the dtype of the work, and the scratch of the same size that updates and quantisers use.
        dtype, narrow = tile_dtype(tensor, compute_dtype), narrow_dtype(tensor, compute_dtype)
        codec = encoder(tensor).memory(tensor, dtype)
        tile = rows * tensor.row_elements * max(itemsize(dtype), codec.element)
        workspace = max(workspace, aligned(tile) + tile + (ALIGNMENT if narrow else 0))
        of = (
            _factor_bytes(update, rows, dtype_for(update, tensor, compute_dtype), workers) for update in tensor.updates
        )
        factors[kind] = sum(of) + _part_bytes(tensor, workers)
        once, each = _ONEDNN_BYTES if (narrow or dtype) == "BF16" else (0, 0)
        code = max(code, once + workers * (each + codec.between))
    most = max(factors.values(), default=0)
    if weights > 1:
        most = max(most, *(factors[one] + factors[other] for one, other in neighbours), 0)
    return MemoryPlan(BUFFERS, largest, workers, workspace, most, code_bytes=code, weights=weights)


def _part_bytes(tensor: TensorPlan, workers: int) -> int:
    """Bytes of small parts: those of the source, of which a few rows at most are in memory, and those being made."""
    source = sum(min(ref.nbytes, workers * KEPT_WHOLE_BYTES) for _, ref in tensor.parts)
    return source + 2 * sum(part.info.nbytes for part in tensor.made)


def _factor_bytes(update: Update, rows: int, compute_dtype: str, workers: int) -> int:
    """A factor is held as stored for a moment and in the compute dtype while it is used."""
    family = FAMILIES[update.family]
    partial = family.by_columns if update.by_columns else family.by_rows
    total = family.kept_bytes(update, itemsize(compute_dtype))
    for role, ref in update.factors:
        if role in family.streamed:
            continue
        if role in family.as_stored:
            part = math.prod(ref.shape) // max(1, update.experts)
            total += ref.nbytes + workers * part * itemsize(compute_dtype)
        elif role not in partial or (ref.nbytes <= KEPT_WHOLE_BYTES and not update.by_columns):
            panel = min(math.prod(ref.shape), _PANEL_COLUMNS * math.prod(ref.shape[:1])) * itemsize(compute_dtype)
            total += _one_factor(ref, None, compute_dtype) + workers * min(panel, _PANEL_BYTES)
        elif update.by_columns:
            part = math.prod(ref.shape[:-1]) * rows * (itemsize(compute_dtype) + itemsize(ref.dtype))
            total += workers * part + (ref.nbytes if ref.nbytes <= KEPT_WHOLE_BYTES or ref.strides is not None else 0)
        else:
            total += workers * _one_factor(ref, rows, compute_dtype)
    return total


def _one_factor(ref: TensorRef, rows: int | None, compute_dtype: str) -> int:
    elements = math.prod(ref.shape)
    if rows is not None and ref.shape:
        elements = elements // max(1, ref.shape[0]) * rows
    # Rows of a factor that is stored transposed are not contiguous, so it is read whole.
    stored = elements * itemsize(ref.dtype) if ref.strides is None else ref.nbytes
    # Whole numbers are worked with as torch has its indices.
    return elements * itemsize("I64" if ref.dtype in INTEGER_DTYPES else compute_dtype) + stored
