"""Where the shards of a plan are merged: in this process, or anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

from shardmerge.destinations.destination import Handle
from shardmerge.execution.engine import Engine
from shardmerge.spec.plans import MergePlan, ShardPlan
from shardmerge.spec.receipts import Receipt

#: `engine.merge_shard`: its arguments by position pickle, so it can be called in any process.
MergeShard = Callable[..., Receipt]
#: Is given a shard and bytes of it that are done, in the thread that asks for receipts; may raise to stop.
Advance = Callable[[ShardPlan, int], None]


class Executor(Protocol):
    """Merges shards, which are independent of each other, in any order and in any place."""

    def prepare(self, plan: MergePlan) -> AbstractContextManager[Any]:
        """Get ready within for a plan. What is missing (a device, say) is an error before anything is written.

        No worker is left when the block is left, however it is left.
        """

    def map(
        self,
        merge_shard: MergeShard,
        plan: MergePlan,
        shards: Iterable[ShardPlan],
        destination: Handle,
        advance: Advance,
    ) -> Iterator[Receipt]:
        """Call ``merge_shard(plan, shard, destination)`` once for every shard; the receipts, in any order.

        The first error ends the iteration. No two workers ever merge the same shard at a time. ``advance`` may be
        called as often as can be; what was not counted when a receipt comes is counted then.
        """

    @property
    def working_set(self) -> int | None:
        """The most bytes that the last `map` took above what was resident before; None where that is not known."""


class SerialExecutor:
    """One shard at a time in this thread: a merge is bound by the disk, which one shard keeps busy."""

    def __init__(self) -> None:
        self.working_set: int | None = None
        self._engine: Engine | None = None

    @contextmanager
    def prepare(self, plan: MergePlan) -> Iterator[None]:
        with Engine(plan) as self._engine:
            try:
                yield
            finally:
                self._engine = None

    def map(
        self,
        merge_shard: MergeShard,
        plan: MergePlan,
        shards: Iterable[ShardPlan],
        destination: Handle,
        advance: Advance,
    ) -> Iterator[Receipt]:
        engine = self._engine
        assert engine is not None, "not prepared"
        for shard in shards:
            advance(shard, 0)
            yield merge_shard(plan, shard, destination, engine=engine, advance=partial(advance, shard))
        self.working_set = engine.working_set.grown()
