"""Three stages over one fixed pool of buffers: read → work → write.

Reading and writing have a thread each. The caller's thread hands out the work, reports progress and raises errors. A
stage that needs a buffer waits until one is free. An error or an interrupt in any stage stops the others, and no thread
outlives `run`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from shardmerge.system.aligned_memory import pages

Item = TypeVar("Item")
Job = TypeVar("Job")


class Buffer:
    """Page-aligned memory that is reused."""

    def __init__(self, view: memoryview) -> None:
        self.view = view


def pool(count: int, size: int) -> list[Buffer]:
    """Buffers of ``size`` bytes, a whole number of pages, side by side in one piece of memory."""
    memory = pages(count * size)
    return [Buffer(memory[start : start + size]) for start in range(0, count * size, size)]


class StoppedError(Exception):
    """Raised in a stage that waits when another stage has failed."""


class Channel(Generic[Item]):
    """A queue that can be stopped, which wakes all that wait for an item. The pool bounds its length."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._items = deque(items)
        self._changed = threading.Condition()
        self._stopped = False

    def put(self, item: Item) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def get(self, leave: int = 0) -> Item:
        """The first item, as soon as there are more than ``leave``."""
        with self._changed:
            while len(self._items) <= leave and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise StoppedError
            return self._items.popleft()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Worked:
    """A buffer for the writer, complete when ``wait`` returns."""

    buffer: Buffer
    wait: Callable[[], object] = lambda: None


Work = Callable[[Job, Buffer, Callable[[], Buffer]], Worked]


class _Pipeline(Generic[Job]):
    def __init__(
        self,
        jobs: Iterable[Job],
        buffers: Iterable[Buffer],
        read: Callable[[Job, Buffer], None],
        write: Callable[[Job, Buffer], None],
    ) -> None:
        self.jobs = jobs
        self.read = read
        self.write = write
        self.free = Channel(buffers)
        self.filled: Channel[tuple[Job, Buffer] | None] = Channel()
        self.ready: Channel[tuple[Job, Buffer, Worked] | None] = Channel()
        self.error: BaseException | None = None
        self._error_lock = threading.Lock()

    def reading(self) -> None:
        for job in self.jobs:
            # The last free buffer is for output: no input becomes free before that is written.
            buffer = self.free.get(leave=1)
            self.read(job, buffer)
            self.filled.put((job, buffer))
        self.filled.put(None)

    def writing(self) -> None:
        while (entry := self.ready.get()) is not None:
            job, source, worked = entry
            worked.wait()
            if worked.buffer is not source:
                self.free.put(source)
            self.write(job, worked.buffer)
            self.free.put(worked.buffer)

    def guarded(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except StoppedError:
            pass
        except BaseException as error:
            with self._error_lock:
                self.error = self.error or error
            self.stop()

    def stop(self) -> None:
        for channel in (self.free, self.filled, self.ready):
            channel.stop()


def run(
    jobs: Iterable[Job],
    buffers: Iterable[Buffer],
    read: Callable[[Job, Buffer], None],
    work: Work[Job],
    write: Callable[[Job, Buffer], None],
    done: Callable[[Job], None],
) -> None:
    """Take every job through the three stages, in order.

    ``jobs`` and ``read`` run in the reading thread, ``write`` in the writing thread, ``work`` and ``done`` in the
    caller's. ``work`` gets the buffer that was read into, and a function that returns an empty one; it may write to
    either. ``done`` is called when a job is handed to the writer. At least two buffers are needed. Raises the first
    error of any stage.
    """
    pipeline = _Pipeline(jobs, buffers, read, write)
    threads = [
        threading.Thread(target=pipeline.guarded, args=(stage,), name=f"shardmerge-{name}", daemon=True)
        for name, stage in (("read", pipeline.reading), ("write", pipeline.writing))
    ]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        while (entry := pipeline.filled.get()) is not None:
            job, buffer = entry
            pipeline.ready.put((job, buffer, work(job, buffer, pipeline.free.get)))
            done(job)
        pipeline.ready.put(None)
        threads[1].join()
    except StoppedError:
        pass  # the stage that failed says why
    finally:
        pipeline.stop()
        for thread in started:  # the system may have refused one
            thread.join()
    if pipeline.error is not None:
        raise pipeline.error
