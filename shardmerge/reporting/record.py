"""The record of a finished merge, ``shardmerge.json``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from shardmerge.destinations.record import Section
from shardmerge.reporting.merge_report import MergeReport, fidelity_json
from shardmerge.spec.plans import MergePlan, jsonable
from shardmerge.spec.receipts import Receipt
from shardmerge.spec.updates import Update
from shardmerge.system.memory_use import peak_memory
from shardmerge.version import __version__


def record(
    plan: MergePlan, report: MergeReport, receipts: Sequence[Receipt], digest: str, torch_version: str
) -> dict[str, Any]:
    """The record, for `shardmerge.destinations.record.written`.

    ``digest`` is of base, adapters (with their bytes) and config. The checksums are of whole files.
    """
    return {
        "shardmerge": __version__,
        "torch": torch_version,
        "python": sys.version.split()[0],
        "platform": sys.platform,
        "config": jsonable(plan.config),
        "digest": digest,
        "base": jsonable(plan.base),
        "adapters": jsonable(plan.adapters),
        "targets": Section(partial(targets, plan)),
        "shards": {receipt.shard: receipt.entry() for receipt in receipts},
        "fidelity": Section(partial(_fidelity, receipts)),
        "memory": partial(_memory, plan, report),
        "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "shards_reused": report.shards_reused,
        "warnings": list(report.warnings),
        "files": list(report.files),
    }


def targets(plan: MergePlan) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The record's entries for the updated tensors of the base. A tensor that a shard has in parts is listed once."""
    for shard in plan.shards:
        updates = {tensor.source.name: tensor.updates for tensor in shard.tensors if tensor.updates}
        for name, of in updates.items():
            yield name, [_target(update) for update in of]


def _target(update: Update) -> dict[str, Any]:
    return {
        "adapter": update.adapter,
        "module": f"{update.module}.{update.parameter}",
        "family": update.family,
        "rank": update.rank,
        "scaling": update.scaling,
    }


def _fidelity(receipts: Iterable[Receipt]) -> Iterator[tuple[str, dict[str, float]]]:
    return ((name, fidelity_json(of)) for receipt in receipts for name, of in receipt.fidelity.items())


def _memory(plan: MergePlan, report: MergeReport) -> dict[str, int | None]:
    """The peak is the process's so far, with most of the memory that writing the record takes."""
    return {
        "predicted_working_set": plan.memory.total,
        "working_set": report.working_set_bytes,
        "peak": peak_memory(),
    }
