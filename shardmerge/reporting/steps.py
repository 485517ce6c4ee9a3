"""The steps of a merge and a verification, as `shardmerge.system.events` records them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from shardmerge.reporting.merge_report import MergeReport
from shardmerge.spec.plans import MergePlan, ShardPlan
from shardmerge.spec.words import words_for
from shardmerge.system.events import event, notices

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
