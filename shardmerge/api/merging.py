"""Carry out a plan: lock, resume, merge the shards that are left, commit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from shardmerge.adapters.registry import FAMILIES
from shardmerge.api.progress import Progress
from shardmerge.destinations.contents import files_of
from shardmerge.destinations.destination import Destination, open_destination
from shardmerge.errors import ChangedError, FormatError, OutputError, ShardmergeError, SourceError
from shardmerge.execution.engine import merge_shard
from shardmerge.execution.executors import Executor
from shardmerge.planning.fingerprint import with_contents
from shardmerge.planning.totals import bytes_read
from shardmerge.reporting.merge_report import (
    MergeReport,
    fidelity_by_kind,
    fidelity_warnings,
    merged_dtype,
    sizes_by_format,
)
from shardmerge.reporting.record import record
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import MergePlan, ShardPlan, digest_of
from shardmerge.spec.receipts import Receipt
from shardmerge.spec.words import words_for
from shardmerge.system.events import Stopwatch, event, notices
from shardmerge.system.memory_use import peak_memory

Advance = Callable[[Progress], None]


def carry_out(plan: MergePlan, executor: Executor, progress: Advance, started: float) -> MergeReport:
    """Merge the shards that an earlier run did not finish. ``started`` is the start by `time.monotonic`."""
    torch_version = importlib.metadata.version("torch")  # importing it would take a second
    watch = Stopwatch()
    with executor.prepare(plan):
        with _explained(lambda error: "Nothing was changed"):
            fingerprint = with_contents(plan, torch_version)
        with open_destination(plan.output, plan.overwrite) as destination, _explained(partial(_left, destination)):
            found = destination.begin(plan, fingerprint)
            _record_begin(plan, digest_of(fingerprint), watch.lap())
            kept = _checked(plan, destination, found, progress)
            left = [shard for shard in plan.shards if shard.name not in kept]
            counter = _Counter(plan, left, progress)
            made = {}
            for receipt in executor.map(merge_shard, plan, left, destination.handle, counter.advance):
                made[receipt.shard] = receipt
                counter.complete(receipt.shard)
            receipts = [(kept | made)[shard.name] for shard in plan.shards]
            damaged = [name for name in found if name not in kept]
            report = _report_of(plan, receipts, left, damaged, executor.working_set, started)
            watch.lap()
            destination.finish(record(plan, report, receipts, digest_of(fingerprint), torch_version))
            report = dataclasses.replace(report, peak_memory_bytes=peak_memory())
            _record_end(plan, report, watch.lap())
            return report


@contextmanager
def _explained(state: Callable[[ShardmergeError], str]) -> Iterator[None]:
    """Add the ``state`` of the output to errors of files in the block."""
    try:
        yield
    except (FormatError, OutputError, SourceError) as error:
        raise type(error)(f"{error}. {state(error)}") from None


def _left(destination: Destination, error: ShardmergeError) -> str:
    """The state of the merge after an error. Work that no second run can use is removed."""
    if isinstance(error, FormatError):
        # The files themselves are wrong: no second run can succeed, so nothing is kept for one.
        destination.abort()
        whole = f". {destination.standing()}" if destination.holds_model else ""
        return f"Nothing is left of it in {destination.location}{whole}"
    if not destination.is_resumable:
        return destination.standing()
    if isinstance(error, ChangedError):
        return (
            f"{destination.standing()}. What was finished is kept, but it is of the file as it was: run the same "
            "command again when that is back in its place, or start anew with overwrite=True"
        )
    return f"{destination.standing()}. What was finished is kept; run the same command again to resume it"


def _checked(
    plan: MergePlan, destination: Destination, found: dict[str, Receipt], progress: Advance
) -> dict[str, Receipt]:
    """The receipts of shards that an earlier run finished and that the destination still has, by the shard's name."""
    shards = [shard for shard in plan.shards if shard.name in found]
    done, total = 0, sum(shard.nbytes for shard in shards)
    kept: dict[str, Receipt] = {}
    for number, shard in enumerate(shards, 1):

        def advance(count: int, name: str = shard.name, number: int = number) -> None:
            nonlocal done
            done += count
            progress(Progress(done, total, name, number, len(shards), "checking"))

        watch = Stopwatch()
        receipt = destination.check(found[shard.name], advance)
        _record_check(shard, receipt is not None, watch.lap())
        if receipt is not None:
            kept[shard.name] = receipt
    return kept


class _Counter:
    def __init__(self, plan: MergePlan, left: Sequence[ShardPlan], progress: Advance) -> None:
        self._numbers = {shard.name: number for number, shard in enumerate(plan.shards, 1)}
        self._total = sum(shard.data_bytes for shard in plan.shards)
        self._done = self._total - sum(shard.data_bytes for shard in left)
        self._left = Counter({shard.name: shard.data_bytes for shard in left})
        self._doing = words_for(plan.adapters).doing
        self._progress = progress

    def advance(self, shard: ShardPlan, count: int) -> None:
        self._count(shard.name, count)

    def complete(self, shard: str) -> None:
        """Count the bytes of a finished shard that are between its tensors."""
        if self._left[shard]:
            self._count(shard, self._left[shard])

    def _count(self, shard: str, count: int) -> None:
        self._done += count
        self._left[shard] -= count
        number, shards = self._numbers[shard], len(self._numbers)
        self._progress(Progress(self._done, self._total, shard, number, shards, self._doing))


def _record_begin(plan: MergePlan, digest: str, seconds: float) -> None:
    text = f"{words_for(plan.adapters).noun} into {plan.output} begun"
    event("begun", text, output=plan.output, digest=digest, seconds=seconds)


def _record_check(shard: ShardPlan, is_kept: bool, seconds: float) -> None:
    what = "is kept" if is_kept else "was not kept by the disk, and is made again"
    text = f"{shard.name} of an earlier run {what} ({seconds:.1f} s)"
    event("shard-checked", text, shard=shard.name, kept=is_kept, bytes=shard.nbytes, seconds=seconds)


def _record_end(plan: MergePlan, report: MergeReport, seconds: float) -> None:
    notices(report.warnings[len(plan.warnings) :])
    event(
        words_for(plan.adapters).done,
        f"{report.output} is complete: {report.bytes_read:,} bytes read, {report.bytes_written:,} written",
        output=report.output,
        targets=report.targets,
        bytes_read=report.bytes_read,
        bytes_written=report.bytes_written,
        shards_reused=report.shards_reused,
        seconds=round(report.seconds, 3),
        seconds_of_commit=seconds,
        peak_memory=report.peak_memory_bytes,
    )


def _report_of(
    plan: MergePlan,
    receipts: Sequence[Receipt],
    made: Sequence[ShardPlan],
    damaged: Sequence[str],
    working_set: int | None,
    started: float,
) -> MergeReport:
    """``made`` are the shards of this run, ``damaged`` those of an earlier run that the disk did not keep."""
    active = {number for receipt in receipts for number in receipt.active_adapters}
    active |= {kind.adapter for kind in plan.totals.targets if not FAMILIES[kind.family].neutral_if_zero}
    idle = [info.location for number, info in enumerate(plan.adapters) if number not in active]
    nothing = "changes nothing: every lora_B is zero, as before training"
    warnings: list[str] = [Warned(f"adapter {location} {nothing}") for location in idle]
    warnings += [f"{name}: the disk had not kept what an earlier run wrote; it was made again" for name in damaged]
    by_kind = fidelity_by_kind(receipts)
    warnings += fidelity_warnings(plan, by_kind)
    merged, made_bytes = sum(shard.nbytes for shard in plan.shards), sum(shard.nbytes for shard in made)
    return MergeReport(
        output=plan.output,
        files=tuple(files_of(plan)),
        targets=plan.totals.changed,
        adapter_bytes=sum(info.nbytes for info in plan.adapters),
        base_bytes=plan.base.nbytes,
        merged_bytes=merged,
        merged_dtype=merged_dtype(plan),
        bytes_read=plan.bytes_read if len(made) == len(plan.shards) else bytes_read(made),
        bytes_written=plan.bytes_written - merged + made_bytes,
        shards_reused=len(plan.shards) - len(made),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory(),
        working_set_bytes=working_set,
        sizes_bytes=sizes_by_format(plan),
        fidelity=by_kind,
        warnings=(*plan.warnings, *warnings),
        kind=words_for(plan.adapters).noun,
    )
