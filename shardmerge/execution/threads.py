"""The threads that compute, and the items that are shared out among them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from shardmerge.spec.plans import TensorPlan

#: Seconds in which a thread must have begun; where memory has run out, one may end without having said so.
_PATIENCE = 60.0

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
        try:
            for helper in self._helpers:
                helper.start()
            ready.wait(_PATIENCE)
        except threading.BrokenBarrierError:
            raise MemoryError("a thread that computes has ended before it began") from None
        finally:
            if ready.n_waiting:  # those that could begin do not wait for those that could not
                ready.abort()
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
        try:
            torch.set_num_threads(1)
            ready.wait()
        except threading.BrokenBarrierError:
            return
        except BaseException:
            ready.abort()
            raise
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
