"""An executor whose workers are processes of their own, as a cluster's are."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from shardmerge.destinations.destination import Handle
from shardmerge.errors import OutputError
from shardmerge.execution.engine import Engine
from shardmerge.execution.executors import Advance, MergeShard
from shardmerge.spec.plans import MergePlan, ShardPlan
from shardmerge.spec.receipts import Receipt


class Worker:
    """What a worker process keeps from shard to shard: the plan, which is large, and the engine, which is slow."""

    plan: MergePlan
    _engine: Engine | None = None

    @classmethod
    def start(cls, plan: MergePlan) -> None:
        cls.plan = plan

    @classmethod
    def engine(cls) -> Engine:
        cls._engine = cls._engine or Engine(cls.plan)
        return cls._engine

    @classmethod
    def check(cls) -> None:
        """Raises what is missing here."""
        cls.engine()

    @classmethod
    def work(cls, merge_shard: MergeShard, shard: ShardPlan, destination: Handle, kill: bool) -> Receipt:
        if kill:
            with destination.writer(shard):  # begun, and never finished
                os.kill(os.getpid(), signal.SIGKILL)
        return merge_shard(cls.plan, shard, destination, engine=cls.engine())


class PoolExecutor:
    """``workers`` processes. Those that are given a shard named in ``killed`` are killed while they write it."""

    working_set = None

    def __init__(self, workers: int = 2, killed: Iterable[str] = ()) -> None:
        self.workers = workers
        self.killed = frozenset(killed)
        self._pool: ProcessPoolExecutor | None = None

    @contextmanager
    def prepare(self, plan: MergePlan) -> Iterator[None]:
        # Forks of this process would have its threads' locks, and that of the output.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["shardmerge.execution.worker", "tests.support.pool_executor"])
        with ProcessPoolExecutor(self.workers, context, Worker.start, (plan,)) as self._pool:
            self._pool.submit(Worker.check).result()
            yield

    def map(
        self,
        merge_shard: MergeShard,
        plan: MergePlan,
        shards: Iterable[ShardPlan],
        destination: Handle,
        advance: Advance,
    ) -> Iterator[Receipt]:
        assert self._pool is not None
        tasks = [
            self._pool.submit(Worker.work, merge_shard, shard, destination, shard.name in self.killed)
            for shard in shards
        ]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BrokenProcessPool as error:
            raise OutputError(f"a worker has ended before its shard was finished: {error}") from None
        finally:
            for task in tasks:
                task.cancel()
