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
#: Gets a shard and bytes of it that are done, in the thread that iterates over receipts. It may raise to stop.
Advance = Callable[[ShardPlan, int], None]


class Executor(Protocol):
    """Merges shards, which are independent of each other, in any order, anywhere."""

    def prepare(self, plan: MergePlan) -> AbstractContextManager[Any]:
        """A context that is ready for a plan. What is missing, a device say, is an error before anything is written.

        No worker outlives the context.
        """

    def map(
        self,
        merge_shard: MergeShard,
        plan: MergePlan,
        shards: Iterable[ShardPlan],
        destination: Handle,
        advance: Advance,
    ) -> Iterator[Receipt]:
        """Call ``merge_shard(plan, shard, destination)`` once for every shard, and yield the receipts in any order.

        The first error ends the iteration. No two workers may merge the same shard at a time. ``advance`` may be called
        at any time; bytes that it has not counted are counted when their shard's receipt comes.
        """

    @property
    def working_set(self) -> int | None:
        """The most bytes that the last `map` took above what was resident before, if that is known."""


class SerialExecutor:
    """Merges one shard at a time in this thread, which keeps the disk busy."""

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
