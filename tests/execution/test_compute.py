"""Who computes which tile when; what a tile becomes is for the tests of the engine and the adapters."""

from __future__ import annotations

import random as chance
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shardmerge
from shardmerge.adapters.methods.lora import Lora
from shardmerge.adapters.registry import FAMILIES
from shardmerge.execution.worker import ComputeThreads
from shardmerge.planning import tiling
from tests.support.builders import slow_but
from tests.support.peft_oracle import make_config, random, stored, write_adapter, write_base

WORKERS = 2


@pytest.fixture
def threads() -> Iterator[ComputeThreads]:
    made = ComputeThreads(WORKERS)
    yield made
    made.close()


def test_every_item_is_taken_once(threads: ComputeThreads) -> None:
    seen: list[int] = []
    for future in threads.share(range(50), seen.append):
        future.result(60)
    assert sorted(seen) == list(range(50))


def test_all_threads_work_and_torch_has_one_in_each(threads: ComputeThreads) -> None:
    """Each waits for the other, so one alone would never end."""
    together = threading.Barrier(WORKERS, timeout=60)
    seen: list[int] = []

    def work(item: int) -> None:
        together.wait()
        seen.append(torch.get_num_threads())

    for future in threads.share(range(WORKERS), work):
        future.result(60)
    assert seen == [1] * WORKERS


def test_the_error_of_an_item_is_raised_by_its_future(threads: ComputeThreads) -> None:
    done: list[int] = []

    def fail(item: int) -> None:
        if item == 7:
            raise ValueError("item 7")
        done.append(item)

    for _ in range(3):  # it can be used again
        futures = threads.share(range(40), fail)
        (error,) = [future.exception(60) for future in futures if future.exception(60)]
        assert str(error) == "item 7" and set(done) >= set(range(7))
        done.clear()
        threads.share(range(3), done.append)
        threads.settle()
        assert sorted(done) == [0, 1, 2]
        done.clear()


def test_the_caller_goes_on_while_a_thread_is_at_an_item(threads: ComputeThreads) -> None:
    release, done = threading.Event(), list[str]()

    def slow(item: int) -> None:
        assert release.wait(60)
        done.append("first")

    first = threads.share([0], slow)
    for future in threads.share(range(3), lambda item: done.append("second")):
        future.result(60)
    assert done == ["second"] * 3 and not first[0].done()
    release.set()
    threads.settle()
    assert first[0].done() and done[-1] == "first"


def test_alone_means_that_no_thread_works_and_torch_has_its_own_number(threads: ComputeThreads) -> None:
    before, seen = list[int](), list[object]()

    def work(item: int) -> None:
        time.sleep(0.01)
        before.append(item)

    threads.share(range(8), work)
    threads.alone(lambda: seen.extend([sorted(before), torch.get_num_threads()]))
    assert seen == [list(range(8)), threads.default] and torch.get_num_threads() == 1


def test_close_ends_the_threads_though_there_is_work() -> None:
    before, torch_before = set(threading.enumerate()), torch.get_num_threads()
    made = ComputeThreads(WORKERS)
    assert len(set(threading.enumerate()) - before) == WORKERS
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.01)
        done.append(item)

    made.share(range(100), work)
    made.close()
    assert set(threading.enumerate()) == before and len(done) < 100
    assert torch.get_num_threads() == torch_before


@pytest.mark.parametrize("failing", ["start", "set"])
def test_a_thread_that_cannot_begin_leaves_nobody_waiting(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, here = set(threading.enumerate()), threading.get_ident()
    start, set_threads = threading.Thread.start, torch.set_num_threads

    def no_start(thread: threading.Thread) -> None:
        if thread.name.endswith("_1"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def no_set(number: int) -> None:
        if threading.get_ident() != here:
            raise MemoryError
        set_threads(number)

    if failing == "start":
        monkeypatch.setattr(threading.Thread, "start", no_start)
    else:
        monkeypatch.setattr(torch, "set_num_threads", no_set)
    with pytest.raises((RuntimeError, MemoryError)):
        ComputeThreads(WORKERS)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("out", slow_but(["float32", "float16", "bfloat16"], "float32", "bfloat16"))
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_the_order_in_which_tiles_end_does_not_matter(
    base: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = random(2048, 256, seed=0, scale=0.02).to(getattr(torch, base))
    a, b = random(4, 256, seed=1), random(2048, 4, seed=2)
    where = write_base(tmp_path / "base", [{"m.weight": w}])
    adapter = write_adapter(tmp_path / "adapter", {"m": (a, b)})
    monkeypatch.setattr(tiling, "_SIZES", ((1 << 16, 1 << 13),))

    class Slow(Lora):
        def apply(self, *given: object) -> None:
            time.sleep(chance.random() / 200)
            super().apply(*given)  # type: ignore[arg-type]

    found = []
    for number, family in enumerate((Lora(), Slow(), Slow())):
        monkeypatch.setitem(FAMILIES, "lora", family)
        config = make_config(tmp_path / f"out-{number}", where, [adapter])
        config["output"]["dtype"] = out
        plan = shardmerge.plan(config)
        assert plan.shards[0].tensors[0].tiles >= 16
        shardmerge.merge(plan)
        found.append(stored(Path(plan.output))["m.weight"])
    expected = (w.float() + (b @ a) * plan.shards[0].tensors[0].updates[0].scaling).to(getattr(torch, out))
    assert all(torch.equal(one, expected) for one in found)
