"""Compute the tiles of a tensor: decode → each update → encode → check.

Importing this room imports torch, which takes about a second; so the engine does it when the first tile has been read.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import dtype_for, narrow_dtype, tile_dtype, work_bytes
from shardmerge.codecs import TORCH_DTYPES, encode_by_chance, encode_into, view_bytes
from shardmerge.execution import nonfinite
from shardmerge.execution.devices import Device, device_for
from shardmerge.execution.factors import LazyFactors, UpdateFactors
from shardmerge.execution.fidelity import Sample, Sampler
from shardmerge.execution.jobs import Job
from shardmerge.execution.pipeline import Buffer
from shardmerge.execution.threads import ComputeThreads
from shardmerge.spec.plans import Fidelity, Finish, MergePlan, TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, RowRange, TensorRef, aligned, dtype_code, row_nbytes
from shardmerge.spec.updates import Update, Window
from shardmerge.spec.windows import Part, locate, reaching
from shardmerge.spec.words import words_for
from shardmerge.system.torch_devices import resolve_device

if TYPE_CHECKING:
    from shardmerge.sources.source import Reader

#: What an update is given: its part of a tile, its factors, itself, the window, and scratch.
Apply = Callable[[Tensor, UpdateFactors, Update, Window, Tensor], None]


class Workspace:
    """Memory of one thread that computes: a tile in the dtype of the work, and as much scratch."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._key: tuple[object, ...] = ()
        self._tensors = (self._memory, self._memory)

    def halves(self, elements: int, size: int) -> tuple[Tensor, Tensor]:
        """Memory for ``elements`` of ``size`` bytes each, twice."""
        nbytes = elements * size
        return self._memory[:nbytes], self._memory[aligned(nbytes) : aligned(nbytes) + nbytes]

    def tensors(self, shape: tuple[int, int], dtype: str, size: int) -> tuple[Tensor, Tensor]:
        """A tile and scratch, both dense; the same as before where nothing else is asked for.

        Each lies at the beginning of one of the `halves`, which have ``size`` bytes an element.
        """
        if self._key != (shape, dtype, size):
            tile, scratch = self.halves(shape[0] * shape[1], size)
            self._key = (shape, dtype, size)
            self._tensors = (_seen_as(tile, dtype, shape), _seen_as(scratch, dtype, shape))
        return self._tensors

    def narrow(self, shape: tuple[int, int], dtype: str, after: int) -> tuple[Tensor, Tensor]:
        """A copy of a part of a tile and scratch of its own, both dense and within the scratch of the tile's.

        ``after`` are the bytes of the tile.
        """
        memory = self._memory[aligned(after) :]
        start = aligned(shape[0] * shape[1] * TORCH_DTYPES[dtype].itemsize)
        return _seen_as(memory, dtype, shape), _seen_as(memory[start:], dtype, shape)


class Lane:
    """What one thread at a time computes with: workspaces, a stream by its number, and an account of the work done."""

    def __init__(self, device: Device, stream: int, size: int) -> None:
        self.stream = stream
        with device.on_stream(stream):
            self.workspace = Workspace(size, device.device)
        # Blocks of GGUF are made on the CPU. What is not touched of this takes no memory.
        self.on_cpu = self.workspace if device.device.type == "cpu" else Workspace(size, torch.device("cpu"))
        #: How many elements of a tensor were given to an update, both by identity.
        self.given: Counter[tuple[int, int]] = Counter()
        self.seconds = 0.0


class TileWorker:
    """Merges tiles from buffer to buffer, with a lane for every thread. Close it to give back the threads."""

    def __init__(self, plan: MergePlan, buffers: Sequence[Buffer], open_file: Callable[[str], Reader]) -> None:
        """``open_file`` gives the reader of a uri, of an adapter or of the base; asked of one thread at a time."""
        self.plan = plan
        count, size = plan.memory.workers, plan.memory.workspace_bytes
        device = resolve_device(plan.compute_device, what=f"the {words_for(plan.adapters).noun}")
        self.dtype = dtype_code(plan.compute_dtype)
        #: Looks at how the updates come through the rounding.
        self.sampler = Sampler()
        self._by_chance = plan.rounding == "stochastic"
        self._raw = {id(buffer): torch.frombuffer(buffer.view, dtype=torch.uint8) for buffer in buffers}
        self.device = device_for(device, count)
        # Before the next line changes torch's number of threads, with which some factors are made.
        self.factors = LazyFactors(open_file, self.device, plan.memory.shared_bytes)
        self._threads = ComputeThreads(count)
        self._lanes = [Lane(self.device, number, size) for number in range(count)]
        #: Lanes that no thread is in.
        self._free = deque(self._lanes)
        self._open_file = open_file
        self._tensor: TensorPlan | None = None
        self._tile_dtype = self.dtype
        #: What updates that compute are given, where it is another dtype than the tile's.
        self._narrow: str | None = None
        #: Bytes that the workspace has for an element of the tile.
        self._room = 0
        self._columns = 0
        self._reaching: Callable[[RowRange], Sequence[Update]] = lambda rows: ()
        self._in_full = ExitStack()
        self._in_full.enter_context(self.device.in_full())
        self.device.pin(self._raw.values())

    def take(self) -> tuple[tuple[int, ...], Mapping[str, Fidelity], float]:
        """What was seen since the last time.

        Adapters that had an effect, by number; how updates came through; seconds that a thread has computed, on
        average.
        """
        active = tuple(sorted(self.factors.active))
        self.factors.active.clear()
        seconds = sum(lane.seconds for lane in self._lanes) / len(self._lanes)
        for lane in self._lanes:
            lane.given.clear()
            lane.seconds = 0.0
        return active, self.sampler.take(), seconds

    def given(self, tensor: TensorPlan, update: Update) -> int:
        """How many elements of a tensor an update was given, since the last `take`."""
        return sum(lane.given[id(tensor), id(update)] for lane in self._lanes)

    def close(self) -> None:
        self._threads.close()
        self._in_full.close()
        self.device.close()

    def _begin(self, tensor: TensorPlan) -> None:
        """Prepare what all tiles of a tensor share."""
        if tensor is self._tensor:
            return
        self._threads.settle()
        self._tensor, self._columns, self._reaching = tensor, tensor.row_elements, reaching(tensor)
        self._tile_dtype, self._narrow = tile_dtype(tensor, self.dtype), narrow_dtype(tensor, self.dtype)
        self._room = work_bytes(tensor, self.dtype)
        dtypes = [TORCH_DTYPES[dtype_for(update, tensor, self.dtype)] for update in tensor.updates]
        self.factors.begin(tensor.updates, dtypes)
        self.sampler.begin(tensor)

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        """A lane for this thread. There are as many as threads."""
        lane = self._free.pop()
        started = time.perf_counter()
        try:
            with self.device.on_stream(lane.stream):
                yield lane
        finally:
            lane.seconds += time.perf_counter() - started
            self._free.append(lane)

    def merge(self, job: Job, tensor: TensorPlan, source: Buffer, target: Buffer) -> Callable[[], None]:
        """Decode each tile from one buffer, update it, and encode it into the other.

        Returns at once; what is returned waits until it is done, and raises what a tile has raised.
        """
        self._begin(tensor)
        first, stop = job.tiles[0].start, job.tiles[-1].stop
        stored = self._stored_rows(job, source)
        width = row_nbytes(tensor.out.dtype, self._columns)
        out = self._raw[id(target)][job.encode_at : job.encode_at + job.write_bytes]
        out = out.view(stop - first if job.write_bytes else 0, width)
        if tensor.finish is None:
            out = out.view(TORCH_DTYPES[tensor.out.dtype])

        def merge(rows: RowRange) -> None:
            with self._lane() as lane:
                stored_here = self.device.fetch(
                    stored[rows.start - first : rows.stop - first]
                )  # less to copy as stored
                tile, _ = self._tile(lane, rows)
                tile.copy_(stored_here)
                sample = None if tensor.finish else self.sampler.before(rows, stored_here)
                for update in self._reaching(rows):
                    self._update(lane, update, tensor, rows)
                here = out[rows.start - first : rows.stop - first]
                if tensor.finish is None:
                    self._encode(tensor, rows, tile, here, sample)
                else:
                    self._finish(tensor, tensor.finish, rows, lane, here)

        if tensor.tiles == 1:
            self._threads.alone(lambda: merge(job.tiles[0]))
            return _nothing
        futures = self._threads.share(job.tiles, merge)

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def survey(self, job: Job, tensor: TensorPlan, source: Buffer) -> None:
        """Show each tile to an update, in order, as the updates before it leave the tile: what it keeps adds up."""
        assert job.survey is not None
        self._begin(tensor)
        stored, surveyed = self._stored_rows(job, source), tensor.updates[job.survey]

        def survey() -> None:
            first = job.tiles[0].start
            for rows in job.tiles:
                with self._lane() as lane:
                    tile, _ = self._tile(lane, rows)
                    tile.copy_(self.device.fetch(stored[rows.start - first : rows.stop - first]))
                    self._survey_tile(lane, tensor, surveyed, rows)

        if tensor.tiles == 1:
            self._threads.alone(survey)
        else:
            survey()

    def _stored_rows(self, job: Job, source: Buffer) -> Tensor:
        """A job's rows as they are stored, in the buffer that they were read into."""
        assert job.tensor is not None
        shape = (job.tiles[-1].stop - job.tiles[0].start, self._columns)
        return _matrix(self._raw[id(source)], job.read_at, job.tensor.source.dtype, shape)

    def _tile(self, lane: Lane, rows: RowRange) -> tuple[Tensor, Tensor]:
        """A lane's tile for these rows, and its scratch."""
        return lane.workspace.tensors((len(rows), self._columns), self._tile_dtype, self._room)

    def _survey_tile(self, lane: Lane, tensor: TensorPlan, surveyed: Update, rows: RowRange) -> None:
        """Show an update the tile as those before it leave it."""
        for update in self._reaching(rows):
            part, family = locate(tensor, update, rows), FAMILIES[update.family]
            if part is not None:
                self._give(lane, update, rows, part, family.prepass if update is surveyed else family.apply)
            if update is surveyed:
                return

    def _encode(self, tensor: TensorPlan, rows: RowRange, tile: Tensor, target: Tensor, sample: Sample | None) -> None:
        """Round an updated ``tile`` (rows, columns) into ``target``, a matrix of the same shape."""
        rounded = self.device.staging(target)
        self._round(tensor, rows, tile, rounded)
        self.device.deliver(rounded, target)
        if not nonfinite.is_finite(rounded):
            self._check(tile, tensor, rows)
        if sample is not None:
            self.sampler.after(tensor, rows, sample, tile, rounded)

    def _round(self, tensor: TensorPlan, rows: RowRange, tile: Tensor, target: Tensor) -> None:
        if self._by_chance and tensor.updates and target.element_size() < tile.element_size():
            encode_by_chance(target, tile, self.plan.seed, tensor.source.name, rows)
        else:
            encode_into(target, tile)

    def _finish(self, tensor: TensorPlan, finish: Finish, rows: RowRange, lane: Lane, target: Tensor) -> None:
        """Encode as another format wants it, of the values that a checkpoint in between would have held.

        When the updates are done with the scratch it is free, and so is the tile as soon as it is rounded: one step
        after the other is made in that half of the workspace that the last one has not filled.
        """
        from shardmerge.gguf.quantize import quantize_into
        from shardmerge.gguf.tiles import arrange

        shape, count = (len(rows), self._columns), len(rows) * self._columns
        tile, _ = self._tile(lane, rows)
        here, free = lane.workspace.halves(count, self._room)
        merged = tile
        if finish.dtype != self._tile_dtype:
            here, free, merged = free, here, _seen_as(free, finish.dtype, shape)
            self._round(tensor, rows, tile, merged)
        if count and not nonfinite.is_below(merged, nonfinite.limit(tensor)):
            self._check(tile, tensor, rows)
        if lane.on_cpu is not lane.workspace:
            here, free = lane.on_cpu.halves(count, self._room)
            merged = _seen_as(here, finish.dtype, shape).copy_(merged)
        values = arrange(finish, merged, _seen_as(free, "F32", shape))
        scratch = free if values is merged else here
        quantize_into(target.view(-1), values, tensor.out.dtype, _seen_as(scratch, "F32", shape))

    def _update(self, lane: Lane, update: Update, tensor: TensorPlan, rows: RowRange) -> None:
        """Do to a tile what an update does to it, if anything."""
        if (part := locate(tensor, update, rows)) is not None:
            self._give(lane, update, rows, part, FAMILIES[update.family].apply)
            lane.given[id(tensor), id(update)] += len(rows) * len(part.columns)

    def _give(self, lane: Lane, update: Update, rows: RowRange, part: Part, apply: Apply) -> None:
        """Give a family its part of the tile, in the matrix's orientation."""
        tile, scratch = self._tile(lane, rows)
        if self._narrow is not None and FAMILIES[update.family].computes:
            self._give_narrow(lane, update, tile[:, part.columns.start : part.columns.stop], part, apply)
            return
        view, space = tile, scratch
        if len(part.columns) != self._columns or part.transposed:
            view = tile[:, part.columns.start : part.columns.stop]
            view = view.T if part.transposed else view
            space = scratch.view(-1)[: view.numel()].view(view.shape)
        apply(view, self.factors.of(update), update, part.window, space)

    def _give_narrow(self, lane: Lane, update: Update, stored: Tensor, part: Part, apply: Apply) -> None:
        """The same with a copy of the part, in the compute dtype: what is only copied keeps its own."""
        assert self._narrow is not None
        shape = (stored.shape[0], stored.shape[1])
        after = shape[0] * self._columns * self._room
        copy, space = lane.workspace.narrow(shape, self._narrow, after)
        copy.copy_(stored)
        view = copy.T if part.transposed else copy
        apply(view, self.factors.of(update), update, part.window, space.view(view.shape))
        stored.copy_(copy)

    def _check(self, tile: Tensor, tensor: TensorPlan, rows: RowRange) -> None:
        """Stop at a value that the output cannot hold."""
        nonfinite.check(tile, tensor, rows, self._stored)

    def _stored(self, ref: TensorRef, start: int, count: int) -> Tensor:
        """Elements of a tensor of the base's or an adapter's, read again: by now the buffer holds the result."""
        size = DTYPE_BITS[ref.dtype] // 8
        data = bytearray(count * size)
        with self.factors.lock:
            self._open_file(ref.uri).read_into(ref.offset + start * size, memoryview(data))
        return torch.frombuffer(data, dtype=TORCH_DTYPES[ref.dtype])


def _nothing() -> None:
    """There is nothing to wait for."""


def _seen_as(memory: Tensor, dtype: str, shape: tuple[int, int]) -> Tensor:
    """The beginning of ``memory`` (uint8) as a dense matrix."""
    return view_bytes(memory[: shape[0] * shape[1] * TORCH_DTYPES[dtype].itemsize], dtype, shape)


def _matrix(raw: Tensor, start: int, dtype: str, shape: tuple[int, int]) -> Tensor:
    size = row_nbytes(dtype, shape[0] * shape[1])
    return view_bytes(raw[start : start + size], dtype, shape)
