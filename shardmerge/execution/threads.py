"""The threads that compute, and the items that are shared out among them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

#: Seconds in which a thread must have begun; where memory has run out, one may end without having said so.
_PATIENCE = 60.0

Item = TypeVar("Item")


class ComputeThreads:
    """Threads in each of which torch computes with one thread; `close` ends them.

    So nothing is waited for within a product, and torch's pool does not compete with the threads that read and write.
    The bits of a large product do not depend on the number of threads. Those of a small one may: see `alone`.
    """

    def __init__(self, count: int) -> None:
        #: The number that torch takes by itself.
        self.default = torch.get_num_threads()
        self.count = count
        self._running: set[Future[None]] = set()
        # All begin now: a thread that sets torch's number of threads sets MKL's for the whole process, and must not do
        # so while `alone` computes.
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
        """Hand out items, each to the next thread that is free. Returns at once.

        The futures are done when all items are; where an item raises, other items may be left out.
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
        """Work here, while no other thread computes, with as many threads as torch takes by itself.

        The bits of a product of few rows depend on that number, so this makes them those of PEFT's.
        """
        self.settle()
        torch.set_num_threads(self.default)
        try:
            work()
        finally:
            torch.set_num_threads(1)

    def settle(self) -> None:
        """Wait until no thread works on anything."""
        wait(self._running)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.default)
