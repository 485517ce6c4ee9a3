"""What every executor promises: each shard is merged once, wherever that is; the bytes are the same; nothing is left.

A new one is a class and a row in `EXECUTORS`.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge
from shardmerge import NonFiniteError, OutputError, ShardmergeError
from shardmerge.destinations.destination import Handle, open_destination
from shardmerge.execution.engine import Engine, merge_shard
from shardmerge.execution.executors import Advance, Executor, MergeShard, SerialExecutor
from shardmerge.spec.plans import MergePlan, ShardPlan
from shardmerge.spec.receipts import Receipt
from tests.support.builders import contents, slow_but
from tests.support.pool_executor import PoolExecutor
from tests.support.three_shards import INDEX, SHARDS, TARGETS, ThreeShards


class BareExecutor:
    """Calls the function with what pickles alone, the last shard first, as a cluster without any help would."""

    working_set = None

    @contextmanager
    def prepare(self, plan: MergePlan) -> Iterator[None]:
        Engine(plan).close()
        yield

    def map(
        self,
        merge_shard: MergeShard,
        plan: MergePlan,
        shards: Iterable[ShardPlan],
        destination: Handle,
        advance: Advance,
    ) -> Iterator[Receipt]:
        for shard in reversed([*shards]):
            yield merge_shard(plan, shard, destination)


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "serial": SerialExecutor,
    "pool": PoolExecutor,
    "bare": BareExecutor,
}


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Executor:
    return EXECUTORS[request.param]()


@pytest.fixture
def models(tmp_path: Path) -> ThreeShards:
    return ThreeShards(tmp_path).make()


@pytest.fixture
def config(models: ThreeShards) -> dict[str, Any]:
    return models.config(str(models.folder / "out"))


def check(models: ThreeShards) -> None:
    files = contents(models.folder / "out")
    assert {*files} == {*SHARDS, INDEX, "config.json"}
    models.check(files)
    assert not multiprocessing.active_children()


def test_the_same_bytes_and_progress_to_the_end(
    executor: Executor, models: ThreeShards, config: dict[str, Any]
) -> None:
    seen: list[shardmerge.Progress] = []
    threads: set[int] = set()

    def progress(now: shardmerge.Progress) -> None:
        seen.append(now)
        threads.add(threading.get_ident())

    report = shardmerge.merge(config, executor=executor, progress=progress)
    check(models)
    assert report.working_set_bytes == executor.working_set
    assert threads == {threading.get_ident()}
    assert [now.done for now in seen] == sorted(now.done for now in seen) and seen[-1].done == seen[-1].total
    assert {(now.shard, now.shard_number) for now in seen} == {*zip(SHARDS, (1, 2, 3), strict=True)}


def test_each_shard_has_one_receipt(executor: Executor, models: ThreeShards, config: dict[str, Any]) -> None:
    plan = shardmerge.plan(config)
    with executor.prepare(plan), open_destination(plan.output, False) as destination:
        destination.begin(plan, {})
        two = [plan.shards[0], plan.shards[2]]
        receipts = [*executor.map(merge_shard, plan, two, destination.handle, lambda shard, count: None)]
        assert sorted(receipt.shard for receipt in receipts) == [SHARDS[0], SHARDS[2]]
        assert all(receipt.active_adapters == (0,) and receipt.fidelity for receipt in receipts)
        assert destination.begin(plan, {}).keys() == {SHARDS[0], SHARDS[2]}
    assert not multiprocessing.active_children()


def test_the_error_of_a_shard_is_the_errors_own(executor: Executor, models: ThreeShards) -> None:
    with pytest.raises(NonFiniteError, match="Nothing is left of it"):
        shardmerge.merge(models.config(str(models.folder / "out"), "infinite"), executor=executor)
    assert not (models.folder / "out").exists() and not multiprocessing.active_children()


def test_a_stop_leaves_no_worker_and_another_executor_resumes(
    executor: Executor, models: ThreeShards, config: dict[str, Any]
) -> None:
    finished: set[str] = set()

    def progress(now: shardmerge.Progress) -> None:
        if now.done >= now.total // 3:  # the first shard is done, whichever that is
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardmerge.merge(config, executor=executor, progress=progress)
    assert not multiprocessing.active_children() and not (models.folder / "out" / INDEX).exists()
    finished |= {path.stem for path in (models.folder / "out" / ".shardmerge" / "receipts").glob("*.json")}
    report = shardmerge.merge(config)
    assert report.shards_reused == len(finished)
    check(models)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_missing_shows_before_anything_is_written(
    executor: Executor, models: ThreeShards, config: dict[str, Any]
) -> None:
    plan = dataclasses.replace(shardmerge.plan(config), compute_device="cuda")  # planned where there is one
    with pytest.raises(ShardmergeError, match="cuda"):
        shardmerge.merge(plan, executor=executor)
    assert not (models.folder / "out").exists() and not multiprocessing.active_children()


def test_an_engine_is_as_good_as_new_after_an_error(models: ThreeShards, config: dict[str, Any]) -> None:
    """Nothing that was seen of the shard that failed is in the receipt of the next."""

    def stop(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    plan = shardmerge.plan(config)
    with open_destination(plan.output, False) as destination, Engine(plan) as engine:
        destination.begin(plan, {})
        expected = merge_shard(plan, plan.shards[1], destination.handle)
        with pytest.raises(KeyboardInterrupt):
            merge_shard(plan, plan.shards[0], destination.handle, engine=engine, advance=stop)
        assert merge_shard(plan, plan.shards[1], destination.handle, engine=engine) == expected
        assert expected.fidelity.keys() == {f"{TARGETS[1]}.weight"}


# --- workers that are killed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", slow_but([SHARDS[:1], SHARDS[2:], SHARDS], SHARDS[2:]), ids=["first", "last", "all"])
def test_killed_workers_are_survived(killed: list[str], models: ThreeShards, config: dict[str, Any]) -> None:
    with pytest.raises(OutputError, match=r"a worker has ended.*run the same command again to resume it"):
        shardmerge.merge(config, executor=PoolExecutor(killed=killed))
    assert not (models.folder / "out" / INDEX).exists() and not multiprocessing.active_children()
    receipts = models.folder / "out" / ".shardmerge" / "receipts"
    kept = {path.stem for path in receipts.glob("*.json")}
    assert not kept & {*killed}
    assert shardmerge.merge(config, executor=PoolExecutor()).shards_reused == len(kept)
    check(models)
