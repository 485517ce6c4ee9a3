"""Run one shard of a plan: read → decode → each update → check → encode → write.

The only room that sees both files and tensors. Tensors without an update travel as bytes, in runs; the others tile by
tile, in the compute dtype, and are rounded once.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge import pipeline
from shardmerge.adapters import FAMILIES, work_dtype
from shardmerge.codecs import TORCH_DTYPES, encode_into, overflow_limit, view_bytes
from shardmerge.errors import NonFiniteError, PlanError
from shardmerge.factors import LazyFactors, UpdateFactors
from shardmerge.pipeline import Buffer
from shardmerge.sinks import ShardWriter
from shardmerge.sources import Reader, open_reader
from shardmerge.spec import (
    BUFFER_SLACK,
    DTYPE_BITS,
    DTYPE_NAMES,
    FLOAT_DTYPES,
    PAGE,
    MergePlan,
    Receipt,
    RowRange,
    ShardPlan,
    SourceFile,
    TensorPlan,
    Update,
    Window,
    aligned,
    dtype_code,
    even_rows,
)
from shardmerge.windows import by_expert, locate

_OPEN_READERS = 8


@dataclass(frozen=True, slots=True)
class Job:
    """Bytes of one buffer: what is read from where, and what is written to where.

    ``tensor`` is None for a run of bytes that travels as it is; else ``tiles`` are the rows that are worked on at a
    time.
    """

    uri: str
    read_offset: int
    read_bytes: int
    write_offset: int
    write_bytes: int
    tensor: TensorPlan | None = None
    tiles: tuple[RowRange, ...] = ()
    #: The update, by its place among the tensor's, that only looks at the tile; nothing is written then.
    survey: int | None = None


def resolve_device(name: str) -> torch.device:
    """``auto`` is the CPU: a merge is bound by the disk, and the CPU's sums are the same everywhere.

    Raises `PlanError` if the device is not there.
    """
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise PlanError([f"compute.device is {name}, but torch {torch.__version__} finds {found} CUDA devices here"])
    return device


class ComputeThreads:
    """Who computes, put back by `close`.

    The tiles of a weight are shared out among a few threads of ours, in each of which torch computes with one thread:
    so nothing is waited for within a product, and torch's pool does not fight with the threads that read and write. The
    bits of a large product do not depend on the number of threads. Those of a small one may; so a weight of one tile
    gets the threads that torch takes by itself, as for PEFT.
    """

    def __init__(self, workers: int) -> None:
        self._default = torch.get_num_threads()
        self.workers = max(1, min(workers, _cores()))
        self._pool = ThreadPoolExecutor(
            self.workers, "shardmerge-compute", initializer=torch.set_num_threads, initargs=(1,)
        )
        # All are started now: a thread that tells torch of its one tells MKL for all threads, and must not do so later.
        together = threading.Barrier(self.workers)
        wait([self._pool.submit(together.wait) for _ in range(self.workers)])
        torch.set_num_threads(self._default)
        self._set = self._default

    def run(self, tasks: Sequence[Callable[[int], None]]) -> None:
        """Run tasks side by side, each told its number; the first error is raised when all have ended."""
        if len(tasks) == 1:
            tasks[0](0)
            return
        running = [self._pool.submit(task, number) for number, task in enumerate(tasks)]
        wait(running)
        for future in running:
            future.result()

    def set_for(self, tensor: TensorPlan) -> None:
        """How many threads torch has in the caller's thread."""
        wanted = self._default if tensor.tiles == 1 else 1
        if wanted != self._set:
            torch.set_num_threads(wanted)
            self._set = wanted

    def close(self) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._default)


def _cores() -> int:
    """Cores that this process may use, which in a container may be fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def jobs(shard: ShardPlan, buffer_bytes: int) -> Iterator[Job]:
    """A shard's work in the order of its output, each job within one buffer."""
    run: Job | None = None
    for tensor in shard.tensors:
        if tensor.tiles:
            if run:
                yield from _chunks(run, buffer_bytes)
                run = None
            yield from _blocks(tensor, buffer_bytes)
        elif tensor.source.nbytes:
            run, finished = _extend(run, tensor)
            if finished:
                yield from _chunks(finished, buffer_bytes)
    if run:
        yield from _chunks(run, buffer_bytes)


def _extend(run: Job | None, tensor: TensorPlan) -> tuple[Job, Job | None]:
    """Add a tensor to a run of bytes if it follows on both sides; else begin a new run and give back the old one."""
    source, start = tensor.source, tensor.out.data_offsets[0]
    new = Job(source.uri, source.offset, source.nbytes, start, source.nbytes)
    if run is None:
        return new, None
    follows = run.uri == new.uri and run.read_offset + run.read_bytes == new.read_offset
    if follows and run.write_offset + run.write_bytes == new.write_offset:
        size = run.read_bytes + new.read_bytes
        return Job(run.uri, run.read_offset, size, run.write_offset, size), None
    return new, run


def _chunks(run: Job, buffer_bytes: int) -> Iterator[Job]:
    for start in range(0, run.read_bytes, buffer_bytes):
        size = min(buffer_bytes, run.read_bytes - start)
        yield Job(run.uri, run.read_offset + start, size, run.write_offset + start, size)


def _blocks(tensor: TensorPlan, buffer_bytes: int) -> Iterator[Job]:
    """All tiles, as many to a job as a buffer holds.

    Before that comes a pass over them for every update that must see them all before it changes the first.
    """
    read_row = tensor.row_elements * DTYPE_BITS[tensor.source.dtype] // 8
    write_row = tensor.row_elements * DTYPE_BITS[tensor.out.dtype] // 8
    most_rows = buffer_bytes // max(1, read_row, write_row)
    surveys = [index for index, update in enumerate(tensor.updates) if FAMILIES[update.family].surveys(update)]
    for survey in (*surveys, None):
        for tiles in _grouped(tensor.ranges(), most_rows):
            start, rows = tiles[0].start, tiles[-1].stop - tiles[0].start
            yield Job(
                uri=tensor.source.uri,
                read_offset=tensor.source.offset + start * read_row,
                read_bytes=rows * read_row,
                write_offset=tensor.out.data_offsets[0] + start * write_row,
                write_bytes=rows * write_row if survey is None else 0,
                tensor=tensor,
                tiles=tiles,
                survey=survey,
            )


def _grouped(tiles: Iterable[RowRange], most_rows: int) -> Iterator[tuple[RowRange, ...]]:
    """Tiles that follow each other, in groups of up to ``most_rows`` rows."""
    group: list[RowRange] = []
    for tile in tiles:
        if group and tile.stop - group[0].start > most_rows:
            yield tuple(group)
            group = []
        group.append(tile)
    if group:
        yield tuple(group)


@dataclass(frozen=True, slots=True)
class Positions:
    """Where in a buffer a job's bytes are read to, worked to, and written from.

    Direct I/O wants bytes at the same place within a page as in the file. What is worked out is put before what is yet
    to be worked on, never over it.
    """

    read: int
    work: int
    write: int


def positions(job: Job, data_start: int) -> Positions:
    """The places of a job in a buffer; ``data_start`` is where the output file's data begins."""
    write = (data_start + job.write_offset) % PAGE
    work, item = write, 1
    if job.tensor is not None:
        item = DTYPE_BITS[job.tensor.source.dtype] // 8
        work = -(-write // 8) * 8  # a float's place is a multiple of its size
    least = work + max(0, job.write_bytes - job.read_bytes)
    read = job.read_offset % PAGE
    if read % item:
        return Positions(aligned(least), work, write)
    return Positions(read + -(-(least - read) // PAGE) * PAGE if least > read else read, work, write)


class Readers:
    """Open files of the sources, the latest few of them."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self._files = {file.uri: file for file in files}
        self._open: dict[str, Reader] = {}

    def get(self, uri: str) -> Reader:
        reader = self._open.pop(uri, None) or open_reader(self._files[uri])
        self._open[uri] = reader  # the dictionary's order is the order of use
        if len(self._open) > _OPEN_READERS:
            oldest = next(iter(self._open))
            self._open.pop(oldest).close()
        return reader

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class Engine:
    """Buffers and workspace of a merge, used for every shard in turn. Close it to give back the open files."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.device = resolve_device(plan.compute_device)
        self.dtype = dtype_code(plan.compute_dtype)
        self.buffers = [Buffer(plan.memory.buffer_bytes + BUFFER_SLACK) for _ in range(plan.memory.buffers)]
        self._raw = {id(buffer): torch.frombuffer(buffer.memory, dtype=torch.uint8) for buffer in self.buffers}
        self._threads = ComputeThreads(plan.memory.workers if self.device.type == "cpu" else 1)
        self._workspaces = [
            torch.empty(plan.memory.workspace_bytes, dtype=torch.uint8, device=self.device)
            for _ in range(self._threads.workers)
        ]
        adapter_files = [file for adapter in plan.adapters for file in adapter.files]
        # Two sets, as they are used by two threads. Whole tensors of an adapter may stand in for the base's.
        self._sources = Readers([*plan.base.files, *adapter_files])
        # Some updates are made from the base's weight, too.
        self._adapters = Readers([*plan.base.files, *adapter_files])
        self._factors = LazyFactors(self._adapters.get, self.device)
        self._experts: tuple[TensorPlan | None, list[tuple[Update, ...]]] = (None, [])

    def close(self) -> None:
        self._threads.close()
        self._sources.close()
        self._adapters.close()

    def merge_shard(self, shard: ShardPlan, writer: ShardWriter, advance: Callable[[int], None]) -> Receipt:
        """Write one shard through ``writer``, which is not committed. ``advance`` is told the bytes done."""

        start = shard.header_bytes

        def read(job: Job, buffer: Buffer) -> None:
            source = self._sources.get(job.uri)
            source.read_block(buffer.view, positions(job, start).read, job.read_offset, job.read_bytes)

        def work(job: Job, buffer: Buffer) -> None:
            at = positions(job, start)
            done = at.read
            if job.tensor is not None:
                self._merge_tiles(job, job.tensor, self._raw[id(buffer)], at)
                done = at.work
            if done != at.write and job.write_bytes:
                buffer.view[at.write : at.write + job.write_bytes] = buffer.view[done : done + job.write_bytes]

        def write(job: Job, buffer: Buffer) -> None:
            if job.write_bytes:
                writer.write_block(buffer.view, positions(job, start).write, job.write_offset, job.write_bytes)

        self._factors.begin_shard()
        pipeline.run(
            jobs(shard, self.plan.memory.buffer_bytes),
            self.buffers,
            read,
            work,
            write,
            lambda job: advance(job.write_bytes),
        )
        return Receipt(shard.name, self.plan.digest, shard.nbytes, tuple(sorted(self._factors.active)))

    def _merge_tiles(self, job: Job, tensor: TensorPlan, raw: Tensor, at: Positions) -> None:
        """Decode each tile from its buffer, update it in the workspace, and encode it into the same buffer."""
        self._threads.set_for(tensor)
        read_row = tensor.row_elements * DTYPE_BITS[tensor.source.dtype] // 8
        write_row = tensor.row_elements * DTYPE_BITS[tensor.out.dtype] // 8
        first = job.tiles[0].start

        def merge(tiles: Sequence[RowRange]) -> Callable[[int], None]:
            def task(worker: int) -> None:
                for rows in tiles:
                    read = at.read + (rows.start - first) * read_row
                    write = at.work + (rows.start - first) * write_row
                    stored = raw[read : read + len(rows) * read_row]
                    target = raw[write : write + len(rows) * write_row]
                    self._merge_tile(job, tensor, rows, stored, target, self._workspaces[worker])

            return task

        # Where output takes the very place of input, tiles are apart. A survey adds up, and so goes in order.
        apart = at.read == at.work and read_row == write_row and job.survey is None
        count = min(len(job.tiles), self._threads.workers) if apart else 1
        parts = even_rows(len(job.tiles), count)
        self._threads.run([merge(job.tiles[part.start : part.stop]) for part in parts])

    def _merge_tile(
        self, job: Job, tensor: TensorPlan, rows: RowRange, source: Tensor, target: Tensor, workspace: Tensor
    ) -> None:
        shape = (len(rows), tensor.row_elements)
        dtype = TORCH_DTYPES[work_dtype(tensor, self.dtype)]
        stored = view_bytes(source, tensor.source.dtype, shape)
        tile, scratch = _work_tensors(workspace, shape, dtype, bool(tensor.updates))
        tile.copy_(stored)
        surveyed = None if job.survey is None else tensor.updates[job.survey]
        for update in self._reaching(tensor, rows):
            if update is surveyed:
                self._update(update, tensor, rows, tile, scratch, FAMILIES[update.family].survey)
                return
            self._update(update, tensor, rows, tile, scratch, FAMILIES[update.family].apply)
        if surveyed is not None:
            return  # it has nothing in this tile
        out = view_bytes(target, tensor.out.dtype, shape)
        encode_into(out, tile)
        if not _is_finite(out):
            self._check(tile, tensor, rows)

    def _reaching(self, tensor: TensorPlan, rows: RowRange) -> tuple[Update, ...]:
        """The updates that may reach rows of a tensor."""
        if tensor.row_dims == 1:
            return tensor.updates
        known, updates = self._experts
        if known is not tensor:
            updates = by_expert(tensor)
            self._experts = (tensor, updates)
        return updates[rows.start // tensor.source.shape[1]]

    def _update(
        self,
        update: Update,
        tensor: TensorPlan,
        rows: RowRange,
        tile: Tensor,
        scratch: Tensor,
        apply: Callable[[Tensor, UpdateFactors, Update, Window, Tensor], None],
    ) -> None:
        """Give a family its part of the tile, in the matrix's orientation."""
        part = locate(tensor, update, rows)
        if part is None:
            return
        view = tile[:, part.columns.start : part.columns.stop]
        view = view.T if part.transposed else view
        space = scratch.view(-1)[: view.numel()].view(view.shape)
        apply(view, self._factors.of(update, tile.dtype), update, part.window, space)

    def _check(self, tile: Tensor, tensor: TensorPlan, rows: RowRange) -> None:
        """Stop at a value that is not finite, or that the output dtype rounds to infinity."""
        wrong = ~(tile.abs() < overflow_limit(tensor.out.dtype))
        if not tensor.updates:
            # An infinity that the base holds on purpose (a mask, say) stays one; only a number must not become one.
            wrong &= torch.isfinite(tile)
        if not bool(wrong.any()):
            return
        row, column = (int(index) for index in wrong.nonzero()[0])
        value, was = float(tile[row, column]), self._stored(tensor, rows.start + row, column)
        raise NonFiniteError(_explain(tensor, rows.start + row, column, value, was))

    def _stored(self, tensor: TensorPlan, row: int, column: int) -> float:
        """A number of the source, read again: by now the buffer holds the result."""
        size = DTYPE_BITS[tensor.source.dtype] // 8
        data = bytearray(size)
        with self._factors.lock:
            reader = self._adapters.get(tensor.source.uri)
            reader.read_into(tensor.source.offset + (row * tensor.row_elements + column) * size, memoryview(data))
        return float(torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.source.dtype])[0])


def _work_tensors(
    workspace: Tensor, shape: tuple[int, int], dtype: torch.dtype, with_scratch: bool
) -> tuple[Tensor, Tensor]:
    size = shape[0] * shape[1] * dtype.itemsize
    starts = (0, aligned(size)) if with_scratch else (0,)
    parts = [workspace[start : start + size].view(dtype).view(shape) for start in starts]
    return parts[0], parts[-1]


def _is_finite(values: Tensor) -> bool:
    """Whether every value is sure to be finite.

    A sum is the cheapest pass there is, and not finite if a part of it is not. Of large numbers it may be infinite by
    itself, so False says only that one must look.
    """
    return math.isfinite(float(values.sum()))


def _explain(tensor: TensorPlan, row: int, column: int, value: float, was: float) -> str:
    where = f"{tensor.source.name}, row {row}, column {column}"
    if not tensor.updates or len(tensor.source.shape) > 2:
        element = _unravel(row * tensor.row_elements + column, tensor.source.shape)
        where = f"{tensor.source.name}, element {list(element)}"
    if not math.isfinite(was) and any(update.family == "replacement" for update in tensor.updates):
        return f"{where}: the adapter's own tensor holds {was} there; the merge was stopped"
    if not math.isfinite(was):
        return f"{where}: the base itself holds {was} there; the merge was stopped"
    if math.isfinite(value):
        wider = [DTYPE_NAMES[dtype] for dtype in FLOAT_DTYPES if abs(value) < overflow_limit(dtype)]
        hint = f"output.dtype: {' or '.join(wider)} holds it" if wider else "No output dtype holds it"
        narrow = DTYPE_NAMES[tensor.out.dtype]
        return f"{where}: the merged value is {value:g}, more than {narrow} can hold; the merge was stopped. {hint}"
    return (
        f"{where}: the merged value is {value} (the base's is {was:g}); the merge was stopped. No output dtype holds it"
    )


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    position: list[int] = []
    for size in reversed(shape):
        index, remainder = divmod(index, size)
        position.insert(0, remainder)
    return tuple(position)
