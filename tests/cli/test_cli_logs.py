"""``--log``, ``-v`` and the environment: what is recorded of a run, what is refused, and what comes before what."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import shardmerge
from shardmerge.api import library
from shardmerge.cli import environment, logs
from shardmerge.cli.main import cli
from shardmerge.system.durable import write_all
from shardmerge.system.events import LOG
from tests.support.builders import (
    Place,
    contents,
    make_place,
    model_config,
    peft_config,
    peft_tensors,
    snapshot,
    write_json,
    write_peft,
)

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(environment.PREFIX)]:
        monkeypatch.delenv(name)


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(TIME.fullmatch(line["time"]) and line["pid"] == os.getpid() for line in found)
    return found


def events(path: Path) -> list[str]:
    return [line["event"] for line in lines(path)]


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_a_run(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    invoke("run", place.config_file(), "--log", log, "--quiet")
    of_shards = ["shard-started", "shard-finished"] * 2
    planned = ["begin", "adapter-opened", "base-opened", "planned"]
    assert events(log) == [*planned, "begun", *of_shards, "merged", "end"]
    by_event = {line["event"]: line for line in lines(log)}
    record = json.loads((place.output / "shardmerge.json").read_text())
    assert by_event["begin"]["shardmerge"] == shardmerge.__version__ and by_event["begin"]["command"] == "run"
    assert by_event["begun"]["digest"] == record["digest"]
    assert by_event["planned"]["config"] == record["config"] and by_event["planned"]["updated"] == 3
    finished = [line for line in lines(log) if line["event"] == "shard-finished"]
    for line in finished:
        assert line["bytes_written"] == (place.output / line["shard"]).stat().st_size
        assert line["checksums"]["xxh3_128"] == record["shards"][line["shard"]]["xxh3_128"]
        assert set(line["stages"]) == {"reading", "working", "writing"} and line["seconds"] >= 0
    assert sum(line["updates"] for line in finished) == by_event["merged"]["targets"] == 3
    assert sum(line["bytes_read"] for line in finished) == sum(
        tensor.source.nbytes
        for shard in shardmerge.plan(place.config(output={"path": "x"})).shards
        for tensor in shard.tensors
    )
    assert (by_event["end"]["exit_code"], by_event["end"]["level"]) == (0, "info")


def test_every_tensor_on_demand(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    invoke("run", place.config_file(), "--log", log, "--quiet", "-vv")
    record = json.loads((place.output / "shardmerge.json").read_text())
    assert {line["tensor"] for line in lines(log) if line["event"] == "updated"} == set(record["targets"])


def test_an_export_and_a_verification(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    invoke("export", place.base, "-o", place.output, "--log", log)
    assert events(log)[-2:] == ["exported", "end"] and "adapter-opened" not in events(log)
    log.unlink()
    invoke("verify", place.output, "--log", log)
    assert events(log)[-4:] == ["shard-verified", "shard-verified", "verified", "end"]
    (place.output / "model-00001-of-00002.safetensors").unlink()
    log.unlink()
    invoke("verify", place.output, "--log", log, code=6)
    verified, end = lines(log)[-2:]
    assert verified["ok"] is False and any("00001" in text for text in verified["problems"])
    assert (verified["level"], end["level"], end["exit_code"]) == ("error", "error", 6)


def test_warnings_and_notes(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    untrained = {name: tensor * (".lora_A." in name) for name, tensor in peft_tensors().items()}
    write_peft(place.adapter, untrained, config=peft_config())
    (place.base / "other.bin").write_bytes(b"\0")
    invoke("run", place.config_file(), "--log", log)
    found = [(line["event"], line["level"], line["text"]) for line in lines(log)]
    nothing = f"adapter {place.adapter} changes nothing: every lora_B is zero, as before training"
    assert ("warning", "warning", nothing) in found


def test_what_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"

    def stop(progress: shardmerge.Progress) -> None:
        if progress.shard_number == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        shardmerge.merge(place.config(), progress=stop)
    invoke("run", place.config_file(), "--log", log)
    (checked,) = (line for line in lines(log) if line["event"] == "shard-checked")
    assert checked["kept"] and checked["shard"] == "model-00001-of-00002.safetensors"
    assert events(log).count("shard-finished") == 1


@pytest.mark.parametrize(
    ("break_it", "code", "said"),
    [
        (lambda place: write_json(place.adapter / "adapter_config.json", peft_config(peft_type="NEW")), 3, "refused"),
        (lambda place: (place.base / "config.json").write_text("{"), 4, "config.json"),
    ],
    ids=["plan", "format"],
)
def test_how_it_failed(tmp_path: Path, break_it: Callable[[Place], object], code: int, said: str) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    break_it(place)
    invoke("run", place.config_file(), "--log", log, code=code)
    end = lines(log)[-1]
    assert (end["event"], end["level"], end["exit_code"]) == ("end", "error", code) and said in end["text"]
    assert code != 3 or "NEW" in " ".join(end["problems"])


def test_a_bug_and_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    for error, code in ((RuntimeError("a\nbug"), 1), (KeyboardInterrupt(), 130)):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(library, "merge", fail)
        CliRunner().invoke(cli, ["run", str(place.config_file()), "--log", str(log)])
        assert lines(log)[-1]["exit_code"] == code
    assert "in fail" in next(line["traceback"] for line in lines(log) if "traceback" in line)


def test_untrusted_words_are_escaped(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    evil = "b\x1b[2J\x7f\u202e\nx"
    place.base.rename(tmp_path / evil)
    result = CliRunner().invoke(cli, ["export", str(tmp_path / evil), "-o", str(place.output), "--log", str(log), "-v"])
    assert result.exit_code == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", log.read_text() + result.stderr)
    assert next(line for line in lines(log) if line["event"] == "base-opened")["location"] == str(tmp_path / evil)


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    for _ in range(2):
        invoke("plan", place.config_file(), "--log", log)
    with log.open("a") as file:
        file.write('{"time": "half a line')
    invoke("plan", place.config_file(), "--log", log)
    found = log.read_text().splitlines()
    assert sum('"event": "begin"' in line for line in found) == 3
    assert sum(line == '{"time": "half a line' for line in found) == 1


def fifo(path: Path) -> None:
    os.mkfifo(path)


def text(path: Path) -> None:
    path.write_text("base: my/model\n")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (fifo, "is not a file"),
        (text, "holds something else than a log of shardmerge"),
        (lambda path: path.symlink_to("/dev/full"), "cannot be written to: No space left on device"),
        (lambda path: path.symlink_to("no/such/folder"), "cannot be opened: No such file"),
        (Path.mkdir, "is a directory"),
    ],
    ids=["fifo", "another file", "full", "nowhere", "folder"],
)
def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    config = place.config_file()
    make(log)
    before = snapshot(tmp_path) if not log.is_fifo() else None
    assert said in invoke("run", config, "--log", log, code=2).stderr
    assert not place.output.exists() and before in (None, snapshot(tmp_path))


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("command", ["run", "plan", "export", "verify"])
def test_a_log_in_the_output_is_refused(tmp_path: Path, command: str, is_new: bool) -> None:
    """It would be no file of the model."""
    place = make_place(tmp_path)
    config = place.config_file()
    log = place.output / "log"
    place.output.mkdir()
    if command == "verify":
        place.output.rmdir()
        shardmerge.merge(place.config())
    if not is_new:
        invoke("plan", config, "-s", f"output.path={tmp_path / 'other'}", "--log", log)
    before = set(contents(place.output))
    arguments = {"export": (place.base, "-o", place.output), "verify": (place.output,)}.get(command, (config,))
    assert "is in the output" in invoke(command, *arguments, "--log", log, code=2).stderr
    assert set(contents(place.output)) == before


def test_a_disk_that_fills_up_does_not_stop_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    real, count = write_all, 0

    def write(fd: int, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, data)

    monkeypatch.setattr(logs, "write_all", write)
    told = invoke("run", place.config_file(), "--log", log, "--quiet").stderr
    assert told == f"warning: --log {log}: No space left on device; the log ends here, the work goes on\n"
    assert len(lines(log)) == 3
    monkeypatch.undo()
    invoke("verify", place.output)


# --- on stderr -------------------------------------------------------------------------------------------------------


def test_verbose(tmp_path: Path) -> None:
    place = make_place(tmp_path, config=model_config(_name_or_path="org/base"))
    write_peft(place.adapter, peft_tensors(), config=peft_config(base_model_name_or_path="org/other"))
    silent = invoke("run", place.config_file(), "--quiet")
    result = invoke("run", place.config_file(), "--overwrite", "-v", "--quiet")
    said = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert "trained on org/other" in silent.stderr
    assert len(said) == 10 and all(re.match(r"\[ +\d+\.\d s\] ", line) for line in said)
    assert "2 updates" in result.stderr and "finished in" in result.stderr
    # What is printed anyway is not printed twice.
    assert [line for line in result.stderr.splitlines() if not line.startswith("[")] == silent.stderr.splitlines()
    assert result.stdout == silent.stdout == ""
    assert json.loads(invoke("plan", place.config_file(), "-v", "--json", "--overwrite").stdout)["targets"]


def test_nothing_stays_behind(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    before = (list(LOG.handlers), LOG.level)
    invoke("plan", place.config_file(), "-vv", "--log", tmp_path / "log")
    assert (list(LOG.handlers), LOG.level) == before


def test_the_library_logs_as_others_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_place(tmp_path)
    with caplog.at_level(logging.INFO, logger="shardmerge"):
        shardmerge.merge(place.config())
    assert [record.event for record in caplog.records][-1] == "merged"  # type: ignore[attr-defined]
    assert "".join(capsys.readouterr()) == ""


# --- the environment -------------------------------------------------------------------------------------------------


def memory_of(*arguments: str | Path) -> Any:
    result = invoke(*arguments, "--quiet", "--json")
    return json.loads((Path(json.loads(result.stdout)["output"]) / "shardmerge.json").read_text())["config"]["compute"]


def test_what_comes_before_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    monkeypatch.setenv("SHARDMERGE_MAX_MEMORY", "300MB")
    monkeypatch.setenv("SHARDMERGE_DEVICE", "cpu")
    plain = ("run", place.config_file(), "--overwrite")
    assert memory_of(*plain) == {"device": "cpu", "dtype": "float32", "max_memory": 300_000_000, "threads": "auto"}
    given = ("run", place.config_file(compute={"max_memory": "auto", "dtype": "float64"}), "--overwrite")
    assert memory_of(*given) == {"device": "cpu", "dtype": "float64", "max_memory": "auto", "threads": "auto"}
    assert memory_of(*given, "-s", "compute.max_memory=400MB")["max_memory"] == 400_000_000
    assert memory_of("export", place.base, "-o", tmp_path / "two")["max_memory"] == 300_000_000
    monkeypatch.delenv("SHARDMERGE_MAX_MEMORY")
    monkeypatch.setenv("SHARDMERGE_DEVICE", "")
    assert memory_of(*plain)["max_memory"] == "auto"


@pytest.mark.parametrize(("name", "value"), [("MAX_MEMORY", "lots"), ("DEVICE", "tpu:x"), ("QUIET", "maybe")])
def test_a_wrong_value_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    place = make_place(tmp_path)
    monkeypatch.setenv(f"SHARDMERGE_{name}", value)
    told = invoke("run", place.config_file(), code=2).stderr
    assert value in told and (name in told or "--quiet" in told)
    assert not place.output.exists()


def test_defaults_for_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, log = make_place(tmp_path), tmp_path / "log"
    monkeypatch.setenv("SHARDMERGE_LOG", str(log))
    monkeypatch.setenv("SHARDMERGE_QUIET", "1")
    monkeypatch.setenv("SHARDMERGE_VERBOSE", "0")
    result = invoke("run", place.config_file())
    assert (result.stdout, result.stderr) == ("", "")
    assert lines(log)[0]["environment"]["SHARDMERGE_QUIET"] == "1"
    invoke("verify", place.output, "--log", tmp_path / "other")
    assert "verify" not in log.read_text() and (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["plan", "inspect", "init"])
def test_a_slip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    place = make_place(tmp_path)
    monkeypatch.setenv("SHARDMERGE_MAX_MEMROY", "1")
    monkeypatch.setenv("SHARDMERGE_OVERWRITE", "1")
    argument = place.config_file() if command == "plan" else place.adapter
    options = ("-o", "-") if command == "init" else ()
    told = invoke(command, argument, *options).stderr
    assert "SHARDMERGE_MAX_MEMROY is not known and has no effect. Did you mean SHARDMERGE_MAX_MEMORY?" in told
    assert "SHARDMERGE_OVERWRITE is not known" in told


def test_overwriting_is_not_set_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    invoke("run", place.config_file())
    monkeypatch.setenv("SHARDMERGE_OVERWRITE", "1")
    assert "already holds a finished merge" in invoke("run", place.config_file(), code=3).stderr


def test_help_names_them() -> None:
    assert all(name in re.sub(r"\s+", " ", invoke("--help").stdout) for name in environment.KNOWN)
    assert "SHARDMERGE_LOG" in invoke("verify", "--help").stdout
