"""Merge jobs: hand their tiles out to threads, each of which computes in a lane of its own. This imports torch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.execution.devices import Lane, device_for
from shardmerge.execution.factors import LazyFactors
from shardmerge.execution.fidelity import Sampler
from shardmerge.execution.jobs import Job, Tile
from shardmerge.execution.pipeline import Buffer
from shardmerge.execution.tiles import WeightTiles, matrix
from shardmerge.spec.plans import MergePlan, TensorPlan
from shardmerge.spec.receipts import Fidelity
from shardmerge.spec.tensors import TensorRef, dtype_code
from shardmerge.spec.updates import Update
from shardmerge.spec.words import words_for
from shardmerge.system.torch_devices import resolve_device

if TYPE_CHECKING:
    from shardmerge.sources.source import Reader

#: Seconds in which a thread must have begun; where memory has run out, one may end without an error.
_PATIENCE = 60.0

Item = TypeVar("Item")


class TileWorker:
    """Merges jobs from buffer to buffer. `close` ends the threads."""

    def __init__(self, plan: MergePlan, buffers: Sequence[Buffer], open_file: Callable[[str], Reader]) -> None:
        """``open_file`` returns the reader of a uri of the base or an adapter. One thread at a time calls it."""
        self.plan = plan
        count, size = plan.memory.workers, plan.memory.workspace_bytes
        device = resolve_device(plan.compute_device, what=f"the {words_for(plan.adapters).noun}")
        self.dtype = dtype_code(plan.compute_dtype)
        self.sampler = Sampler()
        self._raw = {id(buffer): torch.frombuffer(buffer.view, dtype=torch.uint8) for buffer in buffers}
        self.device = device_for(device, count)
        # Before `ComputeThreads`, which changes torch's number of threads: some factors are built with the default.
        self.factors = LazyFactors(open_file, self.device, plan.memory.shared_bytes, plan.memory.weights)
        self._threads = ComputeThreads(count)
        self._lanes = [Lane(self.device, number, size) for number in range(count)]
        self._free = deque(self._lanes)
        self._open_file = open_file
        self._weight: WeightTiles | None = None
        #: What computes each of the last weights that have begun; `MemoryPlan.weights` says how many there may be.
        self._begun: deque[list[Future[None]]] = deque()
        self._in_full = ExitStack()
        self._in_full.enter_context(self.device.in_full())
        self.device.pin(self._raw.values())

    def take(self) -> tuple[tuple[int, ...], Mapping[str, Fidelity], float]:
        """Results since the last call.

        The numbers of the adapters that had an effect, the fidelity of updates by tensor, and the seconds that a thread
        computed, on average.
        """
        active = tuple(sorted(self.factors.active))
        self.factors.active.clear()
        seconds = sum(lane.seconds for lane in self._lanes) / len(self._lanes)
        for lane in self._lanes:
            lane.applied.clear()
            lane.seconds = 0.0
        return active, self.sampler.take(), seconds

    def applied(self, tensor: TensorPlan, update: Update) -> int:
        """How many elements of a tensor an update was applied to since the last `take`."""
        return sum(lane.applied[id(tensor), id(update)] for lane in self._lanes)

    def close(self) -> None:
        self._threads.close()
        self._in_full.close()
        self.device.close()

    def merge(self, job: Job, source: Buffer, target: Buffer) -> Callable[[], None]:
        """Decode each tile from ``source``, update it, and encode it into ``target``, which may be the same buffer.

        Returns at once: a function that waits until all tiles are done, and raises what one has raised.
        """
        tensor = job.tensor
        assert tensor is not None
        weight = self._begin(tensor)
        out = self._raw[id(target)][job.encode_at : job.encode_at + job.write_bytes]
        if not job.tiles:
            self._threads.settle()
            out.copy_(weight.made()[job.made_offset :][: len(out)])
            return _done
        stored = self._stored_rows(job, source)
        out = matrix(out, tensor.out.dtype, len(stored), weight.columns)

        def merge(tile: Tile) -> None:
            with self._lane() as lane:
                weight.merge(lane, tile, stored[tile.here], out[tile.here])

        if tensor.tiles == 1:
            self._threads.alone(lambda: merge(job.tiles[0]))
            return _done
        futures = self._threads.share(job.tiles, merge)
        self._begun[-1] += futures

        def done() -> None:
            for future in futures:
                future.result()

        return done

    def prepass(self, job: Job, source: Buffer) -> None:
        """Show the tiles, in order, to an update or to the codec."""
        tensor = job.tensor
        assert tensor is not None
        weight, stored = self._begin(tensor), self._stored_rows(job, source)

        def show() -> None:
            for tile in job.tiles:
                with self._lane() as lane:
                    weight.prepass(lane, tile, stored[tile.here], job.shown_to)

        if tensor.tiles == 1:
            self._threads.alone(show)
        else:
            self._threads.settle()
            show()

    def _begin(self, tensor: TensorPlan) -> WeightTiles:
        """Prepare what all tiles of a weight share, as soon as few enough other weights have tiles left.

        With two weights at a time 2.2 GB on tmpfs take 9 % less time than with one.
        """
        if self._weight is None or tensor is not self._weight.tensor:
            if any(FAMILIES[update.family].builds for update in tensor.updates):
                self._threads.settle()  # what is built is built with all threads, see `LazyFactors.built`
            while len(self._begun) >= self.plan.memory.weights:
                wait(self._begun.popleft())
            self._begun.append([])
            self._weight = WeightTiles(tensor, self.dtype, self.device, self.factors, self.sampler, self._read)
        return self._weight

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

    def _stored_rows(self, job: Job, source: Buffer) -> Tensor:
        """A job's rows as they are stored, in the buffer that they were read into."""
        assert job.tensor is not None
        raw = self._raw[id(source)][job.read_at : job.read_at + job.read_bytes]
        return matrix(raw, job.tensor.source.dtype, job.tiles[-1].here.stop, job.tensor.row_elements)

    def _read(self, ref: TensorRef, start: int, size: int) -> Tensor:
        """Bytes of a stored tensor."""
        data = bytearray(size)
        with self.factors.lock:
            self._open_file(ref.uri).read_into(ref.offset + start, memoryview(data))
        return torch.frombuffer(data, dtype=torch.uint8)


def _done() -> None:
    """There is nothing to wait for."""


class ComputeThreads:
    """Threads in each of which torch computes with one thread. `close` ends them.

    So no product waits for another thread, and torch's pool does not compete with the threads that read and write. The
    bits of a large product do not depend on the number of threads; those of a small one may, see `alone`.
    """

    def __init__(self, count: int) -> None:
        #: Torch's default number of threads.
        self.default = torch.get_num_threads()
        self.count = count
        self._running: set[Future[None]] = set()
        # All begin now: to set torch's number of threads in one sets MKL's for the whole process, which must not happen
        # while `alone` computes.
        ready = threading.Barrier(count + 1)

        def begin() -> None:
            try:
                torch.set_num_threads(1)
                ready.wait(_PATIENCE)
            except BaseException:
                ready.abort()

        self._pool = ThreadPoolExecutor(count, "shardmerge-compute", begin)
        try:
            for _ in range(count):
                self._pool.submit(int)
            ready.wait(_PATIENCE)
        except BaseException as error:
            ready.abort()
            self.close()
            if isinstance(error, threading.BrokenBarrierError):
                raise MemoryError("a thread that computes has ended before it began") from None
            raise
        torch.set_num_threads(1)

    def share(self, items: Iterable[Item], work: Callable[[Item], None]) -> Sequence[Future[None]]:
        """Hand out items, each to the next free thread, and return at once.

        The futures are done when all items are. If an item raises, others may be left out.
        """
        left = deque(items)

        def work_on() -> None:
            while left:
                try:
                    item = left.popleft()
                except IndexError:  # another thread was faster
                    return
                work(item)

        futures = [self._pool.submit(work_on) for _ in range(min(self.count, len(left)))]
        self._running = {future for future in self._running if not future.done()}.union(futures)
        return futures

    def alone(self, work: Callable[[], None]) -> None:
        """Work in this thread with torch's default number of threads, while no other thread computes.

        The bits of a product of few rows depend on that number, so PEFT's bits need PEFT's number.
        """
        self.settle()
        torch.set_num_threads(self.default)
        try:
            work()
        finally:
            torch.set_num_threads(1)

    def settle(self) -> None:
        """Wait until every thread is idle."""
        wait(self._running)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.default)
