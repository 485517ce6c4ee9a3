"""The steps of planning, as `shardmerge.system.events` records them."""

from __future__ import annotations

from collections.abc import Sequence

from shardmerge.sources.source import Source
from shardmerge.spec.plans import MergePlan
from shardmerge.spec.tensors import SourceFile
from shardmerge.spec.words import words_for
from shardmerge.system.events import Stopwatch, event


def opened(what: str, source: Source, tensors: int, files: Sequence[SourceFile], watch: Stopwatch) -> None:
    """The headers of a base or an adapter were read."""
    size, seconds = sum(file.size for file in files), watch.lap()
    event(
        f"{what}-opened",
        f"opened the {what} {source.location}: {tensors} tensors, {len(files)} files, {size:,} bytes, {seconds:.1f} s",
        location=source.location,
        revision=source.revision,
        tensors=tensors,
        files=len(files),
        bytes=size,
        seconds=seconds,
    )


def planned(plan: MergePlan, seconds: float) -> None:
    """A plan was made."""
    words, updated = words_for(plan.adapters), plan.totals.updated
    event(
        "planned",
        f"planned in {seconds:.1f} s: {words.noun} of {plan.base.location} into {plan.output}, "
        f"{len(plan.shards)} shards, {updated} tensors with updates",
        kind=words.noun,
        seconds=seconds,
        output=plan.output,
        digest=plan.digest,
        config=plan.config,
        shards=len(plan.shards),
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        updated=updated,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        memory=plan.memory.total,
    )
