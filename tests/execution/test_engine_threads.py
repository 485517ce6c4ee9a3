"""How many threads torch has changes nothing, on a machine of any size, where it changes nothing of PEFT's own result.

Of a product of few rows a thread gets one or two, and those go through another kernel. So the engine must not hand
tiles of 16 rows to dozens of threads; and a weight of fewer rows must get the threads that PEFT's product would have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shardmerge
from tests.support.peft_oracle import least_memory, make_config, random, stored, write_adapter, write_base

TARGET = "model.layers.0.mlp.down_proj"
SCALE = 0.7


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _on_a_machine_of(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)


def merged(folder: Path, w: Tensor, a: Tensor, b: Tensor, threads: int, memory: str) -> tuple[Tensor, int]:
    """The merged weight, computed in a process that has so many threads, and the number of its tiles."""
    base = write_base(folder / f"base-{threads}-{memory}", [{f"{TARGET}.weight": w}])
    adapter = write_adapter(folder / f"adapter-{threads}-{memory}", {TARGET: (a, b)}, alpha=SCALE * a.shape[0])
    config = make_config(folder / f"out-{threads}-{memory}", base, [adapter])
    if memory == "least":
        config["compute"]["max_memory"] = least_memory(config)
    plan = shardmerge.plan(config)
    torch.set_num_threads(threads)
    shardmerge.merge(plan)
    assert torch.get_num_threads() == threads
    return stored(Path(plan.output))[f"{TARGET}.weight"], plan.shards[0].tensors[0].tiles


@pytest.mark.parametrize("memory", ["least", "auto"])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8, 12, 16, 32], ids="{}-threads".format)
def test_of_a_usual_weight_no_number_of_threads_shows(
    threads: int, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    # 250 rows in tiles of 31 and 32: an odd number of rows leaves some thread with one.
    w, a, b = random(250, 512, seed=1, scale=0.02), random(16, 512, seed=2), random(250, 16, seed=3)
    torch.set_num_threads(1)
    expected = w + (b @ a) * (SCALE)
    found, tiles = merged(tmp_path, w, a, b, threads, memory)
    assert tiles == (8 if memory == "least" else 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 4, 8], ids="{}-threads".format)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [*((rows, 333) for rows in (1, 2, 5, 7, 8, 10, 11, 15, 16, 31)), (156, 100), (222, 200), (204, 18), (100, 5)],
    ids=str,
)
def test_a_weight_of_one_tile_is_computed_as_torch_computes_it(
    rows: int, columns: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shape may be such that threads show; then the same product with the same threads is PEFT's."""
    _on_a_machine_of(threads, monkeypatch)
    w, a, b = random(rows, columns, seed=1, scale=0.02), random(16, columns, seed=2), random(rows, 16, seed=3)
    torch.set_num_threads(threads)
    expected = w + (b @ a) * SCALE
    found, tiles = merged(tmp_path, w, a, b, threads, "auto")
    assert tiles == 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [2, 4, 8], ids="{}-threads".format)
def test_a_small_weight_after_a_large_one(threads: int, tmp_path: Path) -> None:
    """The workers compute the large one with one thread each; the small one must have torch's own number again."""
    shapes = {"a.large": (640, 512), "b.small": (7, 333), "c.large": (640, 512), "d.small": (10, 333)}
    weights, adapters, expected = {}, {}, {}
    for seed, (module, (rows, columns)) in enumerate(shapes.items()):
        w, a, b = (
            random(*shape, seed=10 * seed + number)
            for number, shape in enumerate([(rows, columns), (16, columns), (rows, 16)])
        )
        weights[f"{module}.weight"], adapters[module] = w, (a, b)
        torch.set_num_threads(threads if "small" in module else 1)
        expected[f"{module}.weight"] = w + (b @ a) * SCALE
    base = write_base(tmp_path / "base", [weights])
    adapter = write_adapter(tmp_path / "adapter", adapters, alpha=SCALE * 16)
    torch.set_num_threads(threads)
    shardmerge.merge(make_config(tmp_path / "out", base, [adapter]))
    found = stored(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_torch_gets_its_threads_back_after_an_error(tmp_path: Path) -> None:
    w, a, b = random(16, 8, seed=1), random(2, 8, seed=2), random(16, 2, seed=3)
    b[3, 1] = float("nan")
    with pytest.raises(shardmerge.NonFiniteError):
        merged(tmp_path, w, a, b, 2, "auto")
    assert torch.get_num_threads() == 2
