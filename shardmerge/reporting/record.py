"""The record of a finished merge, ``shardmerge.json``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from shardmerge.reporting.merge_report import MergeReport, fidelity_json
from shardmerge.spec.plans import MergePlan, Receipt, jsonable
from shardmerge.version import __version__


def record(
    plan: MergePlan, report: MergeReport, receipts: Sequence[Receipt], digest: str, torch_version: str
) -> dict[str, Any]:
    """What ``shardmerge.json`` in the output says.

    ``digest`` is that of base, adapters and config, the adapters' bytes in it. The checksums are of whole files.
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
        "targets": {
            tensor.source.name: [
                {
                    "adapter": update.adapter,
                    "module": f"{update.module}.{update.parameter}",
                    "family": update.family,
                    "rank": update.rank,
                    "scaling": update.scaling,
                }
                for update in tensor.updates
            ]
            for shard in plan.shards
            for tensor in shard.tensors
            if tensor.updates
        },
        "shards": {receipt.shard: receipt.entry() for receipt in receipts},
        "fidelity": {name: fidelity_json(of) for receipt in receipts for name, of in receipt.fidelity.items()},
        "memory": {
            "predicted_working_set": plan.memory.total,
            "working_set": report.working_set_bytes,
            "peak": report.peak_memory_bytes,
        },
        "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "shards_reused": report.shards_reused,
        "warnings": list(report.warnings),
        "files": list(report.files),
    }
