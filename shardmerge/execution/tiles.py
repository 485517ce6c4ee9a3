"""Compute the tiles of a tensor: decode → each update → encode and check.

Importing this module imports torch, which takes about a second; so the engine does it when the first tile is read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import dtype_for, narrow_dtype, tile_dtype
from shardmerge.codecs.codec import Codec
from shardmerge.codecs.registry import CODECS, decoder, encoder
from shardmerge.codecs.rounding import NUMBER_DTYPES, TORCH_DTYPES
from shardmerge.execution import nonfinite
from shardmerge.execution.devices import device_for
from shardmerge.execution.factors import LazyFactors, UpdateFactors
from shardmerge.execution.fidelity import Sample, Sampler
from shardmerge.execution.jobs import Job
from shardmerge.execution.lanes import Lane
from shardmerge.execution.pipeline import Buffer
from shardmerge.execution.threads import ComputeThreads
from shardmerge.spec.plans import MergePlan, TensorPlan
from shardmerge.spec.receipts import Fidelity
from shardmerge.spec.tensors import DTYPE_BITS, RowRange, TensorInfo, TensorRef, dtype_code
from shardmerge.spec.updates import Update, Window
from shardmerge.spec.windows import Part, locate, reaching
from shardmerge.spec.words import words_for
from shardmerge.system.torch_devices import resolve_device

if TYPE_CHECKING:
    from shardmerge.sources.source import Reader

#: What an update is given: its part of a tile, its factors, itself, the window, and scratch.
Apply = Callable[[Tensor, UpdateFactors, Update, Window, Tensor], None]


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
        self._decoder: Codec = CODECS["F32"]
        self._encoder: Codec = self._decoder
        #: The small parts of the output that are being made, by role.
        self._made: dict[str, Tensor] = {}
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
        self._decoder, self._encoder = decoder(tensor), encoder(tensor)
        element = self._encoder.memory(tensor, self._tile_dtype).element
        self._room = max(DTYPE_BITS[self._tile_dtype] // 8, element)
        self._made = {part.role: _zeros(part.info) for part in tensor.made}
        dtypes = [TORCH_DTYPES[dtype_for(update, tensor, self.dtype)] for update in tensor.updates]
        self.factors.begin(tensor.updates, dtypes, [ref for _, ref in tensor.parts])
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
        out = self._raw[id(target)][job.encode_at : job.encode_at + job.write_bytes]
        if not job.tiles:
            self._threads.settle()
            made = torch.cat([part.view(torch.uint8).flatten() for part in self._made.values()])
            out.copy_(made[job.made_offset :][: len(out)])
            return _nothing
        first, stored = job.tiles[0].start, self._stored_rows(job, source)
        out = _matrix(out, tensor.out.dtype, len(stored), self._columns)

        def merge(rows: RowRange) -> None:
            with self._lane() as lane:
                slot = _Slot(self, lane, tensor, rows)
                here = self._decode(slot, stored[rows.start - first : rows.stop - first])
                sample = self.sampler.before(rows, here) if self._encoder.is_plain else None
                for update in self._reaching(rows):
                    self._update(lane, update, tensor, rows)
                self._encode(slot, out[rows.start - first : rows.stop - first], sample)

        if tensor.tiles == 1:
            self._threads.alone(lambda: merge(job.tiles[0]))
            return _nothing
        futures = self._threads.share(job.tiles, merge)

        def wait() -> None:
            for future in futures:
                future.result()

        return wait

    def survey(self, job: Job, tensor: TensorPlan, source: Buffer) -> None:
        """Show each tile to an update or to the codec, in order, as the updates before it leave the tile.

        What it keeps adds up.
        """
        assert job.survey is not None
        self._begin(tensor)
        stored = self._stored_rows(job, source)
        surveyed = tensor.updates[job.survey] if job.survey < len(tensor.updates) else None

        def survey() -> None:
            first = job.tiles[0].start
            for rows in job.tiles:
                with self._lane() as lane:
                    slot = _Slot(self, lane, tensor, rows)
                    self._decode(slot, stored[rows.start - first : rows.stop - first])
                    self._survey_tile(slot, surveyed)

        if tensor.tiles == 1:
            self._threads.alone(survey)
        else:
            survey()

    def _stored_rows(self, job: Job, source: Buffer) -> Tensor:
        """A job's rows as they are stored, in the buffer that they were read into."""
        assert job.tensor is not None
        raw = self._raw[id(source)][job.read_at : job.read_at + job.read_bytes]
        return _matrix(raw, job.tensor.source.dtype, job.tiles[-1].stop - job.tiles[0].start, self._columns)

    def _tile(self, lane: Lane, rows: RowRange) -> tuple[Tensor, Tensor]:
        """A lane's tile for these rows, and its scratch."""
        return lane.workspace.tensors((len(rows), self._columns), self._tile_dtype, self._room)

    def _decode(self, slot: _Slot, stored: Tensor) -> Tensor:
        """Fill a lane's tile. Returns the numbers in it, as few bytes as there are of them."""
        fetched = self.device.fetch(stored)  # less to copy as stored
        tile, _ = self._tile(slot.lane, slot.rows)
        self._decoder.decode(slot, fetched, tile)
        return fetched if self._decoder.is_plain else tile

    def _survey_tile(self, slot: _Slot, surveyed: Update | None) -> None:
        """Show an update the tile as those before it leave it; or the codec, as all of them leave it."""
        lane, rows = slot.lane, slot.rows
        for update in self._reaching(rows):
            part, family = locate(slot.tensor, update, rows), FAMILIES[update.family]
            if part is not None:
                self._give(lane, update, rows, part, family.prepass if update is surveyed else family.apply)
            if update is surveyed:
                return
        self._encoder.prepass(slot, self._tile(lane, rows)[0])

    def _encode(self, slot: _Slot, target: Tensor, sample: Sample | None) -> None:
        """Encode a lane's updated tile into ``target``; stop at a value that the output cannot hold."""
        tile, codec = self._tile(slot.lane, slot.rows)[0], self._encoder
        encoded = self.device.staging(target) if codec.on_device else target
        if not codec.on_device and slot.lane.on_cpu is not slot.lane.workspace:
            slot.workspace = slot.lane.on_cpu
            tile = slot.workspace.tensors((len(slot.rows), self._columns), self._tile_dtype, self._room)[0].copy_(tile)
        if not codec.encode(slot, tile, encoded):
            nonfinite.check(tile, slot.tensor, slot.rows, self._stored)
            slot.is_checked = True
            codec.encode(slot, tile, encoded)
        if codec.on_device:
            self.device.deliver(encoded, target)
        if sample is not None:
            self.sampler.after(slot.tensor, slot.rows, sample, tile, encoded)

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

    def _stored(self, ref: TensorRef, start: int, count: int) -> Tensor:
        """Elements of a tensor of the base's or an adapter's, decoded, read again: the tile holds the result."""
        tensor = self._tensor
        if tensor is not None and tensor.decoding is not None and ref is tensor.source:
            return self._decoded_again(tensor, start, count)
        size = DTYPE_BITS[ref.dtype] // 8
        return self._read(ref, start * size, count * size).view(TORCH_DTYPES[ref.dtype])

    def _decoded_again(self, tensor: TensorPlan, start: int, count: int) -> Tensor:
        assert tensor.decoding is not None
        unit, columns = self._decoder.row_unit(tensor.decoding), self._columns
        first, stop = start // columns // unit * unit, -(-(start + count) // columns)
        rows = RowRange(first, min(tensor.all_rows, -(-stop // unit) * unit))
        data = self._read(tensor.source, rows.start * tensor.read_row, len(rows) * tensor.read_row)
        tile = torch.empty(len(rows), columns, dtype=TORCH_DTYPES[self._tile_dtype])
        stored = _matrix(data, tensor.source.dtype, len(rows), columns)
        self._decoder.decode(_Slot(self, self._lanes[0], tensor, rows), stored, tile)
        return tile.view(-1)[start - rows.start * columns :][:count]

    def _read(self, ref: TensorRef, start: int, size: int) -> Tensor:
        data = bytearray(size)
        with self.factors.lock:
            self._open_file(ref.uri).read_into(ref.offset + start, memoryview(data))
        return torch.frombuffer(data, dtype=torch.uint8)


class _Slot:
    """A tile's surroundings; see `shardmerge.codecs.codec.TileSlot`."""

    __slots__ = ("_of", "is_checked", "lane", "rows", "tensor", "workspace")

    def __init__(self, of: TileWorker, lane: Lane, tensor: TensorPlan, rows: RowRange) -> None:
        self._of = of
        self.lane = lane
        self.tensor = tensor
        self.rows = rows
        self.workspace = lane.workspace
        self.is_checked = False

    def halves(self) -> tuple[Tensor, Tensor]:
        return self.workspace.halves(len(self.rows) * self._of._columns, self._of._room)

    def part(self, role: str, rows: RowRange) -> Tensor:
        return self._of.factors.part(next(ref for name, ref in self.tensor.parts if name == role), rows)

    def made(self, role: str) -> Tensor:
        return self._of._made[role]


def _nothing() -> None:
    """There is nothing to wait for."""


def _zeros(info: TensorInfo) -> Tensor:
    return torch.zeros(info.shape, dtype=NUMBER_DTYPES[info.dtype])


def _matrix(raw: Tensor, dtype: str, rows: int, columns: int) -> Tensor:
    """Bytes as rows of numbers of a dtype, or of bytes where it is none of torch's.

    Where there are none, they are rows of ``columns``.
    """
    numbers = raw.view(NUMBER_DTYPES.get(dtype, torch.uint8))
    return numbers.view(rows, len(numbers) // rows if len(numbers) else columns)
