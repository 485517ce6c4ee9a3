"""The comparison itself: its options, what it needs of disk and memory, and a small one from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import cgroup, check, machine, merge, space, tools, turns
from benchmarks.making import ensure
from benchmarks.runs import Setting
from benchmarks.shapes import REAL, SHAPES
from tests.support.builders import ROOT

TINY = SHAPES["tiny"]
GB = 10**9


# --- options ----------------------------------------------------------------------------------------------------------


def test_usual_options() -> None:
    options = merge.parse([])
    assert [shape.name for shape in options.shape] == ["tinyllama"]
    disk = [f"direct-{what}" for what in ("read", "write", "read-huge", "write-huge", "copy-huge")]
    assert options.tools == ["shardmerge", "copy", "import-torch", "peft", *disk]
    assert (options.rank, options.sweep, options.cache, options.memory_limit) == ([16], [], "auto", None)


def test_all_shapes_are_the_real_ones() -> None:
    assert [shape.name for shape in merge.parse(["--shape", "all"]).shape] == REAL


def test_mergekit_is_there_where_its_interpreter_is() -> None:
    assert "mergekit" in merge.parse(["--mergekit-python", "/x/python"]).tools


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny,huge"], "no such shape: huge"),
        (["--shape", "index-1000"], "no such shape"),
        (["--tools", "shardmerge,mv"], "no such tool: mv"),
        (["--tools", "mergekit"], "--mergekit-python"),
        (["--rank", "4"], "from 8 to 256, not 4"),
        (["--sweep", "16,512"], "from 8 to 256, not 512"),
        (["--runs", "0"], "--runs"),
        (["--cold", "--drop"], "not allowed with"),
        (["--memory-limit", "much"], "is not a size"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merge.parse(arguments)
    assert message in capsys.readouterr().err


def test_drop_takes_a_file_that_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merge, "DROP_CACHES", tmp_path / "missing")
    with pytest.raises(SystemExit):
        merge.parse(["--drop"])
    assert "is not writable" in capsys.readouterr().err


def test_limit_is_refused_where_it_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(limit: int) -> Path:
        raise cgroup.LimitError("not here")

    monkeypatch.setattr(cgroup, "_systemd", lambda limit: None)
    monkeypatch.setattr(cgroup, "_make", refuse)
    with pytest.raises(SystemExit):
        merge.parse(["--memory-limit", "400MiB"])
    assert "not here" in capsys.readouterr().err


def planned(arguments: list[str]) -> tuple[list[merge.Comparison], list[str]]:
    notes: list[str] = []
    return list(merge.comparisons(merge.parse(arguments), notes.append)), notes


def test_shapes_and_ranks_are_compared_and_a_sweep_is_shardmerge_alone() -> None:
    found, notes = planned(["--shape", "tiny,tiny-moe", "--rank", "8,16", "--sweep", "16,64", "--check"])
    assert [(one.shape.name, one.setting.rank, len(one.tools), one.check) for one in found] == [
        ("tiny", 8, 9, True),
        ("tiny", 16, 9, True),
        ("tiny-moe", 8, 9, True),
        ("tiny-moe", 16, 9, True),
        ("tiny", 64, 1, False),
    ]
    assert not notes


def test_the_first_shape_is_merged_in_memory_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "filesystem", lambda work: "tmpfs")
    found, _ = planned(["--shape", "tiny,tiny-moe", "--work", str(tmp_path / "disk"), "--in-memory", str(tmp_path)])
    assert [one.shape.name for one in found] == ["tiny", "tiny-moe", "tiny"]
    assert [one.setting.storage for one in found] == ["disk", "disk", "memory"]
    assert [one.work for one in found] == [tmp_path / "disk", tmp_path / "disk", tmp_path]
    assert found[-1].tools == list(tools.IN_MEMORY) and found[-1].setting.cores == len(os.sched_getaffinity(0))


def test_a_disk_is_not_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "filesystem", lambda work: "ext4")
    with pytest.raises(SystemExit):
        merge.parse(["--in-memory", "/x"])
    assert "is not in memory" in capsys.readouterr().err


def test_cache_follows_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "memory", lambda: 24 * GB)
    arguments = ["--shape", "tinyllama,llama3-8b"]
    assert [one.setting.cache for one in planned(arguments)[0]] == ["warm", "cold"]
    assert [one.setting.cache for one in planned([*arguments, "--cold"])[0]] == ["cold", "cold"]
    assert [one.setting.cache for one in planned([*arguments, "--warm"])[0]] == ["warm", "warm"]


def test_tool_that_memory_does_not_hold_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "memory", lambda: 8 * GB)
    (small, large), notes = planned(["--shape", "tinyllama,llama3-8b", "--check"])
    assert "peft" in small.tools and "peft" not in large.tools and not large.check
    assert "shardmerge" in large.tools
    assert len(notes) == 1 and "llama3-8b: peft left out" in notes[0]


def test_experts_take_a_model_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's peak on the 3.7 GB shape was 8.7 GB."""
    moe = SHAPES["qwen3-moe"]
    for gigabytes, is_too_little in ((8.0, True), (10.0, False)):
        monkeypatch.setattr(space, "memory", lambda size=gigabytes: int(size * GB))
        assert space.lacks_memory("peft", moe, "same") is is_too_little
        assert space.lacks_memory("peft", moe, "float32")
        assert not space.lacks_memory("shardmerge", moe, "same")


# --- space ------------------------------------------------------------------------------------------------------------


def test_disk_holds_inputs_and_outputs(tmp_path: Path) -> None:
    base, adapter = TINY.base_bytes(), TINY.adapter_bytes()

    def need(dtype: str, names: list[str], is_checked: bool) -> float:
        return space.disk(TINY, tmp_path, dtype, names, is_checked).total / 1.02

    assert need("same", ["shardmerge", "copy"], False) == pytest.approx(2 * base + adapter, abs=2)
    assert need("float32", ["shardmerge"], False) == pytest.approx(3 * base + adapter, abs=2)
    assert need("same", ["shardmerge", "peft", "copy"], True) == pytest.approx(4 * base + adapter, abs=2)
    assert need("same", ["shardmerge", "mergekit"], True) == pytest.approx(4 * base + adapter, abs=2)


def test_what_is_there_needs_no_more_disk(tmp_path: Path) -> None:
    before = space.disk(TINY, tmp_path, "same", ["copy"], False)
    ensure(TINY, tmp_path)
    after = space.disk(TINY, tmp_path, "same", ["copy"], False)
    other = space.disk(TINY.with_rank(64), tmp_path, "same", ["copy"], False)
    assert before.more == before.total == after.total > after.more
    assert other.more - after.more == pytest.approx(1.02 * TINY.with_rank(64).adapter_bytes(), abs=2)
    assert "of it there already" in after.text(GB) and "there already" not in before.text(GB)


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert space.free_disk(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize(("free", "checked"), [(4.5, True), (3.0, False), (1.0, None)])
def test_what_space_lacks_for_is_skipped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, checked: bool | None
) -> None:
    monkeypatch.setattr(space, "free_disk", lambda work: int(free * TINY.base_bytes()))
    (comparison,), notes = planned(["--shape", "tiny", "--check", "--work", str(tmp_path)])
    found = merge.fit(comparison, notes.append)
    assert (found.check if found else None) is checked
    assert len(notes) == {True: 0, False: 1, None: 2}[checked]
    assert checked is not None or "SKIPPED" in notes[-1]


# --- tools ------------------------------------------------------------------------------------------------------------


def task(tmp_path: Path, **setting: Any) -> tools.Task:
    (tmp_path / "scratch").mkdir()
    made = ensure(TINY, tmp_path)
    return tools.Task(made, Setting("tiny", 1, **setting), tmp_path / "output", tmp_path / "scratch")


def test_setting_reaches_every_merge(tmp_path: Path) -> None:
    of = task(tmp_path, dtype="float32", compute_dtype="float64", device="cuda")
    config = json.loads(Path(tools.shardmerge(of)[-1]).read_text())
    assert config["output"]["dtype"] == "float32"
    assert config["compute"] == {"device": "cuda", "dtype": "float64"}
    assert tools.peft(of)[-2:] == ["float32", "cuda"]
    command = tools.mergekit("/x/python")(of)
    assert "/x/python" in command and "--cuda" in command
    assert json.loads((of.scratch / "mergekit.yaml").read_text())["dtype"] == "float32"
    assert "cuda" in tools.import_torch(of)[-1]


def test_one_core_is_one_of_ours(tmp_path: Path) -> None:
    command = tools.shardmerge_on_one_core(task(tmp_path))
    assert command[:2] == ["taskset", "--cpu-list"] and int(command[2]) in os.sched_getaffinity(0)
    assert command[3] == sys.executable


def test_same_dtype_is_the_bases(tmp_path: Path) -> None:
    of = task(tmp_path)
    assert tools.peft(of)[-2:] == ["bfloat16", "cpu"]
    assert tools.import_torch(of)[-1] == "import torch"


def test_caches_are_dropped_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knob = tmp_path / "drop_caches"
    calls: list[str] = []
    monkeypatch.setattr(turns, "DROP_CACHES", knob)
    monkeypatch.setattr(turns, "warm", lambda files: calls.append("warm"))
    monkeypatch.setattr(turns, "cool", lambda files: calls.append("cool"))
    made = ensure(TINY, tmp_path)
    for cache in ("warm", "cold"):
        turns.Turns(made, Setting("tiny", 1, cache=cache), tmp_path, {})._prepare_cache()
    assert calls == ["warm", "cool"] and not knob.exists()
    turns.Turns(made, Setting("tiny", 1, cache="drop"), tmp_path, {})._prepare_cache()
    assert knob.read_text() == "3"


# --- the check of outputs ---------------------------------------------------------------------------------------------


def checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as exit_:
        check.main(arguments)
    return exit_.value.code, capsys.readouterr().out


def _change(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a.experts.0"][1] += 1


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["c"] = tensors.pop("a.experts.0")


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["a.experts.0"] = tensors["a.experts.0"].to(torch.float16)


@pytest.mark.parametrize(
    ("damage", "plain", "ignoring", "text"),
    [
        (lambda tensors: None, 0, 0, "all 2 tensors are the same"),
        (_change, 1, 0, "1 of 4 values, by at most 1"),
        (_rename, 1, 1, "c: only in the second"),
        (_narrow, 1, 1, "torch.float32 [4] expected, torch.float16 [4] found"),
    ],
)
def test_check_finds_every_difference(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[dict[str, torch.Tensor]], None],
    plain: int,
    ignoring: int,
    text: str,
) -> None:
    tensors = {"a.experts.0": torch.arange(4.0), "b": torch.zeros(2, 2)}
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
    save_file(tensors, str(tmp_path / "left" / "model.safetensors"))
    damage(tensors)
    save_file(tensors, str(tmp_path / "right" / "model.safetensors"))
    folders = [str(tmp_path / "left"), str(tmp_path / "right")]
    code, out = checked(folders, capsys)
    assert code == plain and text in out
    code, out = checked([*folders, "--ignore", ".experts."], capsys)
    assert code == ignoring
    assert (plain == ignoring) or "1 in which it is expected" in out


# --- from end to end --------------------------------------------------------------------------------------------------


def session(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, events, and what is printed."""
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.merge", "--work", str(tmp_path / "work"), "--results", str(results)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert results.exists(), done.stderr
    return done.returncode, [json.loads(line) for line in results.read_text().splitlines()], done.stdout + done.stderr


def runs(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(event["tool"], event["run"]) for event in events if event["event"] == "run"]


@pytest.mark.slow
def test_small_comparison_takes_turns_and_cleans_up(tmp_path: Path) -> None:
    code, events, out = session(tmp_path, "--shape", "tiny", "--tools", "shardmerge,copy", "--runs", "2", "--cold")
    assert code == 0, out
    assert events[0]["event"] == "begin" and "memory" in events[0]
    assert runs(events) == [("shardmerge", 1), ("copy", 1), ("shardmerge", 2), ("copy", 2)]
    assert all(json.dumps(event, ensure_ascii=False) in out for event in events), "what is written is printed"
    assert all(event["peak_bytes"] > 0 and event["cache"] == "cold" for event in events if event["event"] == "run")
    assert "| shardmerge | 2 |" in out and "### Verdict" in out and "needs" in out
    left = {path.name for path in (tmp_path / "work" / "runs").iterdir()}
    assert left == {"shardmerge.log", "copy.log"}
    assert (tmp_path / "work" / "tiny" / "base").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_merges_are_compared_with_peft(tmp_path: Path, shape: str) -> None:
    """With experts PEFT rounds twice, so these may differ, and nothing else."""
    arguments = ("--shape", shape, "--tools", "shardmerge,peft", "--runs", "1", "--check", "--remove-inputs")
    code, events, out = session(tmp_path, *arguments)
    assert code == 0, out
    (found,) = [event for event in events if event["event"] == "check"]
    assert found["good"]
    expected = "all 21 tensors are the same" if shape == "tiny" else "in which it is expected (.experts.)"
    assert expected in found["text"]
    assert not (tmp_path / "work" / shape).exists(), "what this run made is removed when asked for"


@pytest.mark.slow
def test_moe_merge_is_near_pefts(tmp_path: Path) -> None:
    """That experts may differ must not hide that they are wrong: one step of bfloat16, not an update."""
    made = ensure(SHAPES["tiny-moe"], tmp_path)
    setting = Setting("tiny-moe", 1)
    found = {}
    for name in ("shardmerge", "peft"):
        folder = tmp_path / name
        folder.mkdir()
        of = tools.Task(made, setting, folder / "output", folder)
        subprocess.run(tools.all_tools(None)[name](of), cwd=ROOT, check=True, capture_output=True)
        found[name] = load_file(folder / "output" / "model.safetensors")
    base = load_file(made.base / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    ours, theirs, before = (of[name].double() for of in (found["shardmerge"], found["peft"], base))
    assert (ours - theirs).norm() < 0.01 * (theirs - before).norm()


def test_failure_is_told_and_counts(tmp_path: Path) -> None:
    arguments = ("--shape", "tiny", "--tools", "mergekit,copy", "--runs", "1", "--mergekit-python", sys.executable)
    code, events, out = session(tmp_path, *arguments)
    assert code == 1
    assert "mergekit failed with 1" in out and "No module named" in out
    assert "| mergekit | all 1 failed |" in out
    assert runs(events) == [("mergekit", 1), ("copy", 1)]


def test_limit_that_is_too_small_kills_and_is_told(tmp_path: Path) -> None:
    try:
        with cgroup.limited(64 << 20):
            pass
    except cgroup.LimitError as error:
        pytest.skip(str(error))
    arguments = ("--shape", "tiny", "--tools", "shardmerge,copy", "--runs", "1", "--memory-limit", "64MiB")
    code, events, out = session(tmp_path, *arguments)
    assert code == 0, "a limit is there to see who stays within it"
    failed = {event["tool"]: event["failed"] for event in events if event["event"] == "run"}
    assert failed == {"shardmerge": True, "copy": False}, out
    assert "all 1 killed at the limit" in out
