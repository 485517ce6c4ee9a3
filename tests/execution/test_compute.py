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
from shardmerge.execution import threads as threads_module
from shardmerge.execution.threads import ComputeThreads
from shardmerge.planning import tiling
from tests.support.builders import slow_but
from tests.support.peft_oracle import make_config, random, stored, write_adapter, write_base

WORKERS = 2


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[ComputeThreads]:
    monkeypatch.setattr(threads_module, "_cores", lambda: WORKERS)
    made = ComputeThreads(WORKERS)
    yield made
    made.close()


@pytest.mark.parametrize("apart", [True, False])
def test_every_item_is_taken_once_and_told_what_was_begun(threads: ComputeThreads, apart: bool) -> None:
    seen: list[tuple[int, str]] = []
    threads.share(
        range(50), lambda worker, item: f"{worker} {item}", lambda worker, item, of: seen.append((item, of)), apart
    ).wait()
    assert sorted(item for item, _ in seen) == list(range(50))
    assert all(of.endswith(f" {item}") for item, of in seen)


def test_both_threads_work(threads: ComputeThreads) -> None:
    """Each waits for the other, so one alone would never end."""
    together = threading.Barrier(WORKERS, timeout=60)

    def work(worker: int, item: int, _: None) -> None:
        together.wait()

    for apart in (True, False):
        threads.share(range(WORKERS), lambda *_: None, work, apart).wait()


def test_where_items_lie_on_each_other_all_earlier_ones_have_begun(threads: ComputeThreads) -> None:
    begun: set[int] = set()
    missing: list[int] = []

    def begin(worker: int, item: int) -> None:
        time.sleep(chance.random() / 500)
        begun.add(item)

    def work(worker: int, item: int, _: None) -> None:
        missing.extend(set(range(item + 1)) - begun)
        time.sleep(chance.random() / 500)

    threads.share(range(60), begin, work, apart=False).wait()
    assert missing == [] and begun == set(range(60))


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("where", ["begin", "work"])
def test_an_error_is_raised_when_all_threads_have_ended(threads: ComputeThreads, where: str, apart: bool) -> None:
    running: set[int] = set()

    def fail(at: str, item: int) -> None:
        if at == where and item == 7:
            raise ValueError("item 7")

    def work(worker: int, item: int, _: None) -> None:
        running.add(worker)
        time.sleep(0.001)
        try:
            fail("work", item)
        finally:
            running.discard(worker)

    for _ in range(3):  # it can be used again
        failing = threads.share(range(40), lambda worker, item: fail("begin", item), work, apart)
        with pytest.raises(ValueError, match="item 7"):
            failing.wait()
        assert not running
        threads.share(range(40), lambda *_: None, lambda *_: None, apart).wait()


def test_the_caller_goes_on_while_another_is_at_its_last_item(threads: ComputeThreads) -> None:
    """The second batch is begun, and ended, while an item of the first is still worked on."""
    release, done = threading.Event(), list[str]()

    def slow(worker: int, item: int, _: None) -> None:
        if worker == 0:
            together.wait()  # the other one has its item
            return
        together.wait()
        assert release.wait(60)
        done.append("first")

    together = threading.Barrier(WORKERS, timeout=60)
    first = threads.share(range(WORKERS), lambda *_: None, slow, apart=True)
    second = threads.share(range(3), lambda *_: None, lambda *_: done.append("second"), apart=True)
    second.wait()
    assert done == ["second"] * 3 and not first.over.is_set()
    release.set()
    threads.settle()
    first.wait()
    assert done[-1] == "first"


def test_after_an_interrupt_nobody_waits_for_what_is_lost(
    threads: ComputeThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between taking an item and working on it, so that the item is never done."""
    taken = threading.Event()

    def interrupted(worker: int) -> bool:
        with threads._turn:
            threads._pending.popleft()
        taken.set()
        raise KeyboardInterrupt

    def work(worker: int, item: int, _: None) -> None:
        assert taken.wait(60)

    found = list[BaseException]()

    def writer() -> None:
        try:
            while not threads._open:
                time.sleep(0.001)
            threads._open[0].wait()
        except BaseException as error:
            found.append(error)

    waiting = threading.Thread(target=writer)
    waiting.start()
    monkeypatch.setattr(threads, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.share(range(40), lambda *_: None, work, apart=True)
    waiting.join(60)
    assert not waiting.is_alive() and isinstance(found[0], KeyboardInterrupt)
    threads.settle()


def test_close_ends_the_threads_though_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(threads_module, "_cores", lambda: WORKERS)
    made = ComputeThreads(WORKERS)
    assert len(set(threading.enumerate()) - before) == WORKERS - 1
    made.share(range(4), lambda *_: None, lambda *_: time.sleep(0.01), apart=True)
    made.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("out", slow_but(["float32", "float16", "bfloat16"], "float32", "bfloat16"))
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_the_order_in_which_tiles_end_does_not_matter(
    base: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wider and narrower output lies on other tiles' input, so who writes too early destroys what is yet to be read."""
    w = random(2048, 256, seed=0, scale=0.02).to(getattr(torch, base))
    a, b = random(4, 256, seed=1), random(2048, 4, seed=2)
    where = write_base(tmp_path / "base", [{"m.weight": w}])
    adapter = write_adapter(tmp_path / "adapter", {"m": (a, b)})
    monkeypatch.setattr(tiling, "_SIZES", ((1 << 16, 1 << 13),))
    monkeypatch.setattr(threads_module, "_cores", lambda: WORKERS)

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
