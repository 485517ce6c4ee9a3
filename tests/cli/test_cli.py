"""The command line: what each command prints where, and with which code it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardmerge
from tests.support.builders import (
    DOWN1,
    Q0,
    ROOT,
    contents,
    llama_tensors,
    make_place,
    model_config,
    peft_config,
    peft_tensors,
    pure_tensors,
    read_tensors,
    run_cli,
    snapshot,
    write_base,
    write_peft,
    write_pure,
)
from tests.support.command_line import invoke, invoke_json

# --- run --------------------------------------------------------------------------------------------------------------


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    result = invoke(monkeypatch, "run", place.config_file())
    assert f"{place.output}: 3 weights merged" in result.stdout
    rows = [line.split()[0] for line in result.stdout.splitlines()[2:]]
    assert rows == ["adapter", "base", "merged", "as", "as", "as", "time", "peak", "update"]
    lines = result.stderr.splitlines()
    assert lines[0].startswith("merging:   0%, 0 B of ")
    assert lines[-1].startswith("merging: 100%")
    assert "shard 2/2" in lines[-1]
    merged = read_tensors(place.output)
    assert [name for name, tensor in llama_tensors().items() if not torch.equal(tensor, merged[name])] == [
        f"{module}.weight" for module in (Q0, Q0.replace("q_proj", "v_proj"), DOWN1)
    ]


def test_run_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    report = invoke_json(monkeypatch, "run", place.config_file())
    assert report["output"] == str(place.output)
    assert report["targets"] == 3
    assert report["shards_reused"] == 0
    assert set(report["files"]) == {path.name for path in place.output.iterdir()}
    assert report["peak_memory"] > 0


def test_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    result = invoke(monkeypatch, "run", place.config_file(), "--quiet")
    assert (result.stdout, result.stderr) == ("", "")
    assert (place.output / "model.safetensors.index.json").is_file()


def test_quiet_still_tells_of_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path, config=model_config(_name_or_path="org/base"))
    untrained = {name: tensor * (".lora_A." in name) for name, tensor in peft_tensors().items()}
    write_peft(place.adapter, untrained, config=peft_config(base_model_name_or_path="org/other"))
    result = invoke(monkeypatch, "run", place.config_file(), "--quiet")
    first, second = result.stderr.splitlines()
    assert first.startswith("warning: ")
    assert "trained on org/other" in first
    assert second == f"warning: adapter {place.adapter} changes nothing: every lora_B is zero, as before training"


def test_override_and_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    config = place.config_file()
    other = tmp_path / "other"
    result = invoke(monkeypatch, "run", config, "-s", f"output.path={other}", "-s", "adapters.0.weight=2", "--quiet")
    assert result.exit_code == 0
    assert not place.output.exists()
    record = json.loads((other / "shardmerge.json").read_text())
    assert record["config"]["adapters"][0] == {
        "path": str(place.adapter),
        "weight": 2.0,
        "format": "auto",
        "alpha": None,
        "scaling": None,
        "expert_layout": "auto",
        "prefix": None,
        "ignore_files": [],
        "ignore_keys": [],
    }
    first = contents(other)
    refused = invoke(monkeypatch, "run", config, "-s", f"output.path={other}", code=3)
    assert "already holds a finished merge" in refused.stderr
    assert contents(other) == first
    invoke(monkeypatch, "run", config, "-s", f"output.path={other}", "--overwrite")
    assert contents(other) != first


def test_run_makes_what_the_library_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    invoke(monkeypatch, "run", place.config_file(), "--quiet")
    shardmerge.merge(place.config(output={"path": str(tmp_path / "library")}))
    assert contents(place.output) == contents(tmp_path / "library")


def test_pure_pytorch_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    path = write_pure(tmp_path / "x.pt", pure_tensors())
    config = place.config_file(adapters=str(path))
    assert "give alpha" in invoke(monkeypatch, "run", config, code=3).stderr
    invoke(monkeypatch, "run", config, "-s", f"adapters={{path: {path}, alpha: 8}}", "--quiet")
    shardmerge.merge(place.config(output={"path": str(tmp_path / "peft")}))
    assert contents(place.output) == contents(tmp_path / "peft")


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    config = place.config_file()
    before = snapshot(tmp_path)
    result = invoke(monkeypatch, "plan", config)
    assert snapshot(tmp_path) == before
    assert result.stderr == ""
    for part in (str(place.base), str(place.adapter), str(place.output), "q_proj", "32×32", "scalings: 2", "2 shards"):
        assert part in result.stdout


def test_plan_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    told = invoke_json(monkeypatch, "plan", place.config_file())
    plan = shardmerge.plan(place.config())
    assert told["base"]["location"] == str(place.base)
    assert [target["module"] for target in told["targets"]] == ["q_proj", "v_proj", "down_proj"]
    assert told["targets"][0] == {
        "module": "q_proj",
        "count": 1,
        "shape": [32, 32],
        "family": "lora",
        "rank": 4,
        "scaling": [2.0],
        "adapter": 0,
    }
    assert told["scalings"] == [2.0]
    assert told["shards"] == [
        {"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.tensors)} for shard in plan.shards
    ]
    assert (told["bytes_read"], told["bytes_written"]) == (plan.bytes_read, plan.bytes_written)
    assert told["memory"]["total"] == plan.memory.total
    assert told["digest"] == plan.digest


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", {**llama_tensors(torch.bfloat16), "ids": torch.arange(3)})
    told = invoke_json(monkeypatch, "inspect", base)
    assert told["kind"] == "checkpoint"
    assert told["model_type"] == "llama"
    assert told["architectures"] == ["LlamaForCausalLM"]
    assert told["shards"] == 2
    assert told["index"] == "model.safetensors.index.json"
    assert told["tensors"] == len(llama_tensors()) + 1
    assert told["bytes"] == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert told["dtypes"]["I64"] == {"tensors": 1, "bytes": 24}
    text = invoke(monkeypatch, "inspect", base).stdout
    for part in ("checkpoint", "llama", "LlamaForCausalLM", "BF16"):
        assert part in text


def test_inspect_a_peft_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft_config(base_model_name_or_path="org/base", rank_pattern={"v_proj": 2}, use_rslora=True)
    tensors = {**peft_tensors((Q0,)), **peft_tensors((Q0.replace("q_", "v_"),), 2), "strange": torch.ones(1)}
    adapter = write_peft(tmp_path / "adapter", tensors, config=config)
    told = invoke_json(monkeypatch, "inspect", adapter)
    assert told["kind"] == "adapter"
    assert (told["format"], told["family"], told["trained_on"]) == ("peft", "LORA", "org/base")
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}, "use_rslora": True, "init_lora_weights": True}
    assert (told["ranks"], told["settings"], told["updates"]) == ([2, 4], settings, {"lora": 2})
    assert told["scalings"] == [4.0, 8 / 2**0.5]
    assert told["targets"] == {"q_proj": 1, "v_proj": 1}
    assert told["problems"] == ["strange belongs to no update"]
    text = invoke(monkeypatch, "inspect", adapter).stdout
    for part in ("org/base", "q_proj ×1", "problem: strange belongs to no update"):
        assert part in text


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_inspect_an_adapter_without_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / name
    if name.endswith(".pt"):
        write_pure(path)
    else:
        save_file(peft_tensors(), path)
    told = invoke_json(monkeypatch, "inspect", path)
    assert told["kind"] == "adapter"
    assert told["format"] == ("pure-pytorch" if name.endswith(".pt") else "peft")
    assert (told["ranks"], told["scalings"], told["problems"]) == ([4], None, [])
    assert told["targets"] == {"down_proj": 1, "q_proj": 1, "v_proj": 1}
    assert "must be given its alpha or scaling" in invoke(monkeypatch, "inspect", path).stdout


def test_inspect_another_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = invoke_json(monkeypatch, "inspect", write_peft(tmp_path, config=peft_config(peft_type="PREFIX_TUNING")))
    assert told["family"] == "PREFIX_TUNING"
    (problem,) = told["problems"]
    assert "peft_type PREFIX_TUNING: " in problem and "load both with PEFT" in problem


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["plan"], 2, "Missing argument"),
        (["plan", "config.yaml", "--fast"], 2, "No such option"),
        (["fold", "config.yaml"], 2, "No such command"),
        (["merge", "base"], 2, "Missing argument"),
        (["plan", "."], 2, "directory"),
        (["plan", "gone.yaml"], 2, "cannot be read"),
        (["plan", "config.yaml", "-s", "base"], 2, "key.path=value"),
        (["run", "config.yaml", "-s", "output.pth=x"], 2, "no such key"),
        (["inspect", "gone"], 5, "no such file"),
        (["inspect", "config.yaml"], 4, "config.yaml"),
        (["init", "gone"], 5, "no such file"),
        (["init", "base"], 4, "this is a checkpoint, not an adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, part: str) -> None:
    make_place(tmp_path).config_file()
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    result = invoke(monkeypatch, *arguments, code=code)
    assert part in result.stderr
    assert result.stdout == ""
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        (["plan", "gone.yaml"], "ConfigError", 2),
        (["run", "config.yaml", "-s", "output.pth=x"], "ConfigError", 2),
        (["plan", "config.yaml", "-s", "adapters.0.alpha=1"], "PlanError", 3),
        (["init", "base"], "FormatError", 4),
        (["inspect", "gone"], "MissingError", 5),
        (["plan", "--fast", "config.yaml"], "UsageError", 2),
        (["run"], "UsageError", 2),
        (["paint"], "UsageError", 2),
        (["--fast", "plan"], "UsageError", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_error_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: str, code: int
) -> None:
    make_place(tmp_path).config_file()
    monkeypatch.chdir(tmp_path)
    told = invoke_json(monkeypatch, *arguments, code=code)
    assert (told["error"], told["exit_code"]) == (error, code)
    assert len(told["problems"]) == 1


def test_usage_and_version_of_the_module(tmp_path: Path) -> None:
    done = run_cli("plan", "--fast", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "Traceback" not in done.stderr
    assert shardmerge.__version__ in run_cli("--version").stdout


def test_reader_that_has_gone(tmp_path: Path) -> None:
    """`shardmerge plan … | head -0` ends without a traceback."""
    config = make_place(tmp_path).config_file()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardmerge", "plan", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
