"""Carry out a plan: lock, resume, merge the shards that are left, commit."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import changing_updates
from shardmerge.errors import (
    ChangedError,
    FormatError,
    OutputError,
    ShardmergeError,
    SourceError,
)
from shardmerge.planning.planner import bytes_read
from shardmerge.reporting.merge_report import (
    MergeReport,
    fidelity_by_kind,
    fidelity_warnings,
    merged_dtype,
    sizes_by_format,
)
from shardmerge.reporting.record import record
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import MergePlan, Receipt, ShardPlan
from shardmerge.spec.words import words_for
from shardmerge.system.events import Stopwatch
from shardmerge.system.memory_use import WorkingSet, peak_memory

if TYPE_CHECKING:
    from shardmerge.destinations.journal import Journal
from shardmerge.api.progress import Progress

Failure = TypeVar("Failure", bound=ShardmergeError)


def carry_out(plan: MergePlan, progress: Callable[[Progress], None], started: float) -> MergeReport:
    from shardmerge.destinations.journal import Journal
    from shardmerge.destinations.shard_writer import SafetensorsSink
    from shardmerge.execution.engine import Engine
    from shardmerge.execution.executors import SerialExecutor
    from shardmerge.planning.fingerprint import with_contents
    from shardmerge.reporting.steps import ShardSteps, begun, committed

    torch_version = importlib.metadata.version("torch")  # to import it would take a second
    engine = Engine(plan)
    try:
        with Journal(Path(plan.output), plan.overwrite) as journal:
            try:
                watch = Stopwatch()
                journal.begin(with_contents(plan, torch_version))
                begun(plan, journal.digest, watch.lap())
            except SourceError as error:
                raise _and(error, "Nothing was changed") from None
            except OutputError as error:
                raise _and(error, journal.standing()) from None
            sink = SafetensorsSink(plan, journal)
            counter = _Counter(plan, progress)

            def merge_shard(shard: ShardPlan) -> Receipt:
                counter.begin(shard)
                steps = ShardSteps(shard, engine.seconds)
                with sink.writer(shard) as writer:
                    receipt = engine.merge_shard(shard, writer, counter.advance)
                    writer.commit()
                journal.record(receipt)
                steps.finished(receipt)
                return receipt

            try:
                kept = _take_up(plan, journal, progress)
                open_shards = [shard for shard in plan.shards if shard.name not in kept]
                counter.skip(shard for shard in plan.shards if shard.name in kept)
                made = {receipt.shard: receipt for receipt in SerialExecutor().map(merge_shard, open_shards)}
                receipts = [(kept | made)[shard.name] for shard in plan.shards]
                damaged, working_set = journal.damaged, engine.working_set
                report = _report(plan, sink.files(), receipts, open_shards, damaged, working_set, started)
                watch.lap()
                sink.commit(record(plan, report, receipts, journal.digest, torch_version))
                committed(plan, report, watch.lap())
            except FormatError as error:
                # Something in the files themselves: no second run can succeed, so nothing is kept for one.
                journal.discard()
                raise _and(error, f"Nothing is left of it in {plan.output}{_still_whole(journal)}") from None
            except ChangedError as error:
                raise _and(
                    error,
                    f"{journal.standing()}. What was finished is kept, but it is of the file as it was: run the "
                    "same command again when that is back in its place, or start anew with overwrite=True",
                ) from None
            except (OutputError, SourceError) as error:
                kept_on = "What was finished is kept; run the same command again to resume it"
                raise _and(error, f"{journal.standing()}. {kept_on}") from None
            try:
                journal.finish()
            except OutputError as error:
                raise _and(error, f"The model in {plan.output} is complete; only its work folder is left") from None
            return report
    finally:
        engine.close()


def _still_whole(journal: Journal) -> str:
    """What is said besides, where there is a model that the merge was to replace."""
    return f". {journal.standing()}" if journal.holds_model() else ""


def _and(error: Failure, state: str) -> Failure:
    """The same error, which also says what state the disk is in."""
    return type(error)(f"{error}. {state}")


def _take_up(plan: MergePlan, journal: Journal, progress: Callable[[Progress], None]) -> dict[str, Receipt]:
    """What an earlier run has finished and the disk has kept, by the shard's name."""
    from shardmerge.reporting.steps import resumed

    found = journal.finished(plan.shards)
    done, total = 0, sum(shard.nbytes for shard in found)
    receipts: dict[str, Receipt] = {}
    for number, shard in enumerate(found, 1):

        def advance(count: int, name: str = shard.name, number: int = number) -> None:
            nonlocal done
            done += count
            progress(Progress(done, total, name, number, len(found), "checking"))

        watch = Stopwatch()
        receipt = journal.take_up(shard, plan.sha256, advance)
        resumed(shard, receipt is not None, watch.lap())
        if receipt is not None:
            receipts[shard.name] = receipt
    return receipts


class _Counter:
    """Adds up bytes and tells the caller."""

    def __init__(self, plan: MergePlan, progress: Callable[[Progress], None]) -> None:
        self._numbers = {shard.name: number for number, shard in enumerate(plan.shards, 1)}
        self._total = sum(shard.data_bytes for shard in plan.shards)
        self._done = 0
        self._shard = ""
        self._doing = words_for(plan.adapters).doing
        self._progress = progress

    def skip(self, shards: Iterable[ShardPlan]) -> None:
        self._done += sum(shard.data_bytes for shard in shards)

    def begin(self, shard: ShardPlan) -> None:
        self._shard = shard.name
        self.advance(0)

    def advance(self, count: int) -> None:
        self._done += count
        number, shards = self._numbers[self._shard], len(self._numbers)
        self._progress(Progress(self._done, self._total, self._shard, number, shards, self._doing))


def _report(
    plan: MergePlan,
    files: list[str],
    receipts: list[Receipt],
    made: list[ShardPlan],
    damaged: list[str],
    working_set: WorkingSet,
    started: float,
) -> MergeReport:
    active = {number for receipt in receipts for number in receipt.active_adapters}
    active |= {of.adapter for _, of in changing_updates(plan) if not FAMILIES[of.family].zero_means_nothing}
    idle = [info.location for number, info in enumerate(plan.adapters) if number not in active]
    nothing = "changes nothing: every lora_B is zero, as before training"
    warnings: list[str] = [Warned(f"adapter {location} {nothing}") for location in idle]
    warnings += [f"{name}: the disk had not kept what an earlier run wrote; it was made again" for name in damaged]
    by_kind = fidelity_by_kind(receipts)
    warnings += fidelity_warnings(plan, by_kind)
    merged, made_bytes = sum(shard.nbytes for shard in plan.shards), sum(shard.nbytes for shard in made)
    return MergeReport(
        output=plan.output,
        files=tuple(files),
        targets=len({tensor.source.name for tensor, _ in changing_updates(plan)}),
        adapter_bytes=sum(info.nbytes for info in plan.adapters),
        base_bytes=plan.base.nbytes,
        merged_bytes=merged,
        merged_dtype=merged_dtype(plan),
        bytes_read=bytes_read(made),
        bytes_written=plan.bytes_written - merged + made_bytes,
        shards_reused=len(plan.shards) - len(made),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory(),
        working_set_bytes=working_set.grown(),
        sizes_bytes=sizes_by_format(plan),
        fidelity=by_kind,
        warnings=(*plan.warnings, *warnings),
        kind=words_for(plan.adapters).noun,
    )
