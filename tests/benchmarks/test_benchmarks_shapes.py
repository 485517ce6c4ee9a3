"""Shapes of the benchmark: as large as what they are named after, and real checkpoints that everyone can load."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import shardmerge
from benchmarks import making
from benchmarks.making import Values, ensure, is_made, place
from benchmarks.shapes import MERGED, REAL, SHAPES, nbytes
from tests.support.builders import slow_but

TINY = SHAPES["tiny"]


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("tinyllama", 2.20), ("llama3-8b", 16.06), ("qwen3-moe", 3.74), ("llama3-405b", 6.64)]
)
def test_real_shapes_have_their_size(name: str, gigabytes: float) -> None:
    assert name in REAL
    assert SHAPES[name].base_bytes() / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_moe_has_128_experts_stored_one_by_one() -> None:
    names = [name for name, _ in SHAPES["qwen3-moe"].base_tensors()]
    assert sum("layers.1.mlp.experts." in name for name in names) == 3 * 128


def test_small_shapes_are_not_real() -> None:
    assert all(not SHAPES[name].is_small for name in REAL)
    assert {"tiny", "tiny-moe"} == {name for name in MERGED if SHAPES[name].is_small}


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("rank", slow_but([16, 8], 16))
def test_made_shape_is_what_it_says(tmp_path: Path, name: str, rank: int) -> None:
    shape = SHAPES[name].with_rank(rank)
    made = ensure(shape, tmp_path)
    found: dict[str, tuple[int, ...]] = {}
    for path in (*made.base.glob("*.safetensors"), *made.adapter.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert found == dict([*shape.base_tensors(), *shape.adapter_tensors()])
    assert made.base_bytes() >= shape.base_bytes()
    assert json.loads((made.adapter / "adapter_config.json").read_text())["r"] == rank
    # Everything in the adapter finds its place, or this is refused.
    plan = shardmerge.plan(
        {"base": str(made.base), "adapters": [str(made.adapter)], "output": {"path": str(tmp_path / "output")}}
    )
    assert {update.rank for _, update in plan.updates()} == {rank}


@pytest.mark.slow
def test_finished_shape_is_used_again_and_another_is_not(tmp_path: Path) -> None:
    made = ensure(TINY, tmp_path)
    stamp = {path: path.stat().st_mtime_ns for path in made.files()}
    assert is_made(TINY, tmp_path)
    higher = ensure(TINY.with_rank(32), tmp_path)
    assert higher.base == made.base and higher.adapter != made.adapter
    assert {path: path.stat().st_mtime_ns for path in ensure(TINY, tmp_path).files()} == stamp
    (made.base.parent / making.MARKER).write_text("{}")
    assert not is_made(TINY, tmp_path)
    ensure(TINY, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in made.files()} != stamp
    assert not higher.adapter.exists(), "it belonged to the old base"


def test_unfinished_adapter_is_made_anew(tmp_path: Path) -> None:
    shape = TINY.with_rank(8)
    ensure(TINY, tmp_path)
    left = place(shape, tmp_path).adapter.with_name("adapter-rank8.tmp")
    left.mkdir()
    (left / "adapter_config.json").write_text("half")
    assert json.loads((ensure(shape, tmp_path).adapter / "adapter_config.json").read_text())["r"] == 8
    assert not left.exists()


def test_values_are_small_numbers_and_norms_are_ones() -> None:
    torch = pytest.importorskip("torch")
    values = Values("seed")

    def numbers(name: str, shape: tuple[int, ...]) -> list[float]:
        data = bytearray(b"".join(values.chunks((name, shape))))
        assert len(data) == nbytes(shape)
        found: list[float] = torch.frombuffer(data, dtype=torch.bfloat16).tolist()
        return found

    weights = numbers("q_proj.weight", (600, 1000))
    assert (sum(value**2 for value in weights) / len(weights)) ** 0.5 == pytest.approx(making.STD, rel=0.05)
    assert set(numbers("norm.weight", (300,))) == {1.0}


def test_command_makes_a_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["making", "tiny", "--rank", "8", "--work", str(tmp_path)])
    making.main()
    assert capsys.readouterr().out.split() == [
        str(path) for path in (tmp_path / "tiny/base", tmp_path / "tiny/adapter-rank8")
    ]
