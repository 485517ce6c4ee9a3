"""Unfinished merges: taken up where they stopped, kept apart from other merges, and locked while in work."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

import shardmerge
from shardmerge import FormatError, OutputError, ResumeError, ShardmergeError, SourceError
from shardmerge.cli.main import cli
from shardmerge.destinations.local import journal
from shardmerge.destinations.local.directory import Commit, LocalDirectory
from shardmerge.destinations.local.journal import Stage
from shardmerge.system.directory import Entry
from tests.support.peft_oracle import make_config, random, weight_bytes, write_adapter, write_base
from tests.support.tampering import sealed

ROOT = Path(__file__).resolve().parents[2]
TARGETS = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


class StopError(Exception):
    pass


class Place:
    """A base of three shards, two adapters, an output."""

    def __init__(self, folder: Path, written: list[str]) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.stage = self.output / ".shardmerge" / "stage"
        self.receipts = self.output / ".shardmerge" / "receipts"
        #: Shards whose writing was begun since this list was last cleared.
        self.written = written
        shards = [{f"{target}.weight": random(20, 12, seed=number)} for number, target in enumerate(TARGETS)]
        self.base = write_base(folder / "base", shards)
        for seed, name in enumerate("xy"):
            factors = random(2, 12, seed=seed + 10), random(20, 2, seed=seed + 20)
            write_adapter(folder / name, dict.fromkeys(TARGETS, factors))

    def config(self, adapter: str = "x", output: str = "out", **options: Any) -> dict[str, Any]:
        return make_config(self.folder / output, self.base, [self.folder / adapter], **options)

    def merge(self, adapter: str = "x", *, overwrite: bool = False, **options: Any) -> shardmerge.MergeReport:
        self.written.clear()
        return shardmerge.merge(self.config(adapter, **options), overwrite=overwrite)

    def stop_in_shard(self, number: int, adapter: str = "x", **options: Any) -> None:
        """Begin a merge and stop it after some bytes of a shard; 4 stops it when all shards are done."""

        def progress(now: shardmerge.Progress) -> None:
            if now.shard_number == number:
                raise StopError

        with pytest.MonkeyPatch.context() as patch:
            if number > 3:
                patch.setattr(Commit, "run", _stop)
            with pytest.raises(StopError):
                shardmerge.merge(self.config(adapter, **options), progress=progress)
        self.written.clear()

    def expected(self, adapter: str = "x") -> dict[str, bytes]:
        shardmerge.merge(self.config(adapter, output=f"expected-{adapter}"))
        self.written.clear()
        return weight_bytes(self.folder / f"expected-{adapter}")


def _stop(*_: Any) -> None:
    raise StopError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    written: list[str] = []
    original = Stage.writer

    def noting(self: Stage, shard: Any) -> Any:
        written.append(shard.name)
        return original(self, shard)

    monkeypatch.setattr(Stage, "writer", noting)
    return Place(tmp_path, written)


# --- taking up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 4], ids="stopped-in-shard-{}".format)
def test_finished_shards_are_not_written_again(number: int, place: Place) -> None:
    expected = place.expected()
    place.stop_in_shard(number)
    assert weight_bytes(place.output) == {}
    assert sorted(os.listdir(place.stage)) == SHARDS[: number - 1]
    report = place.merge()
    assert place.written == SHARDS[number - 1 :]
    assert report.shards_reused == number - 1
    assert weight_bytes(place.output) == expected
    assert not (place.output / ".shardmerge").exists()


def test_what_the_journal_says_is_read_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for every shard, of which there may be hundreds."""
    place.stop_in_shard(4)
    plan = shardmerge.plan(place.config())
    read: list[str] = []
    original = journal.read_json

    def noting(file: Entry) -> Any:
        read.append(file.name)
        return original(file)

    monkeypatch.setattr(journal, "read_json", noting)
    assert shardmerge.merge(plan).shards_reused == 3
    assert read.count("journal.json") == 1


def test_another_max_memory_takes_up_the_same_merge(place: Place) -> None:
    expected = place.expected()
    place.stop_in_shard(3)
    assert place.merge(max_memory="100MB").shards_reused == 2
    assert weight_bytes(place.output) == expected


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    """Its last bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _zero(path: Path) -> None:
    """As a file system may leave what was never written."""
    path.write_bytes(bytes(path.stat().st_size))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _no_object(path: Path) -> None:
    path.write_text("[1]")


def _other_digest(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "another"}))


_DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "shard-gone": ("stage", Path.unlink),
    "shard-cut": ("stage", _cut),
    "shard-of-other-bytes": ("stage", _flip),
    "shard-of-zeros": ("stage", _zero),
    "receipt-gone": ("receipts", Path.unlink),
    "receipt-cut": ("receipts", _cut),
    "receipt-empty": ("receipts", _empty),
    "receipt-of-another-merge": ("receipts", _other_digest),
    "receipt-is-no-object": ("receipts", _no_object),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_what_is_not_sure_to_be_finished_is_written_again(damage: str, place: Place) -> None:
    expected = place.expected()
    place.stop_in_shard(3)
    folder, harm = _DAMAGES[damage]
    harm(getattr(place, folder) / (SHARDS[0] + (".json" if folder == "receipts" else "")))
    assert place.merge().shards_reused == 1
    assert place.written == [SHARDS[0], SHARDS[2]]
    assert weight_bytes(place.output) == expected


def test_a_damaged_journal_starts_anew(place: Place) -> None:
    expected = place.expected()
    place.stop_in_shard(3)
    (place.output / ".shardmerge" / "journal.json").write_bytes(b"\0" * 100)
    assert place.merge().shards_reused == 0
    assert weight_bytes(place.output) == expected


def test_a_file_without_a_receipt_is_not_taken_for_a_finished_shard(place: Place) -> None:
    expected = place.expected()
    place.stop_in_shard(2)
    (place.stage / SHARDS[2]).write_bytes(bytes(len(expected[SHARDS[2]])))
    assert place.merge().shards_reused == 1
    assert weight_bytes(place.output) == expected


# --- other merges -----------------------------------------------------------------------------------------------------

_OTHERS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "adapter": lambda place: place.config("y"),
    "weight": lambda place: {**place.config(), "adapters": [{"path": str(place.folder / "x"), "weight": 0.5}]},
    "two-adapters": lambda place: {**place.config(), "adapters": [str(place.folder / "x"), str(place.folder / "y")]},
    "output-dtype": lambda place: place.config(dtype="bfloat16"),
    "shard-size": lambda place: place.config(max_shard_size=10**9),
    "compute-dtype": lambda place: place.config(compute="float64"),
}


@pytest.mark.parametrize("other", _OTHERS)
def test_an_unfinished_merge_of_something_else_is_left_alone(other: str, place: Place) -> None:
    place.stop_in_shard(3)
    before = {path: path.read_bytes() for path in place.stage.iterdir()}
    with pytest.raises(ResumeError, match="overwrite=True") as caught:
        shardmerge.merge(_OTHERS[other](place))
    assert caught.value.exit_code == 7 and str(place.output) in str(caught.value)
    assert {path: path.read_bytes() for path in place.stage.iterdir()} == before
    assert place.merge().shards_reused == 2


def test_the_command_line_says_7(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.stop_in_shard(2)
    config = place.folder / "config.yaml"
    config.write_text(json.dumps(place.config("y")))
    assert cli.main(["run", str(config)], standalone_mode=False) == 7
    assert "something else; nothing was changed. Different are: the adapter" in capsys.readouterr().err
    assert cli.main(["run", str(config), "--overwrite", "--quiet"], standalone_mode=False) in (0, None)
    assert weight_bytes(place.output) == place.expected("y")


def _adapter(place: Place) -> Path:
    return place.folder / "x" / "adapter_model.safetensors"


def test_an_adapter_that_was_written_again_with_the_same_bytes_is_the_same(place: Place) -> None:
    expected = place.expected()
    place.stop_in_shard(3)
    data = _adapter(place).read_bytes()
    _adapter(place).unlink()
    _adapter(place).write_bytes(data)
    os.utime(_adapter(place), ns=(1, 1))
    assert place.merge().shards_reused == 2
    assert weight_bytes(place.output) == expected


def _other_bytes(path: Path) -> None:
    """One bit of it, and neither its size nor its time."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _header(place: Place) -> None:
    """The tensors under other names: a header of the same length, with the same time."""
    path = place.base / SHARDS[2]
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tf"'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _program(place: Place) -> None:
    path = place.output / ".shardmerge" / "journal.json"
    state = json.loads(path.read_text())
    state["fingerprint"]["program"]["shardmerge"] = "0.0.1"
    path.write_text(json.dumps({**state, "digest": "another"}))


def _old_journal(place: Place) -> None:
    (place.output / ".shardmerge" / "journal.json").write_text(json.dumps({"digest": "of long ago"}))


_WHAT: dict[str, tuple[Callable[[Place], Any], dict[str, Any], str]] = {
    "adapter": (lambda place: _other_bytes(_adapter(place)), {}, r"the adapter \(0/adapter_model.safetensors\)\."),
    "base-time": (lambda place: _later(place.base / SHARDS[1]), {}, rf"the base \({SHARDS[1]}\)\."),
    "base-header": (_header, {}, rf"the base \({SHARDS[2]}\)\."),
    "file": (
        lambda place: (place.base / "config.json").write_text('{"model_type": "llama"}'),
        {},
        r"files beside the weights \(config.json\)\.",
    ),
    "new-file": (
        lambda place: (place.base / "tokenizer.json").write_text("{}"),
        {},
        r"files beside the weights \(tokenizer.json is new\)\.",
    ),
    "config": (lambda place: None, {"dtype": "float16"}, r"the config \(output.dtype was same, is float16\)\."),
    "config-twice": (
        lambda place: None,
        {"dtype": "float16", "compute": "float64"},
        r"the config \(compute.dtype was float32, is float64, output.dtype was same, is float16\)\.",
    ),
    "program": (_program, {}, rf"the program \(shardmerge was 0.0.1, is {shardmerge.__version__}\)\."),
    "old-journal": (_old_journal, {}, "is not known"),
}


@pytest.mark.parametrize("what", _WHAT)
def test_it_is_told_what_differs(what: str, place: Place) -> None:
    change, options, told = _WHAT[what]
    place.stop_in_shard(3)
    change(place)
    with pytest.raises(ResumeError, match=told) as caught:
        place.merge(**options)
    assert caught.value.exit_code == 7 and "overwrite=True" in str(caught.value)
    assert sorted(os.listdir(place.stage)) == SHARDS[:2]


@pytest.mark.parametrize("number", [1, 3, 4], ids="stopped-in-shard-{}".format)
def test_overwrite_starts_anew(number: int, place: Place) -> None:
    expected = place.expected("y")
    place.stop_in_shard(number)
    assert place.merge("y", overwrite=True).shards_reused == 0
    assert place.written == SHARDS
    assert weight_bytes(place.output) == expected


# --- overwriting what is finished -------------------------------------------------------------------------------------


def test_a_finished_output_is_replaced_and_what_is_not_of_it_stays(place: Place) -> None:
    expected = place.expected("y")
    (place.base / "tokenizer.json").write_text("{}")
    place.merge(max_shard_size=1)
    (place.base / "tokenizer.json").unlink()
    (place.output / "notes.txt").write_text("mine")
    (place.output / "notes").mkdir()
    (place.output / "notes" / "more.txt").write_text("mine too")
    with pytest.raises(ShardmergeError, match="overwrite=True"):
        place.merge("y")
    place.merge("y", overwrite=True)
    assert weight_bytes(place.output) == expected
    assert sorted(os.listdir(place.output)) == sorted(
        [*SHARDS, "config.json", "model.safetensors.index.json", "notes", "notes.txt", "shardmerge.json"]
    )
    assert (place.output / "notes" / "more.txt").read_text() == "mine too"


_NAMES: dict[str, Any] = {
    "parent": ["../victim"],
    "absolute": ["/{}/victim"],
    "by-way-of-a": ["a/../../victim"],
    "no-list": "../victim",
    "no-strings": [1, None, ["victim"]],
    "empty": [""],
    "dots": ["config.json", ".."],
}


@pytest.mark.parametrize("names", _NAMES.values(), ids=_NAMES)
def test_a_record_cannot_name_files_elsewhere(names: Any, place: Place) -> None:
    place.merge()
    (place.folder / "victim").write_text("mine")
    if isinstance(names, list):
        names = [name.format(place.folder) if isinstance(name, str) else name for name in names]
    record = place.output / "shardmerge.json"
    record.write_text(json.dumps(sealed({**json.loads(record.read_text()), "files": names})))
    place.merge("y", overwrite=True)
    assert (place.folder / "victim").read_text() == "mine"
    assert weight_bytes(place.output) == place.expected("y")


def test_a_plan_does_not_replace_what_was_finished_after_it_was_made(place: Place) -> None:
    plan = shardmerge.plan(place.config("x"))
    place.merge("y")
    with pytest.raises(ShardmergeError, match="overwrite=True"):
        shardmerge.merge(plan)
    assert weight_bytes(place.output) == place.expected("y")


# --- the lock ---------------------------------------------------------------------------------------------------------

_HOLDER = """
import sys
from shardmerge.destinations.local.directory import LocalDirectory
with LocalDirectory(sys.argv[1], False):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(output: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of an output."""
    command = [sys.executable, "-c", _HOLDER, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_an_output_on_which_another_process_works_is_left_alone(overwrite: bool, place: Place) -> None:
    with holder(place.output) as process:
        before = sorted(place.output.rglob("*"))
        with pytest.raises(ResumeError, match=rf"process {process.pid} on ") as caught:
            place.merge(overwrite=overwrite)
        assert caught.value.exit_code == 7
        assert sorted(place.output.rglob("*")) == before


def test_the_lock_of_a_killed_process_is_no_lock(place: Place) -> None:
    with holder(place.output) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        place.merge(overwrite=True)
    assert weight_bytes(place.output) == place.expected()


def test_two_merges_of_one_process_lock_each_other_out(place: Place) -> None:
    with LocalDirectory(str(place.output), False), pytest.raises(ResumeError, match=f"process {os.getpid()} on "):
        place.merge()
    place.merge()


def test_a_disk_without_space_for_the_journal_is_an_output_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OutputError, match="No space left"):
        place.merge()


# --- sources that change ----------------------------------------------------------------------------------------------


def _later(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [_later, _cut, Path.unlink], ids=["written-again", "cut", "gone"])
@pytest.mark.parametrize(
    "name", ["base/" + SHARDS[1], "x/adapter_model.safetensors", "base/config.json"], ids=["base", "adapter", "config"]
)
def test_a_source_that_changes_after_the_plan_stops_the_merge(
    name: str, change: Callable[[Path], None], place: Place
) -> None:
    plan = shardmerge.plan(place.config())
    change(place.folder / name)
    with pytest.raises(SourceError, match=name) as caught:
        shardmerge.merge(plan)
    assert caught.value.exit_code == 5
    assert not (place.output / "model.safetensors.index.json").exists()


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def _replace(path: Path) -> None:
    """By another file of the same size and time."""
    status = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.rename(path)


@pytest.mark.parametrize("change", [_later, _append, _replace, Path.unlink], ids=["time", "size", "inode", "gone"])
@pytest.mark.parametrize("name", ["base/" + SHARDS[1], "x/adapter_model.safetensors"], ids=["base", "adapter"])
def test_a_source_that_changes_while_it_is_read_stops_the_merge(
    name: str, change: Callable[[Path], None], place: Place
) -> None:
    path, kept = place.folder / name, place.folder / "kept"
    os.link(path, kept)
    time, data = path.stat().st_mtime_ns, path.read_bytes()

    def progress(now: shardmerge.Progress) -> None:
        # What was read of the second shard is on its way; nothing is finished of it.
        if now.shard_number == 2 and now.done > 20 * 12 * 4 and not changed:
            changed.append(now.shard)
            change(path)

    changed: list[str] = []
    with pytest.raises(SourceError, match=rf"{path}: .* (while it was being read|since the plan)") as caught:
        shardmerge.merge(place.config(), progress=progress)
    assert caught.value.exit_code == 5 and "is of the file as it was" in str(caught.value)
    assert sorted(os.listdir(place.stage)) == SHARDS[:1]
    # With the file as it was, it goes on.
    if change is not Path.unlink:
        path.unlink()
    os.link(kept, path)
    path.write_bytes(data)
    os.utime(path, ns=(time, time))
    assert place.merge().shards_reused == 1
    assert weight_bytes(place.output) == place.expected()


# --- checksums --------------------------------------------------------------------------------------------------------


def _entries(output: Path) -> Any:
    return json.loads((output / "shardmerge.json").read_text())["shards"]


def _checksums(path: Path, *, sha256: bool) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = {"bytes": len(data), "xxh3_128": xxh3_128_hexdigest(data)}
    return {**found, "sha256": hashlib.sha256(data).hexdigest()} if sha256 else found


@pytest.mark.parametrize("later", [False, True], ids=["", "sha256-later"])
@pytest.mark.parametrize("first", [False, True], ids=["", "sha256-first"])
def test_the_record_has_the_checksums_of_all_shards_whoever_wrote_them(first: bool, later: bool, place: Place) -> None:
    config = place.config()
    config["output"]["sha256"] = first
    with pytest.raises(StopError):
        shardmerge.merge(config, progress=lambda now: _stop() if now.shard_number == 3 else None)
    config["output"]["sha256"] = later
    assert shardmerge.merge(config).shards_reused == 2
    assert _entries(place.output) == {name: _checksums(place.output / name, sha256=later) for name in SHARDS}


def test_a_report_counts_what_this_run_did(place: Place) -> None:
    plan = shardmerge.plan(place.config())
    place.stop_in_shard(3)
    report = place.merge()
    whole = sum(shard.nbytes for shard in plan.shards)
    assert report.bytes_written == plan.bytes_written - whole + plan.shards[2].nbytes
    assert report.bytes_read == plan.bytes_read // 3
    assert report.merged_bytes == whole


def test_what_was_damaged_is_told(place: Place) -> None:
    place.stop_in_shard(3)
    _flip(place.stage / SHARDS[1])
    report = place.merge()
    assert [warning for warning in report.warnings if SHARDS[1] in warning]


# --- directories ------------------------------------------------------------------------------------------------------


def _infinite(place: Place) -> Path:
    return write_adapter(place.folder / "z", {TARGETS[2]: (random(2, 12, seed=1) / 0, random(20, 2, seed=2))})


def test_a_merge_that_cannot_succeed_leaves_no_directories(place: Place) -> None:
    _infinite(place)
    with pytest.raises(FormatError):
        shardmerge.merge(place.config("z", output="deep/er/out"))
    assert not (place.folder / "deep").exists()


def test_neither_does_one_that_was_interrupted_before(place: Place) -> None:
    _infinite(place)
    (place.folder / "there").mkdir()
    config = place.config("z", output="there/deep/out")
    with pytest.raises(StopError):
        shardmerge.merge(config, progress=_stop)
    assert (place.folder / "there" / "deep" / "out" / ".shardmerge").is_dir()
    with pytest.raises(FormatError):
        shardmerge.merge(config)
    assert os.listdir(place.folder / "there") == []


def test_a_merge_that_did_not_begin_leaves_no_directories(place: Place) -> None:
    plan = shardmerge.plan(place.config(output="deep/out"))
    _append(place.folder / "x" / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"changed since the plan.*Nothing was changed"):
        shardmerge.merge(plan)
    assert not (place.folder / "deep").exists()


def test_a_plan_that_came_too_late_leaves_a_finished_output_as_it_is(place: Place) -> None:
    plan = shardmerge.plan(place.config())
    place.merge()
    before = sorted(place.output.rglob("*"))
    with pytest.raises(ResumeError):
        shardmerge.merge(plan)
    assert sorted(place.output.rglob("*")) == before
