"""The report of a merge, from its plan and its receipts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import changing_updates
from shardmerge.destinations.contents import files_of
from shardmerge.planning.planner import bytes_read
from shardmerge.reporting.merge_report import (
    MergeReport,
    fidelity_by_kind,
    fidelity_warnings,
    merged_dtype,
    sizes_by_format,
)
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import MergePlan, Receipt, ShardPlan
from shardmerge.spec.words import words_for
from shardmerge.system.memory_use import peak_memory


def report_of(
    plan: MergePlan,
    receipts: Sequence[Receipt],
    made: Sequence[ShardPlan],
    damaged: Sequence[str],
    working_set: int | None,
    started: float,
) -> MergeReport:
    """What a merge did. It ``started`` then, by `time.monotonic`.

    ``made`` are the shards that this run has made, ``damaged`` those of an earlier run that the disk has not kept.
    """
    active = {number for receipt in receipts for number in receipt.active_adapters}
    active |= {of.adapter for _, of in changing_updates(plan) if not FAMILIES[of.family].neutral_if_zero}
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
        working_set_bytes=working_set,
        sizes_bytes=sizes_by_format(plan),
        fidelity=by_kind,
        warnings=(*plan.warnings, *warnings),
        kind=words_for(plan.adapters).noun,
    )
