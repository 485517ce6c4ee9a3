"""The stages of a merge alone, against the machine's limits: that they do what they say, not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks import limits, stages
from benchmarks.making import Made, ensure
from benchmarks.shapes import SHAPES
from benchmarks.stages import Clock, NoWriter, Product, Row
from shardmerge.execution import pipeline
from shardmerge.spec.plans import MergePlan

MIB = 1 << 20


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return ensure(SHAPES["tiny"], tmp_path)


@pytest.fixture
def plan(made: Made, tmp_path: Path) -> MergePlan:
    return stages.make_plan(made, tmp_path / "never-written")


def test_each_stage_sees_the_bytes_that_are_its_own(plan: MergePlan, tmp_path: Path) -> None:
    shard = plan.shards[0]
    worked = sum(tensor.source.nbytes for tensor in shard.tensors if tensor.tiles)
    assert 0 < worked < shard.data_bytes
    original = pipeline.run
    found = {stage: stages.run_stage(plan, shard, stage, NoWriter()) for stage in ("read", "work", "write")}
    assert {stage: clock.nbytes for stage, clock in found.items()} == {
        "read": shard.data_bytes,
        "work": worked,
        "write": shard.data_bytes,
    }
    assert all(clock.seconds > 0 for clock in found.values())
    assert pipeline.run is original, "the pipeline is put back"
    assert not Path(plan.output).exists()


def test_work_is_done_with_any_number_of_workers(plan: MergePlan) -> None:
    for workers in (1, 2):
        of = stages.with_workers(plan, workers)
        assert of.memory.workers == workers
        assert stages.run_stage(of, plan.shards[0], "work", NoWriter()).nbytes > 0


def test_pipeline_is_put_back_after_an_error(plan: MergePlan) -> None:
    original = pipeline.run
    with pytest.raises(ZeroDivisionError), stages.alone("read", Clock()):
        raise ZeroDivisionError
    assert pipeline.run is original


def test_writer_writes_the_whole_shard_and_it_is_removed(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    kept = tmp_path / "kept.safetensors"
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: path.exists() and path.rename(kept) and None)
    clock = stages.write_stage(plan, plan.shards[0], folder)
    monkeypatch.undo()
    assert clock.nbytes == plan.shards[0].nbytes == kept.stat().st_size
    with safe_open(str(kept), framework="pt") as file:
        assert len(list(file.keys())) == len(plan.shards[0].tensors)
    assert not list(folder.iterdir())


def test_product_of_a_tile(plan: MergePlan) -> None:
    product = stages.usual_product(plan.shards[0])
    assert product is not None and product.rank == 16
    # 2 · 16 operations make one weight, of two bytes.
    assert Product(64, 16, 128).bytes_per_second(32e9) == 2e9


@pytest.mark.parametrize("size", [MIB, 3 * MIB])
def test_limits_are_speeds_and_leave_nothing(tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(size))
    found = [
        limits.direct_read(source, size),
        limits.direct_write(target, size),
        limits.direct_both(source, target, size),
        limits.warm_read(source, size),
        limits.memcpy(size),
    ]
    assert all(speed > 0 for speed in found)
    assert list(tmp_path.iterdir()) == [source]


def test_products_leave_torchs_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(limits, "_SECONDS", 0.0)
    before = torch.get_num_threads()
    assert limits.products(8, 4, 8) > 0
    assert torch.get_num_threads() == before


def test_table_holds_stages_against_limits() -> None:
    rows = [
        Row("disk", lambda: 0.0, values=[3e9, 4e9, 5e9]),
        Row("reader", lambda: 0.0, "disk", values=[1e9]),
        Row("two readers", lambda: 0.0, "disk", scale=lambda value: 2 * value, values=[4e9]),
    ]
    table = stages.table(rows)
    assert "| disk | 4.00 (3.00–5.00) | GB/s | – | – |" in table
    assert "| reader | 1.00 | GB/s | 4.00 GB/s (disk) | 25% |" in table
    assert "| two readers | 4.00 | GB/s | 8.00 GB/s (disk) | 50% |" in table


def test_command_measures_everything_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "_SECONDS", 0.0)
    monkeypatch.setattr(limits, "memcpy", lambda: 1e9)
    stages.main(["--shape", "tiny", "--runs", "2", "--work", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    names = {event["name"] for event in events}
    assert {"direct read", "reader, cold", "compute, 1 worker", "compute, 2 workers", "writer"} <= names
    assert len(events) == 2 * len(names)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
