"""Three stages over one pool: order, bounds, errors of every stage, and no thread that stays."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest

from shardmerge.execution.pipeline import Buffer, Channel, StoppedError, Work, Worked, _Pipeline, pool, run

#: Far more than any of these tests takes; where a deadlock is, the stacks of all threads are printed.
DEADLOCK_SECONDS = 60.0
BUFFERS = 3
JOBS = 40


@pytest.fixture(autouse=True)
def _no_deadlock_and_no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    faulthandler.dump_traceback_later(DEADLOCK_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert set(threading.enumerate()) <= before


def buffers(count: int = BUFFERS) -> list[Buffer]:
    return pool(count, 16)


def nothing(job: int, buffer: Buffer) -> None:
    pass


def same(job: int, source: Buffer, empty: Callable[[], Buffer]) -> Worked:
    """Work that writes from the buffer that was read into."""
    return Worked(source)


def other(job: int, source: Buffer, empty: Callable[[], Buffer]) -> Worked:
    """Work that writes from a buffer of its own."""
    target = empty()
    target.view[:4] = source.view[:4]
    return Worked(target)


def then(work: Callable[[int, Buffer], None]) -> Work[int]:
    def worked(job: int, source: Buffer, empty: Callable[[], Buffer]) -> Worked:
        work(job, source)
        return Worked(source)

    return worked


@dataclass
class Log:
    """Stages that note what they are called with, and where."""

    read: list[int] = field(default_factory=list)
    worked: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    threads: dict[str, set[str]] = field(default_factory=dict)
    contents: list[bytes] = field(default_factory=list)

    def _note(self, stage: str) -> None:
        self.threads.setdefault(stage, set()).add(threading.current_thread().name)

    def on_read(self, job: int, buffer: Buffer) -> None:
        self._note("read")
        self.read.append(job)
        buffer.view[:2] = job.to_bytes(2, "big")

    def on_work(self, job: int, source: Buffer, empty: Callable[[], Buffer]) -> Worked:
        self._note("work")
        self.worked.append(job)
        assert bytes(source.view[:2]) == job.to_bytes(2, "big")
        target = source if job % 3 else empty()
        target.view[:4] = job.to_bytes(2, "big") + (job * 3).to_bytes(2, "big")
        return Worked(target)

    def on_write(self, job: int, buffer: Buffer) -> None:
        self._note("write")
        self.written.append(job)
        self.contents.append(bytes(buffer.view[:4]))

    def on_done(self, job: int) -> None:
        self._note("done")
        self.done.append(job)

    def run(self, jobs: Iterable[int], pool: Iterable[Buffer]) -> None:
        run(jobs, pool, self.on_read, self.on_work, self.on_write, self.on_done)


# --- the ordinary way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("jobs", [0, 1, 2, JOBS])
def test_every_job_goes_through_every_stage_in_order(jobs: int, count: int) -> None:
    log = Log()
    log.run(range(jobs), buffers(count))
    assert log.read == log.worked == log.written == log.done == list(range(jobs))
    assert log.contents == [job.to_bytes(2, "big") + (job * 3).to_bytes(2, "big") for job in range(jobs)]


def test_work_and_done_run_in_the_callers_thread_and_the_others_in_their_own() -> None:
    log = Log()
    log.run(range(JOBS), buffers())
    caller = {threading.current_thread().name}
    assert log.threads["work"] == log.threads["done"] == caller
    assert log.threads["read"] == {"shardmerge-read"} and log.threads["write"] == {"shardmerge-write"}


def test_all_is_written_when_run_returns() -> None:
    release = threading.Event()
    written = []

    def write(job: int, buffer: Buffer) -> None:
        if job == 0:
            release.wait(DEADLOCK_SECONDS)
        written.append(job)

    run(range(2), buffers(), nothing, same, write, lambda job: release.set() if job == 1 else None)
    assert written == [0, 1]


def test_the_same_pool_serves_again_after_an_error() -> None:
    pool = buffers()
    with pytest.raises(KeyError):
        run(range(JOBS), pool, nothing, then(raising(3, KeyError())), nothing, lambda job: None)
    log = Log()
    log.run(range(JOBS), pool)
    assert log.written == list(range(JOBS))


# --- the pool is the bound --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["same", "other"])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_buffer_is_never_used_for_two_things_at_once(count: int, work: str) -> None:
    lock = threading.Lock()
    in_use: dict[int, int] = {}
    most = 0

    def use(job: int, buffer: Buffer) -> None:
        nonlocal most
        with lock:
            assert in_use.setdefault(id(buffer), job) == job
            most = max(most, len(in_use))

    def let_go(job: int, buffer: Buffer) -> None:
        with lock:
            assert in_use.pop(id(buffer)) == job

    def working(job: int, source: Buffer, empty: Callable[[], Buffer]) -> Worked:
        if work == "same":
            return Worked(source)
        target = empty()
        use(job, target)
        return Worked(target, lambda: let_go(job, source))

    run(range(200), buffers(count), use, working, let_go, lambda job: None)
    assert 1 <= most <= count and not in_use


def test_a_slow_writer_holds_the_reader_back_until_one_buffer_is_left() -> None:
    log = Log()
    read_all_it_can = threading.Event()
    seen_while_waiting: list[int] = []

    def read(job: int, buffer: Buffer) -> None:
        log.on_read(job, buffer)
        if job == BUFFERS - 2:
            read_all_it_can.set()

    def write(job: int, buffer: Buffer) -> None:
        if job == 0:
            assert read_all_it_can.wait(DEADLOCK_SECONDS)
            # The reader has had every buffer but the last; whatever time it is given, it does not take that.
            threading.Event().wait(0.05)
            seen_while_waiting.extend(log.read)
        log.written.append(job)

    run(range(JOBS), buffers(), read, same, write, log.on_done)
    assert seen_while_waiting == list(range(BUFFERS - 1))
    assert log.written == list(range(JOBS))


def test_what_is_written_is_complete_and_its_source_is_free_by_then() -> None:
    """Of three buffers, two are read into again while the first is written."""
    complete: set[int] = set()
    read_on = threading.Event()

    def read(job: int, buffer: Buffer) -> None:
        if job == 1:
            read_on.set()

    def work(job: int, source: Buffer, empty: Callable[[], Buffer]) -> Worked:
        return Worked(empty(), lambda: complete.add(job))

    def write(job: int, buffer: Buffer) -> None:
        assert job in complete
        assert read_on.wait(DEADLOCK_SECONDS)

    run(range(JOBS), buffers(3), read, work, write, lambda job: None)
    assert complete == set(range(JOBS))


def test_jobs_are_made_when_they_are_needed() -> None:
    made: list[int] = []
    log = Log()
    lead: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(JOBS):
            made.append(job)
            yield job

    def write(job: int, buffer: Buffer) -> None:
        lead.append(len(made) - job)
        log.on_write(job, buffer)

    run(jobs(), buffers(), log.on_read, log.on_work, write, log.on_done)
    # One more than the buffers: the reader asks for a job before it asks for a buffer.
    assert max(lead) <= BUFFERS + 1


# --- errors -----------------------------------------------------------------------------------------------------------


class OneError(Exception):
    pass


def raising(at: int, error: BaseException) -> Callable[[int, Buffer], None]:
    def stage(job: int, buffer: Buffer) -> None:
        if job == at:
            raise error

    return stage


@pytest.mark.parametrize("at", [0, 1, BUFFERS, JOBS - 1], ids="job-{}".format)
@pytest.mark.parametrize("stage", ["jobs", "read", "work", "write", "done"])
@pytest.mark.parametrize("kind", [OneError, KeyboardInterrupt, SystemExit, MemoryError], ids=lambda kind: kind.__name__)
def test_an_error_of_any_stage_surfaces_as_itself(stage: str, kind: type[BaseException], at: int) -> None:
    error = kind("here")
    log = Log()

    def jobs() -> Iterator[int]:
        for job in range(JOBS):
            if stage == "jobs" and job == at:
                raise error
            yield job

    def done(job: int) -> None:
        log.on_done(job)
        if stage == "done" and job == at:
            raise error

    failing = raising(at, error)
    with pytest.raises(kind) as caught:
        run(
            jobs(),
            buffers(),
            failing if stage == "read" else log.on_read,
            then(failing) if stage == "work" else same,
            failing if stage == "write" else log.on_write,
            done,
        )
    assert caught.value is error
    # Nothing after the failed job has been handed on by the stage that failed.
    reached = {"jobs": log.read, "read": log.done, "work": log.done, "write": [], "done": log.done}[stage]
    assert all(job <= at for job in reached)


@pytest.mark.parametrize("stage", ["read", "work"])
def test_the_writer_may_finish_what_it_was_given_before_an_error_and_nothing_else(stage: str) -> None:
    log = Log()
    failing = raising(5, OneError())
    with pytest.raises(OneError):
        run(
            range(JOBS),
            buffers(),
            failing if stage == "read" else nothing,
            then(failing) if stage == "work" else same,
            log.on_write,
            log.on_done,
        )
    assert log.written == list(range(len(log.written))) and len(log.written) <= 5


def test_a_failed_writer_stops_a_reader_that_waits_for_a_buffer() -> None:
    reading = threading.Event()

    def read(job: int, buffer: Buffer) -> None:
        if job == BUFFERS - 2:
            reading.set()

    def write(job: int, buffer: Buffer) -> None:
        assert reading.wait(DEADLOCK_SECONDS)
        raise OneError

    with pytest.raises(OneError):
        run(range(JOBS), buffers(), read, same, write, lambda job: None)


def test_a_failed_reader_stops_a_worker_that_waits() -> None:
    with pytest.raises(OneError):
        run(range(JOBS), buffers(), raising(0, OneError()), same, nothing, lambda job: None)


def test_an_interrupt_waits_for_a_write_that_is_under_way() -> None:
    # The buffers belong to the caller again when run has returned, so no stage may still be using one.
    writing, interrupted = threading.Event(), threading.Event()
    finished = []

    def write(job: int, buffer: Buffer) -> None:
        writing.set()
        assert interrupted.wait(DEADLOCK_SECONDS)
        finished.append(job)

    def work(job: int, buffer: Buffer) -> None:
        if job == 1:
            assert writing.wait(DEADLOCK_SECONDS)
            interrupted.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(range(JOBS), buffers(), nothing, then(work), write, lambda job: None)
    assert finished == [0]


def test_of_two_errors_the_first_is_kept() -> None:
    pipeline: _Pipeline[int] = _Pipeline([], [], nothing, nothing)
    first = OneError()

    def fail(error: BaseException) -> Callable[[], None]:
        def stage() -> None:
            raise error

        return stage

    pipeline.guarded(fail(first))
    pipeline.guarded(fail(ValueError()))
    pipeline.guarded(fail(StoppedError()))
    assert pipeline.error is first


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_stopped_channel_wakes_who_waits_and_refuses_who_comes() -> None:
    channel: Channel[int] = Channel()
    outcome: list[str] = []

    def wait() -> None:
        try:
            channel.get()
        except StoppedError:
            outcome.append("stopped")

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    channel.stop()
    for thread in threads:
        thread.join(DEADLOCK_SECONDS)
    assert outcome == ["stopped"] * 3
    channel.put(1)
    with pytest.raises(StoppedError):
        channel.get()


def test_a_channel_gives_first_what_came_first() -> None:
    channel = Channel([1, 2])
    channel.put(3)
    assert [channel.get() for _ in range(3)] == [1, 2, 3]


def test_buffers_lie_side_by_side_and_begin_on_pages() -> None:
    made = pool(3, 2 * mmap.PAGESIZE)
    starts = [ctypes.addressof(ctypes.c_char.from_buffer(buffer.view)) for buffer in made]
    assert [start - starts[0] for start in starts] == [0, 2 * mmap.PAGESIZE, 4 * mmap.PAGESIZE]
    assert starts[0] % mmap.PAGESIZE == 0
    assert all(len(buffer.view) == 2 * mmap.PAGESIZE and not buffer.view.readonly for buffer in made)
