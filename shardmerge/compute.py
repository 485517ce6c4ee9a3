"""Compute the tiles of a tensor: decode → each update → encode → check.

Importing this room imports torch, which takes about a second; so the engine does it when the first tile has been read.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from shardmerge.adapters import FAMILIES, work_bytes, work_dtype
from shardmerge.codecs import TORCH_DTYPES, encode_by_chance, encode_into, overflow_limit, view_bytes
from shardmerge.devices import place_on, resolve_device
from shardmerge.errors import NonFiniteError
from shardmerge.factors import LazyFactors, UpdateFactors
from shardmerge.fidelity import Sample, Sampler
from shardmerge.jobs import Job, Positions
from shardmerge.pipeline import Buffer
from shardmerge.spec import (
    DTYPE_BITS,
    DTYPE_NAMES,
    FLOAT_DTYPES,
    Fidelity,
    Finish,
    MergePlan,
    RowRange,
    TensorPlan,
    Update,
    Window,
    aligned,
    dtype_code,
    row_nbytes,
)
from shardmerge.windows import locate, reaching

if TYPE_CHECKING:
    from shardmerge.sources import Reader

Item = TypeVar("Item")
Begun = TypeVar("Begun")


class Batch(Generic[Item, Begun]):
    """Items that were handed out together: what is done to each, and whether all are done."""

    def __init__(
        self,
        count: int,
        begin: Callable[[int, Item], Begun],
        work: Callable[[int, Item, Begun], None],
        apart: bool,
    ) -> None:
        self.apart = apart
        self.over = threading.Event()
        self._begin = begin
        self._work = work
        self._lock = threading.Lock()
        self._left = count
        self._error: BaseException | None = None
        if not count:
            self.over.set()

    def begin(self, worker: int, item: Item) -> Begun | None:
        """None where the batch has failed."""
        if self._error is None:
            try:
                return self._begin(worker, item)
            except BaseException as error:
                self._error = error
        return None

    def work(self, worker: int, item: Item, begun: Begun) -> None:
        if self._error is None:
            try:
                self._work(worker, item, begun)
            except BaseException as error:
                self._error = error
        with self._lock:
            self._left -= 1
            if not self._left:
                self.over.set()

    def abandon(self, error: BaseException) -> None:
        """Nobody is to wait for what is not done."""
        self._error = self._error or error
        self.over.set()

    def wait(self) -> None:
        """Until all is done. Raises what one of the items raised; those that came after it may have been left out."""
        self.over.wait()
        if self._error is not None:
            raise self._error


class ComputeThreads:
    """Who computes, put back by `close`.

    The tiles of a weight are shared out among the caller's thread and a few of ours, in each of which torch computes
    with one thread: so nothing is waited for within a product, and torch's pool does not fight with the threads that
    read and write. The bits of a large product do not depend on the number of threads. Those of a small one may; so a
    weight of one tile gets the threads that torch takes by itself, as for PEFT.
    """

    def __init__(self, workers: int) -> None:
        self._default = torch.get_num_threads()
        self.workers = max(1, min(workers, _cores()))
        self._pending: deque[tuple[Batch[Any, Any], Any]] = deque()
        self._open: list[Batch[Any, Any]] = []
        #: Held by who takes an item.
        self._turn = threading.Condition()
        self._closed = False
        # All begin now: a thread that tells torch of its one tells MKL for all threads, and must not do so later.
        ready = threading.Barrier(self.workers)
        self._helpers = [
            threading.Thread(target=self._help, args=(worker, ready), name="shardmerge-compute", daemon=True)
            for worker in range(1, self.workers)
        ]
        for helper in self._helpers:
            helper.start()
        ready.wait()
        torch.set_num_threads(self._default)
        self._set = self._default

    def share(
        self,
        items: Sequence[Item],
        begin: Callable[[int, Item], Begun],
        work: Callable[[int, Item, Begun], None],
        apart: bool,
    ) -> Batch[Item, Begun]:
        """Hand items out: each thread, told its number, takes the next one. Returns when none is left to be taken.

        Others may be at their last ones then; `Batch.wait` waits for them. So there is something to do between two
        batches for a thread that is ready before the others. Where items are not ``apart``, none is taken before all
        earlier ones have begun.
        """
        batch = Batch(len(items), begin, work, apart)
        try:
            with self._turn:
                self._open = [one for one in self._open if not one.over.is_set()]
                self._open.append(batch)
                self._pending.extend((batch, item) for item in items)
                self._turn.notify_all()
            while self._step(0):
                pass
        except BaseException as error:  # an interrupt: what it came between is not known
            with self._turn:
                self._pending.clear()
            for one in self._open:
                one.abandon(error)
            raise
        return batch

    def settle(self) -> None:
        """Wait until nobody works on anything."""
        for batch in self._open:
            batch.over.wait()

    def set_for(self, tensor: TensorPlan) -> None:
        """How many threads torch has in the caller's thread."""
        wanted = self._default if tensor.tiles == 1 else 1
        if wanted != self._set:
            torch.set_num_threads(wanted)
            self._set = wanted

    def close(self) -> None:
        with self._turn:
            self._pending.clear()
            self._closed = True
            self._turn.notify_all()
        for helper in self._helpers:
            helper.join()
        torch.set_num_threads(self._default)

    def _help(self, worker: int, ready: threading.Barrier) -> None:
        torch.set_num_threads(1)
        ready.wait()
        while self._step(worker):
            pass

    def _step(self, worker: int) -> bool:
        """Take an item and work on it. Whether there was one, for which all but the caller's thread wait."""
        with self._turn:
            while not self._pending:
                if worker == 0 or self._closed:
                    return False
                self._turn.wait()
            batch, item = self._pending.popleft()
            begun = None if batch.apart else batch.begin(worker, item)
        if batch.apart:
            begun = batch.begin(worker, item)
        batch.work(worker, item, begun)
        return True


def _cores() -> int:
    """Cores that this process may use, which in a container may be fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


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


class TileWorker:
    """Merges tiles in place in buffers, with a workspace for every thread. Close it to give back the threads."""

    def __init__(self, plan: MergePlan, buffers: Sequence[Buffer], open_file: Callable[[str], Reader]) -> None:
        """``open_file`` gives the reader of a uri, of an adapter or of the base; asked of one thread at a time."""
        self.plan = plan
        device = resolve_device(plan.compute_device)
        self.dtype = dtype_code(plan.compute_dtype)
        #: Looks at how the updates come through the rounding.
        self.sampler = Sampler()
        self._by_chance = plan.rounding == "stochastic"
        self._raw = {id(buffer): torch.frombuffer(buffer.view, dtype=torch.uint8) for buffer in buffers}
        self._threads = ComputeThreads(plan.memory.workers)
        self.place = place_on(device, self._threads.workers)
        self._workspaces = []
        for worker in range(self._threads.workers):
            with self.place.turn(worker):
                self._workspaces.append(Workspace(plan.memory.workspace_bytes, self.place.device))
        # Blocks of GGUF are made on the CPU. What is not touched of this takes no memory.
        self._beside = self._workspaces
        if self.place.device.type != "cpu":
            self._beside = [Workspace(plan.memory.workspace_bytes, torch.device("cpu")) for _ in self._workspaces]
        self._open_file = open_file
        self.factors = LazyFactors(open_file, self.place, plan.memory.shared_bytes)
        self._tensor: TensorPlan | None = None
        self._work_dtype = self.dtype
        #: Bytes that the workspace has for an element of the tile.
        self._room = 0
        self._columns = 0
        self._reaching: Callable[[RowRange], Sequence[Update]] = lambda rows: ()
        self._in_full = ExitStack()
        self._in_full.enter_context(self.place.in_full())
        self.place.pin(self._raw.values())

    def take(self) -> tuple[tuple[int, ...], Mapping[str, Fidelity]]:
        """What was seen since the last time: adapters that had an effect, by number, and how updates came through."""
        active = tuple(sorted(self.factors.active))
        self.factors.active.clear()
        return active, self.sampler.take()

    def close(self) -> None:
        self._threads.close()
        self._in_full.close()
        self.place.close()

    def _begin(self, tensor: TensorPlan) -> None:
        """Get ready what all tiles of a tensor share."""
        if tensor is self._tensor:
            return
        self._threads.settle()
        self._tensor, self._columns, self._reaching = tensor, tensor.row_elements, reaching(tensor)
        self._work_dtype = work_dtype(tensor, self.dtype)
        self._room = work_bytes(tensor, self.dtype)
        self._threads.set_for(tensor)
        self.factors.begin(tensor.updates, TORCH_DTYPES[self._work_dtype])
        self.sampler.begin(tensor)

    def merge(
        self, job: Job, tensor: TensorPlan, buffer: Buffer, at: Positions
    ) -> Batch[RowRange, Sample | None] | None:
        """Decode each tile from its buffer, update it in the workspace, and encode it into the same buffer.

        When that has been done the batch tells; there is none where it has been.
        """
        self._begin(tensor)
        first, stop = job.tiles[0].start, job.tiles[-1].stop
        raw = self._raw[id(buffer)]
        stored = _matrix(raw, at.read, tensor.source.dtype, (stop - first, self._columns))
        width = row_nbytes(tensor.out.dtype, self._columns)
        target = raw[at.work : at.work + job.write_bytes].view(stop - first if job.write_bytes else 0, width)
        if tensor.finish is None:
            target = target.view(TORCH_DTYPES[tensor.out.dtype])

        def decode(worker: int, rows: RowRange) -> Sample | None:
            tile, _ = self._workspaces[worker].tensors((len(rows), self._columns), self._work_dtype, self._room)
            with self.place.turn(worker):
                # As it is stored, which is less to copy.
                here = self.place.fetch(stored[rows.start - first : rows.stop - first])
                tile.copy_(here)
                return None if job.survey is not None or tensor.finish else self.sampler.before(rows, here)

        def merge(worker: int, rows: RowRange, sample: Sample | None) -> None:
            tile, scratch = self._workspaces[worker].tensors((len(rows), self._columns), self._work_dtype, self._room)
            with self.place.turn(worker):
                for update in self._reaching(rows):
                    self._update(update, tensor, rows, tile, scratch, FAMILIES[update.family].apply)
                here = target[rows.start - first : rows.stop - first]
                if tensor.finish is None:
                    self._encode(tensor, rows, tile, here, sample)
                else:
                    self._finish(tensor, tensor.finish, rows, worker, here)

        def survey(rows: RowRange, surveyed: Update) -> None:
            decode(0, rows)
            tile, scratch = self._workspaces[0].tensors((len(rows), self._columns), self._work_dtype, self._room)
            with self.place.turn(0):
                self._survey_tile(tensor, surveyed, rows, tile, scratch)

        if job.survey is not None:  # it adds up, and so goes in order
            for rows in job.tiles:
                survey(rows, tensor.updates[job.survey])
            return None
        # Output that does not take the very place of input takes that of earlier input; see `positions`.
        apart = at.read == at.work and job.read_bytes == job.write_bytes
        return self._threads.share(job.tiles, decode, merge, apart)

    def _survey_tile(self, tensor: TensorPlan, surveyed: Update, rows: RowRange, tile: Tensor, scratch: Tensor) -> None:
        """Show an update the tile as those before it leave it."""
        for update in self._reaching(rows):
            if update is surveyed:
                self._update(update, tensor, rows, tile, scratch, FAMILIES[update.family].survey)
                return
            self._update(update, tensor, rows, tile, scratch, FAMILIES[update.family].apply)

    def _encode(self, tensor: TensorPlan, rows: RowRange, tile: Tensor, target: Tensor, sample: Sample | None) -> None:
        """Round an updated ``tile`` (rows, columns) into ``target``, a matrix of the same shape."""
        rounded = self.place.beside(target)
        self._round(tensor, rows, tile, rounded)
        self.place.deliver(rounded, target)
        if not _is_finite(rounded):
            self._check(tile, tensor, rows)
        if sample is not None:
            self.sampler.after(tensor, rows, sample, tile, rounded)

    def _round(self, tensor: TensorPlan, rows: RowRange, tile: Tensor, target: Tensor) -> None:
        if self._by_chance and tensor.updates and target.element_size() < tile.element_size():
            encode_by_chance(target, tile, self.plan.seed, tensor.source.name, rows)
        else:
            encode_into(target, tile)

    def _finish(self, tensor: TensorPlan, finish: Finish, rows: RowRange, worker: int, target: Tensor) -> None:
        """Encode as another format wants it, of the values that a checkpoint in between would have held.

        When the updates are done with the scratch it is free, and so is the tile as soon as it is rounded: one step
        after the other is made in that half of the workspace that the last one has not filled.
        """
        from shardmerge.gguf.quantize import quantize_into
        from shardmerge.gguf.tiles import arrange

        shape, count = (len(rows), self._columns), len(rows) * self._columns
        tile, _ = self._workspaces[worker].tensors(shape, self._work_dtype, self._room)
        here, free = self._workspaces[worker].halves(count, self._room)
        merged = tile
        if finish.dtype != self._work_dtype:
            here, free, merged = free, here, _seen_as(free, finish.dtype, shape)
            self._round(tensor, rows, tile, merged)
        if count and not _is_below(merged, _limit(tensor)):
            self._check(tile, tensor, rows)
        if self._beside is not self._workspaces:
            here, free = self._beside[worker].halves(count, self._room)
            merged = _seen_as(here, finish.dtype, shape).copy_(merged)
        values = arrange(finish, merged, _seen_as(free, "F32", shape))
        scratch = free if values is merged else here
        quantize_into(target.view(-1), values, tensor.out.dtype, _seen_as(scratch, "F32", shape))

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
        view, space = tile, scratch
        if len(part.columns) != self._columns or part.transposed:
            view = tile[:, part.columns.start : part.columns.stop]
            view = view.T if part.transposed else view
            space = scratch.view(-1)[: view.numel()].view(view.shape)
        apply(view, self.factors.of(update), update, part.window, space)

    def _check(self, tile: Tensor, tensor: TensorPlan, rows: RowRange) -> None:
        """Stop at a value that is not finite, or that the output dtype rounds to infinity."""
        wrong = ~(tile.abs() < _limit(tensor))
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
        with self.factors.lock:
            reader = self._open_file(tensor.source.uri)
            reader.read_into(tensor.source.offset + (row * tensor.row_elements + column) * size, memoryview(data))
        return float(torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.source.dtype])[0])


def _limit(tensor: TensorPlan) -> float:
    """The least magnitude that the output cannot hold."""
    if tensor.finish is None:
        return overflow_limit(tensor.out.dtype)
    from shardmerge.gguf.quantize import overflow_limit as quantized_limit

    return min(overflow_limit(tensor.finish.dtype), quantized_limit(tensor.out.dtype))


def _seen_as(memory: Tensor, dtype: str, shape: tuple[int, int]) -> Tensor:
    """The beginning of ``memory`` (uint8) as a dense matrix."""
    return view_bytes(memory[: shape[0] * shape[1] * TORCH_DTYPES[dtype].itemsize], dtype, shape)


def _matrix(raw: Tensor, start: int, dtype: str, shape: tuple[int, int]) -> Tensor:
    size = row_nbytes(dtype, shape[0] * shape[1])
    return view_bytes(raw[start : start + size], dtype, shape)


def _is_below(values: Tensor, limit: float) -> bool:
    """Whether all magnitudes are; what is no number is not."""
    low, high = values.aminmax()
    return -limit < float(low) and float(high) < limit


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
