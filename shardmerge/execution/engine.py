"""Merge one shard of a plan: read → work → write.

Tensors that do not change are copied as runs of bytes, without torch. All others are computed tile by tile. If a plan
has any of these, a thread imports torch from the start, while the tensors before the first of them are copied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING

from shardmerge.adapters.work import missing
from shardmerge.destinations.destination import Handle, Writer
from shardmerge.errors import ShardmergeError
from shardmerge.execution import pipeline
from shardmerge.execution.jobs import Job, jobs
from shardmerge.execution.pipeline import Buffer, Worked
from shardmerge.sources.source import OpenReaders
from shardmerge.spec.plans import MergePlan, ShardPlan, TensorPlan
from shardmerge.spec.receipts import Receipt
from shardmerge.spec.tensors import BUFFER_SLACK
from shardmerge.spec.updates import Update
from shardmerge.system.events import LOG, Stopwatch, event
from shardmerge.system.garbage import no_garbage_collection
from shardmerge.system.memory_use import WorkingSet

if TYPE_CHECKING:
    from shardmerge.execution.worker import TileWorker


def merge_shard(
    plan: MergePlan,
    shard: ShardPlan,
    destination: Handle,
    *,
    engine: Engine | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Receipt:
    """Merge one shard of a plan and commit it to its destination, in this process or another, on any machine.

    ``engine`` is the plan's engine in this process, which stays warm between shards; by default one is made for this
    shard. ``advance`` gets the bytes done, in the calling thread, and may raise to stop.
    """
    if engine is None:
        with Engine(plan) as engine:
            return merge_shard(plan, shard, destination, engine=engine, advance=advance)
    shard = shard.unpacked()
    steps = ShardSteps(shard, engine.seconds)
    with destination.writer(shard) as writer:
        receipt = engine.merge_shard(shard, writer, advance)
    steps.finished(receipt)
    return receipt


class Engine(AbstractContextManager["Engine"]):
    """Buffers and workspace of a process for a merge, which its shards use one after the other."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan
        self.buffers = pipeline.pool(plan.memory.buffers, plan.memory.buffer_bytes + BUFFER_SLACK)
        self.working_set = WorkingSet([buffer.view for buffer in self.buffers])
        # Three sets, for three threads. Each needs all files: an adapter's tensor may be a source, and a weight of the
        # base a factor.
        files = [*plan.base.files, *(file for adapter in plan.adapters for file in adapter.files)]
        self._sources, self._factors, self._shared = OpenReaders(files), OpenReaders(files), OpenReaders(files)
        self._worker: TileWorker | None = None
        #: Seconds in which the threads that read and write have worked or waited for the disk, and in which those that
        #: compute have worked, on average.
        self.seconds = {"reading": 0.0, "working": 0.0, "writing": 0.0}
        self._import = threading.Thread(target=_import_compute, name="shardmerge-import", daemon=True)
        if any(tensor.tiles for shard in plan.shards for tensor in shard.tensors):
            self._import.start()
        if plan.compute_device not in ("auto", "cpu"):
            self._compute()  # a device that is missing is an error before anything is written

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the files. They are opened again if they are needed again."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
        self._sources.close()
        self._factors.close()
        self._shared.close()

    def merge_shard(self, shard: ShardPlan, writer: Writer, advance: Callable[[int], None]) -> Receipt:
        """Write one shard through ``writer`` and commit it."""
        try:
            self._write_shard(shard, writer, advance)
        except BaseException:
            self.close()  # so that nothing of this shard gets into the receipt of the next
            raise
        if self._worker is None:
            return writer.commit()
        active, fidelity, seconds = self._worker.take()
        self.seconds["working"] += seconds
        return writer.commit(active, fidelity)

    def _write_shard(self, shard: ShardPlan, writer: Writer, advance: Callable[[int], None]) -> None:
        shard = shard.unpacked()  # updates are compared by identity

        def read(job: Job, buffer: Buffer) -> None:
            if job.read_bytes:
                self._sources.get(job.uri).read_block(buffer.view, job.read_at, job.read_offset, job.read_bytes)

        def work(job: Job, source: Buffer, empty: Callable[[], Buffer]) -> Worked:
            if job.is_prepass:
                self._compute().prepass(job, source)
                return Worked(source)
            target = source if job.is_in_place else empty()
            if job.tensor is not None:
                return Worked(target, self._compute().merge(job, source, target))
            if target is not source:
                read = source.view[job.read_at : job.read_at + job.read_bytes]
                target.view[job.write_at : job.write_at + job.write_bytes] = read
            return Worked(target)

        def write(job: Job, target: Buffer) -> None:
            if not job.write_bytes:
                return
            source = None
            if job.tensor is None and writer.shares:
                source = self._shared.get(job.uri).fileno(), job.read_offset
            elif job.encode_at != job.write_at:
                made = target.view[job.encode_at : job.encode_at + job.write_bytes]
                target.view[job.write_at : job.write_at + job.write_bytes] = made
            writer.write_block(target.view, job.write_at, job.write_offset, job.write_bytes, source)

        pipeline.run(
            jobs(shard, self.plan.memory.buffer_bytes),
            self.buffers,
            self._timed("reading", read),
            work,
            self._timed("writing", write),
            lambda job: advance(job.write_bytes),
        )
        self._sources.check()
        self._factors.check()
        self._shared.check()  # what was read and hashed is what was shared
        self._must_be_done(shard)

    def _timed(self, stage: str, step: Callable[[Job, Buffer], None]) -> Callable[[Job, Buffer], None]:
        def timed(job: Job, buffer: Buffer) -> None:
            started = time.perf_counter()
            step(job, buffer)
            self.seconds[stage] += time.perf_counter() - started

        return timed

    def _must_be_done(self, shard: ShardPlan) -> None:
        """Raise, before the shard is committed, if an update of the plan was not applied to all of its region."""
        for tensor in shard.tensors:
            if tensor.updates and (reason := missing(tensor, partial(self._applied, tensor))):
                raise ShardmergeError(f"{reason}: a fault of shardmerge, please report it; the merge was stopped")

    def _applied(self, tensor: TensorPlan, update: Update) -> int:
        return self._worker.applied(tensor, update) if self._worker else 0

    def _compute(self) -> TileWorker:
        if self._worker is None:
            if self._import.is_alive():
                self._import.join()
            from shardmerge.execution.worker import TileWorker

            self.working_set.begin()
            self._worker = TileWorker(self.plan, self.buffers, self._factors.get)
        return self._worker


def _import_compute() -> None:
    # An error occurs again, and is reported, where the module is needed.
    with suppress(Exception), no_garbage_collection():
        import shardmerge.execution.worker  # noqa: F401


class ShardSteps:
    """Records the events of a shard: that it has started, and that it is finished and where the time went."""

    def __init__(self, shard: ShardPlan, seconds: Mapping[str, float]) -> None:
        """``seconds``: of each stage since the beginning of the merge; they keep counting."""
        self._shard, self._seconds, self._before = shard, seconds, dict(seconds)
        self._watch = Stopwatch()
        self._updates = sum(len(tensor.updates) for tensor in shard.tensors)
        event(
            "shard-started",
            f"{shard.name}: {len(shard.tensors)} tensors, {self._updates} updates, {shard.nbytes:,} bytes",
            shard=shard.name,
            tensors=len(shard.tensors),
            updates=self._updates,
            bytes=shard.nbytes,
        )

    def finished(self, receipt: Receipt) -> None:
        shard, total = self._shard, self._watch.lap()
        stages = {name: round(value - self._before[name], 3) for name, value in self._seconds.items()}
        self._targets()
        event(
            "shard-finished",
            f"{shard.name}: finished in {total:.1f} s "
            f"({', '.join(f'{name} {value:.1f} s' for name, value in stages.items())})",
            shard=shard.name,
            bytes_read=sum(tensor.source.nbytes for tensor in shard.tensors),
            bytes_written=shard.nbytes,
            updates=self._updates,
            seconds=total,
            stages=stages,
            checksums=dict(receipt.checksums),
        )

    def _targets(self) -> None:
        if not LOG.isEnabledFor(logging.DEBUG):
            return
        for tensor in self._shard.tensors:
            if tensor.updates:
                families = [update.family for update in tensor.updates]
                name = tensor.source.name
                text = f"{name}: {', '.join(families)}"
                event("updated", text, level=logging.DEBUG, tensor=name, families=families)
