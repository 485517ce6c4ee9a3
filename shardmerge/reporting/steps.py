"""The steps of a merge and a verification, as `shardmerge.system.events` records them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from shardmerge.reporting.merge_report import MergeReport
from shardmerge.spec.plans import MergePlan, Receipt, ShardPlan
from shardmerge.spec.words import words_for
from shardmerge.system.events import LOG, Stopwatch, event, notices

if TYPE_CHECKING:
    from shardmerge.verification.findings import VerifyReport


def begun(plan: MergePlan, digest: str, seconds: float) -> None:
    """The output is locked; ``digest`` is what its record will have."""
    noun = words_for(plan.adapters).noun
    event("begun", f"{noun} into {plan.output} begun", output=plan.output, digest=digest, seconds=seconds)


def resumed(shard: ShardPlan, is_kept: bool, seconds: float) -> None:
    """A shard of an earlier run was read again."""
    what = "is kept" if is_kept else "was not kept by the disk, and is made again"
    event(
        "shard-checked",
        f"{shard.name} of an earlier run {what} ({seconds:.1f} s)",
        shard=shard.name,
        kept=is_kept,
        bytes=shard.nbytes,
        seconds=seconds,
    )


class ShardSteps:
    """Records that work on a shard begins, and with `finished` that it has ended and where the time went."""

    def __init__(self, shard: ShardPlan, seconds: Mapping[str, float]) -> None:
        """``seconds`` are those of each stage since the beginning, which go on counting."""
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


def committed(plan: MergePlan, report: MergeReport, seconds: float) -> None:
    """The output is a model."""
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


def verified(report: VerifyReport) -> None:
    """A verification has ended, well or not."""
    level = logging.INFO if report.ok else logging.ERROR
    notices(report.notes)
    count = sum(report.counts.values())
    event(
        "verified",
        f"{report.output}: {count} problems, {len(report.unverified)} things that could not be verified",
        level=level,
        output=report.output,
        ok=report.ok,
        complete=report.complete,
        counts=report.counts,
        problems=[problem.text for problem in report.problems],
        unverified=list(report.unverified),
        seconds=round(report.seconds, 3),
        peak_memory=report.peak_memory_bytes,
    )
