"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shardmerge.adapters.registry import FAMILIES
from shardmerge.reporting.merge_report import merged_dtype
from shardmerge.reporting.text import count, human_bytes, labelled, notices, table
from shardmerge.spec.plans import MergePlan, jsonable


def target_rows(plan: MergePlan) -> list[dict[str, Any]]:
    """Targets by the last part of the module's name, shape, family, rank, scaling and adapter.

    ``scaling`` is empty where the family does not add; ``rank`` is 0 where it has none.
    """
    return [
        {
            "module": kind.module,
            "count": kind.count,
            "shape": list(kind.shape),
            "family": kind.family,
            "rank": kind.rank,
            "scaling": list(kind.scalings) if FAMILIES[kind.family].adds else [],
            "adapter": kind.adapter,
        }
        for kind in plan.totals.targets
    ]


def describe_plan(plan: MergePlan) -> str:
    parts = [_describe_sources(plan), _describe_targets(plan), _describe_output(plan)]
    if plan.warnings:
        parts.append("\n".join(map(labelled, plan.warnings)))
    return "\n\n".join(parts)


def _at(location: str, revision: str | None) -> str:
    return f"{location}@{revision}" if revision else location


def _describe_sources(plan: MergePlan) -> str:
    base = plan.base
    rows = [
        (
            "base",
            _at(base.location, base.revision),
            f"{human_bytes(base.nbytes)}, {count(base.shards, 'shard')}, {count(base.tensors, 'tensor')}",
        )
    ]
    for info in plan.adapters:
        weight = "" if info.weight == 1 else f", weight {info.weight:g}"
        what = f"{human_bytes(info.nbytes)}, {info.family} ({info.format}), {count(info.tensors, 'tensor')}{weight}"
        rows.append(("adapter", _at(info.location, info.revision), what))
    return table(rows)


def _describe_targets(plan: MergePlan) -> str:
    several = len(plan.adapters) > 1
    rows = [("targets", "count", "shape", "update", "rank", "scaling", *(("adapter",) if several else ()))]
    found = target_rows(plan)
    for row in found:
        scaling = ", ".join(f"{value:.6g}" for value in row["scaling"])
        adapter = (str(row["adapter"] + 1),) if several else ()
        rank = str(row["rank"] or "")
        rows.append((row["module"], str(row["count"]), _shape(row["shape"]), row["family"], rank, scaling, *adapter))
    text = table(rows, right=(1, 4))
    if several:
        text += "\nweights that several adapters update get them in this order, and are rounded once"
    if several and (bound := sorted({row["family"] for row in found if not FAMILIES[row["family"]].adds})):
        text += f"\nthe order matters: {', '.join(bound)} changes what the adapters before it have made of a weight"
    scalings = sorted({value for row in found for value in row["scaling"]})
    return f"{text}\nscalings: {', '.join(f'{value:.6g}' for value in scalings)}" if scalings else text


def _describe_output(plan: MergePlan) -> str:
    memory = plan.memory
    shards = "1 file" if len(plan.shards) == 1 else count(len(plan.shards), "shard")
    rows = [
        ("output", plan.output),
        ("", f"{shards}, dtype {merged_dtype(plan)}, {count(len(plan.aux), 'other file')}"),
        ("reads", human_bytes(plan.bytes_read)),
        ("writes", human_bytes(plan.bytes_written)),
        ("computes in", f"{plan.compute_dtype} on {'cpu' if plan.compute_device == 'auto' else plan.compute_device}"),
        ("memory", f"{human_bytes(memory.total)} above the interpreter with torch and this plan in it"),
    ]
    return table(rows)


def plan_summary(plan: MergePlan) -> dict[str, Any]:
    """The plan as JSON, without an entry for every tensor.

    ``digest`` covers everything in headers that the output's bytes depend on. (The digest of a record differs: it also
    covers the adapters' bytes.)
    """
    targets = target_rows(plan)
    return {
        "base": jsonable(plan.base),
        "adapters": jsonable(plan.adapters),
        "output": plan.output,
        "output_dtype": merged_dtype(plan),
        "compute": {"dtype": plan.compute_dtype, "device": plan.compute_device},
        "targets": targets,
        "scalings": sorted({value for row in targets for value in row["scaling"]}),
        "shards": [{"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.tensors)} for shard in plan.shards],
        "index": plan.index_name,
        "aux": [aux.name for aux in plan.aux],
        "memory": {**jsonable(plan.memory), "total": plan.memory.total},
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "warnings": list(plan.warnings),
        "notices": notices(plan.warnings),
        "digest": plan.digest,
    }


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))
