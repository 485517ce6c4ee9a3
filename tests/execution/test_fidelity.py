"""How much of an update survives the rounding: measured on a sample, said in record, report and warning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.execution.engine import Engine
from shardmerge.execution.fidelity import Sampler
from shardmerge.spec.receipts import Fidelity
from shardmerge.spec.tensors import LIBRARY_BYTES
from tests.support.builders import run_cli, write_json
from tests.support.peft_oracle import least_memory, make_config, merge_to, random, stored, write_adapter, write_base

TARGET = "model.layers.0.self_attn.q_proj"
ROWS, COLUMNS, RANK = 2048, 512, 4


def place(folder: Path, size: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """A base with weights of 0.02, and an adapter whose update has a standard deviation of ``size``."""
    weight = random(ROWS, COLUMNS, seed=1, scale=0.02).to(dtype)
    base = write_base(folder / "base", [{f"{TARGET}.weight": weight, "model.norm.weight": weight[0]}])
    factor = math.sqrt(size / math.sqrt(RANK))
    modules = {TARGET: (random(RANK, COLUMNS, seed=2, scale=factor), random(ROWS, RANK, seed=3, scale=factor))}
    return base, write_adapter(folder / "adapter", modules, alpha=float(RANK))


def all_of_it(base: Path, adapter: Path, merged: Path) -> Fidelity:
    """The figures over every element, from the files."""
    name, factors = f"{TARGET}.weight", stored(adapter)
    prefix = f"base_model.model.{TARGET}.lora_"
    weight, after = stored(base)[name].double(), stored(merged)[name].double()
    update = factors[f"{prefix}B.weight"].double() @ factors[f"{prefix}A.weight"].double()
    kept = after - weight.to(stored(merged)[name].dtype).double()
    return Fidelity(
        float((weight * weight).sum()),
        float((update * update).sum()),
        float((kept * update).sum()),
        int((kept == 0).sum()),
        weight.numel(),
    )


def recorded(merged: Path) -> dict[str, dict[str, float]]:
    record = json.loads((merged / "shardmerge.json").read_text())
    figures: dict[str, dict[str, float]] = record["fidelity"]
    return figures


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1e-5, 3e-5, 1e-4, 1e-3])
def test_a_sample_tells_of_the_whole(tmp_path: Path, size: float, dtype: str) -> None:
    base, adapter = place(tmp_path, size)
    report = merge_to(tmp_path / "out", base, adapter, dtype=dtype)
    exact = all_of_it(base, adapter, tmp_path / "out")
    figures = recorded(tmp_path / "out")
    assert list(figures) == [f"{TARGET}.weight"]
    found = figures[f"{TARGET}.weight"]
    # Of rank 4, so that its rows are much more or less than others.
    assert found["relative_update"] == pytest.approx(exact.relative_update, rel=0.1)
    assert found["share_kept"] == pytest.approx(exact.share_kept, abs=0.05)
    assert found["share_unchanged"] == pytest.approx(exact.share_unchanged, abs=0.03)
    assert report.to_json()["fidelity"] == {"q_proj": found}


def test_what_vanishes_is_warned_of(tmp_path: Path) -> None:
    base, adapter = place(tmp_path, 1e-5)
    (warning,) = merge_to(tmp_path / "out", base, adapter).warnings
    share = recorded(tmp_path / "out")[f"{TARGET}.weight"]["share_kept"]
    assert share < 0.4
    assert f"{1 - share:.0%} of that of q_proj" in warning and "bfloat16" in warning
    assert "output.dtype: float32 keeps it" in warning and "output.rounding: stochastic" in warning
    assert not merge_to(tmp_path / "wide", base, adapter, dtype="float32").warnings
    assert recorded(tmp_path / "wide")[f"{TARGET}.weight"]["share_kept"] == pytest.approx(1, abs=1e-3)


def test_the_command_says_it(tmp_path: Path) -> None:
    base, adapter = place(tmp_path, 1e-5)
    config = write_json(tmp_path / "config.yaml", make_config(tmp_path / "out", base, [adapter]))
    done = run_cli("run", config)
    assert done.returncode == 0, done.stderr
    assert "of that of q_proj" in done.stderr
    assert "update kept" in done.stdout


def test_where_nothing_is_updated_nothing_is_said(tmp_path: Path) -> None:
    base, adapter = place(tmp_path, 0.0)
    report = merge_to(tmp_path / "out", base, adapter)
    found = recorded(tmp_path / "out")[f"{TARGET}.weight"]
    assert found == {"relative_update": 0.0, "share_kept": 1.0, "share_unchanged": 1.0}
    assert len(report.warnings) == 1 and "changes nothing" in report.warnings[0]


def test_samples_add_up() -> None:
    one, other = Fidelity(4.0, 1.0, 0.5, 3, 10), Fidelity(0.0, 0.0, 0.0, 10, 10)
    both = one + other
    assert (both.relative_update, both.share_kept, both.share_unchanged) == (0.5, 0.5, 0.65)
    assert (other.relative_update, other.share_kept, other.share_unchanged) == (0.0, 1.0, 1.0)


def test_only_a_few_tiles_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = place(tmp_path, 1e-3)
    config = make_config(tmp_path / "out", base, [adapter])
    config["compute"]["max_memory"] = least_memory(config)
    plan = shardmerge.plan(config)
    seen: list[int] = []
    after = Sampler.after

    def counting(self: Sampler, tensor: Any, rows: Any, sample: Any, exact: Tensor, rounded: Tensor) -> None:
        seen.append(rows.start)
        after(self, tensor, rows, sample, exact, rounded)

    monkeypatch.setattr(Sampler, "after", counting)
    shardmerge.merge(plan)
    tiles = max(tensor.tiles for tensor in plan.shards[0].tensors)
    assert tiles > 30 and 1 <= len(seen) <= 4


def test_a_resumed_merge_reports_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {f"{TARGET}.weight": random(64, 32, seed=1)}
    other = TARGET.replace("q_proj", "v_proj")
    second = {f"{other}.weight": random(64, 32, seed=2)}
    base = write_base(tmp_path / "base", [first, second])
    factors = (random(RANK, 32, seed=3), random(64, RANK, seed=4))
    adapter = write_adapter(tmp_path / "adapter", {TARGET: factors, other: factors})
    config = make_config(tmp_path / "out", base, [adapter])
    merge_shard = Engine.merge_shard
    calls: list[str] = []

    def stopping(self: Engine, shard: Any, writer: Any, advance: Any) -> Any:
        calls.append(shard.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return merge_shard(self, shard, writer, advance)

    monkeypatch.setattr(Engine, "merge_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        shardmerge.merge(config)
    report = shardmerge.merge(config)
    assert report.shards_reused == 1
    merge_to(tmp_path / "whole", base, adapter)
    assert recorded(tmp_path / "out") == recorded(tmp_path / "whole")


# --- stochastic rounding ----------------------------------------------------------------------------------------------


def stochastic(output: Path, base: Path, adapter: Path, memory: Any = "auto", seed: int = 0) -> dict[str, Any]:
    config = make_config(output, base, [adapter], max_memory=memory)
    config["output"] |= {"rounding": "stochastic", "seed": seed}
    return config


def test_stochastic_rounding_keeps_what_nearest_loses(tmp_path: Path) -> None:
    base, adapter = place(tmp_path, 1e-5)
    assert not shardmerge.merge(stochastic(tmp_path / "out", base, adapter)).warnings
    kept = all_of_it(base, adapter, tmp_path / "out").share_kept
    assert kept == pytest.approx(1, abs=0.02)
    name = f"{TARGET}.weight"
    assert torch.equal(stored(tmp_path / "out")["model.norm.weight"], stored(base)["model.norm.weight"])
    # Never further than to a neighbour.
    error = stored(tmp_path / "out")[name].double() - stored(base)[name].double()
    unit = torch.finfo(torch.bfloat16).eps * stored(base)[name].double().abs()
    assert bool((error.abs() <= unit + 1e-4).all())


def test_stochastic_rounding_is_reproducible(tmp_path: Path) -> None:
    base, adapter = place(tmp_path, 1e-4)
    least = least_memory(stochastic(tmp_path / "none", base, adapter))
    outputs = []
    for number, (memory, seed) in enumerate([("auto", 0), (least, 0), (least + LIBRARY_BYTES, 0), ("auto", 1)]):
        shardmerge.merge(stochastic(tmp_path / str(number), base, adapter, memory, seed))
        outputs.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0] != outputs[3]


def test_in_float32_there_is_nothing_to_choose(tmp_path: Path) -> None:
    """Nothing is rounded, so the setting would do nothing; in float64, or where less is stored, it does something."""
    base, adapter = place(tmp_path, 1e-4, torch.float32)
    config = stochastic(tmp_path / "chance", base, adapter)
    with pytest.raises(shardmerge.PlanError, match="computed in F32 and stored in F32, so none is rounded"):
        shardmerge.plan(config)
    for section, dtype in (("compute", "float64"), ("output", "bfloat16"), ("output", "float16")):
        other = stochastic(tmp_path / "chance", base, adapter)
        other[section] = {**other.get(section, {}), "dtype": dtype}
        assert shardmerge.plan(other)
    (tmp_path / "half").mkdir()
    to_float32 = stochastic(tmp_path / "chance", *place(tmp_path / "half", 1e-4, torch.bfloat16))
    assert shardmerge.plan(to_float32)
    to_float32["output"]["dtype"] = "float32"
    with pytest.raises(shardmerge.PlanError, match="stochastic has no effect"):
        shardmerge.plan(to_float32)
