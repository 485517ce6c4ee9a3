"""The steps of a shard, as `shardmerge.system.events` records them, in the process that merges it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from shardmerge.spec.plans import ShardPlan
from shardmerge.spec.receipts import Receipt
from shardmerge.system.events import LOG, Stopwatch, event


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
