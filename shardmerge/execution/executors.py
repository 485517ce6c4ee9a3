"""Map work over shards. Today: here, one after the other.

An executor is asked to run a function on every shard that has no receipt, and to yield receipts as they come. Shards
are independent of each other, so another executor may run them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from shardmerge.spec.plans import Receipt, ShardPlan


class Executor(Protocol):
    """Runs shards."""

    def map(self, merge: Callable[[ShardPlan], Receipt], shards: Iterable[ShardPlan]) -> Iterator[Receipt]:
        """Receipts, in any order. The first error ends the iteration."""


class SerialExecutor:
    """One shard at a time in this thread: a merge is bound by the disk, which one shard keeps busy."""

    def map(self, merge: Callable[[ShardPlan], Receipt], shards: Iterable[ShardPlan]) -> Iterator[Receipt]:
        yield from map(merge, shards)
