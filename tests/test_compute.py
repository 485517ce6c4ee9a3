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
from shardmerge.adapters import FAMILIES
from shardmerge.adapters.lora import Lora
from shardmerge.compute import ComputeThreads
from tests.peft_oracle import make_config, random, stored, write_adapter, write_base

WORKERS = 2


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[ComputeThreads]:
    monkeypatch.setattr("shardmerge.compute._cores", lambda: WORKERS)
    made = ComputeThreads(WORKERS)
    yield made
    made.close()


@pytest.mark.parametrize("apart", [True, False])
def test_every_item_is_taken_once_and_told_what_was_begun(threads: ComputeThreads, apart: bool) -> None:
    seen: list[tuple[int, str]] = []
    threads.run(
        range(50), lambda worker, item: f"{worker} {item}", lambda worker, item, of: seen.append((item, of)), apart
    )
    assert sorted(item for item, _ in seen) == list(range(50))
    assert all(of.endswith(f" {item}") for item, of in seen)


def test_both_threads_work(threads: ComputeThreads) -> None:
    """Each waits for the other, so one alone would never end."""
    together = threading.Barrier(WORKERS, timeout=60)

    def work(worker: int, item: int, _: None) -> None:
        together.wait()

    for apart in (True, False):
        threads.run(range(WORKERS), lambda *_: None, work, apart)


def test_where_items_lie_on_each_other_all_earlier_ones_have_begun(threads: ComputeThreads) -> None:
    begun: set[int] = set()
    missing: list[int] = []

    def begin(worker: int, item: int) -> None:
        time.sleep(chance.random() / 500)
        begun.add(item)

    def work(worker: int, item: int, _: None) -> None:
        missing.extend(set(range(item + 1)) - begun)
        time.sleep(chance.random() / 500)

    threads.run(range(60), begin, work, apart=False)
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
        fail("work", item)
        running.discard(worker)

    for _ in range(3):  # it can be used again
        with pytest.raises(ValueError, match="item 7"):
            threads.run(range(40), lambda worker, item: fail("begin", item), work, apart)
        assert len(running) == (where == "work")
        running.clear()


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_the_order_in_which_tiles_end_does_not_matter(
    base: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wider and narrower output lies on other tiles' input, so who writes too early destroys what is yet to be read."""
    w = random(2048, 256, seed=0, scale=0.02).to(getattr(torch, base))
    a, b = random(4, 256, seed=1), random(2048, 4, seed=2)
    where = write_base(tmp_path / "base", [{"m.weight": w}])
    adapter = write_adapter(tmp_path / "adapter", {"m": (a, b)})
    monkeypatch.setattr("shardmerge.planning.tiling._SIZES", ((1 << 16, 1 << 13),))
    monkeypatch.setattr("shardmerge.compute._cores", lambda: WORKERS)

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
