"""A merge is cut at every step that it takes on the disk; what is left is absent, resumable or complete.

A step raises in this process; it is the last thing that a process of its own does (`python -m
tests.end_to_end.test_crashes
FOLDER steps SCENE…`), so that no handler cleans up; or it is the last one before a power failure, which takes with it
what was not made durable. After each, three things hold: there is the whole of one model or nothing that transformers
or a reader of GGUF would take for one; the same command takes up what is left; and its result is that of an undisturbed
run, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from gguf import GGUFReader

import shardmerge
from shardmerge import OutputError, PlanError, ResumeError, SourceError
from shardmerge.destinations.local import checks
from shardmerge.destinations.local.directory import LocalDirectory
from shardmerge.destinations.local.journal import Journal
from shardmerge.destinations.record import is_unfinished
from shardmerge.system import durable
from tests.support.builders import (
    DOWN1,
    GATE0,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    Q0,
    ROOT,
    V0,
    VOCAB,
    llama_tensors,
    model_config,
    peft_tensors,
    slow_but,
    write_json,
    write_peft,
    write_shards,
)
from tests.support.faults import (
    WRITES,
    Cut,
    PowerFailure,
    Steps,
    Tree,
    cut,
    die,
    few_bytes,
    in_child,
    key_of,
    read_tree,
    refuse,
    write_tree,
)
from tests.support.peft_oracle import make_config

#: What makes a directory a model, by how it is called. A GGUF file is one whatever lies beside it.
MARKERS = ("model.safetensors", "model.safetensors.index.json", ".gguf")
RECORD = "shardmerge.json"
WORK = ".shardmerge"


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the disk itself nothing needs to go: a process that dies takes no written page with it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- merges of a small model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """One merge of the small model: which of its two adapters, into how many files or into what kind of GGUF file."""

    adapter: str
    max_shard_size: int | str = "same"
    quantization: str | None = None

    def run(self, folder: Path, output: Path, *, overwrite: bool = False) -> shardmerge.MergeReport:
        options = {"max_shard_size": self.max_shard_size}
        config = make_config(output, folder / "base", [folder / self.adapter], **options)
        if self.quantization:
            config["output"] |= {"format": "gguf", "quantization": self.quantization}
        return shardmerge.merge(config, overwrite=overwrite)

    @property
    def weights(self) -> dict[str, int]:
        """How many files of weights it makes, by their suffix."""
        if self.quantization:
            return {".gguf": 1}
        return {".safetensors": {"same": 2, 30_000: 3, 10**9: 1}[self.max_shard_size]}


#: Two shards, as the base has them; one file; three shards. B is with the other adapter.
TWO, TWO_B, ONE, ONE_B, THREE = Merge("x"), Merge("y"), Merge("x", 10**9), Merge("y", 10**9), Merge("y", 30_000)
#: Two files of one name, and one of another.
GGUF, GGUF_B = Merge("x", quantization="q8_0"), Merge("y", quantization="q8_0")
GGUF_F16 = Merge("x", quantization="f16")


@dataclass(frozen=True)
class Scene:
    """What was merged into the output before, and what is merged into it when it is cut."""

    before: Merge | None
    cut: Merge


SCENES = {
    "new-shards": Scene(None, TWO),
    "new-file": Scene(None, ONE),
    "shards-over-shards": Scene(TWO, TWO_B),
    "file-over-file": Scene(ONE, ONE_B),
    "file-over-shards": Scene(THREE, ONE),
    "shards-over-file": Scene(ONE, THREE),
    "new-gguf": Scene(None, GGUF),
    "gguf-over-gguf": Scene(GGUF, GGUF_B),
    "gguf-over-other-gguf": Scene(GGUF_F16, GGUF),
    "gguf-over-shards": Scene(TWO, GGUF_B),
    "gguf-over-file": Scene(ONE, GGUF),
    "shards-over-gguf": Scene(GGUF, TWO_B),
    "file-over-gguf": Scene(GGUF_B, ONE),
}
MERGES = {merge: None for scene in SCENES.values() for merge in (scene.before, scene.cut) if merge}


def some(*quick: str) -> list[Any]:
    """All scenes, of which those that are not named are slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in SCENES]


def build(folder: Path) -> Path:
    """A base that transformers loads and that can be written as GGUF, with its neighbours; the adapters x and y."""
    base = folder / "base"
    write_shards(base, llama_tensors(), 2)
    sizes = {"intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HIDDEN // 8, "num_key_value_heads": HIDDEN // 16, "head_dim": 8}
    config = model_config(**sizes, **heads)
    write_json(base / "config.json", config)
    vocabulary = {f"<{token}>": token for token in range(VOCAB)}
    tokenizer = {"model": {"type": "BPE", "byte_fallback": True, "vocab": vocabulary}, "decoder": {"type": "Sequence"}}
    write_json(base / "tokenizer.json", tokenizer)
    write_peft(folder / "x", peft_tensors((Q0, GATE0, DOWN1)))
    write_peft(folder / "y", peft_tensors((V0, Q0, DOWN1)))
    return folder


def model_of(tree: Tree) -> Tree:
    """The model in a directory: everything but the record, which holds times, and the work folder."""
    return {name: data for name, data in tree.items() if name not in (RECORD, WORK) and not name.startswith(f"{WORK}/")}


@cache
def _transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _is_loaded(output: Path) -> bool:
    """Whether somebody makes a model of a directory. transformers makes up weights that it does not find."""
    try:
        if files := [*output.glob("*.gguf")]:
            return all(GGUFReader(file).tensors for file in files)
        if any(output.glob("*.json")):  # or transformers would look on the Hub
            _transformers().AutoModelForCausalLM.from_pretrained(output)
            return True
    except Exception:
        return False
    return False


class Stand:
    """The merges, what they give undisturbed, and what was found out about trees so far: most are left many times."""

    def __init__(self, folder: Path, disks: Path) -> None:
        self.folder = folder
        self._disks = disks
        self._numbers = itertools.count()
        self._expected: dict[Merge, Tree] = {}
        self._loads: dict[str, bool] = {}
        self._checked: set[tuple[str, Scene]] = set()

    def new(self) -> Path:
        """Where nothing is yet. Outputs are in none of the files that a merge makes."""
        return self._disks / str(next(self._numbers)) / "out"

    def finished(self, merge: Merge) -> Tree:
        """The whole output of an undisturbed run."""
        if merge not in self._expected:
            output = self.new()
            merge.run(self.folder, output)
            self._expected[merge] = read_tree(output)
        return self._expected[merge]

    def begin(self, scene: Scene) -> Path:
        """An output with what was there before."""
        output = self.new()
        output.parent.mkdir(parents=True)
        if scene.before:
            write_tree(output, self.finished(scene.before))
        return output

    def run(self, scene: Scene, output: Path) -> None:
        scene.cut.run(self.folder, output, overwrite=scene.before is not None)

    def loads(self, output: Path) -> bool:
        """`_is_loaded`, once for all directories that hold the same."""
        key = key_of(model_of(read_tree(output)))
        if key not in self._loads:
            self._loads[key] = _is_loaded(output)
        return self._loads[key]

    def check(self, output: Path, scene: Scene, where: str) -> None:
        """The three conditions."""
        tree = read_tree(output) if output.exists() else {}
        if (key_of(tree), scene) in self._checked:
            return
        complete = [model_of(self.finished(merge)) for merge in (scene.before, scene.cut) if merge]
        model = model_of(tree)
        if any(name.endswith(MARKERS) for name in model) or self.loads(output):
            whole = {name: data for name, data in model.items() if not name.endswith(".tmp")}  # nobody reads those
            assert whole in complete, f"{where}: a model that is not complete: {sorted(model)}"
            _check_record(tree, whole, where)
        self.check_taken_up(output, scene, where)
        self._checked.add((key_of(tree), scene))

    def check_taken_up(self, output: Path, scene: Scene, where: str) -> None:
        """The same merge again completes it, or it was complete but for its own work folder."""
        try:
            self.run(scene, output)
        except PlanError as error:
            assert "already holds a finished merge" in str(error), f"{where}: {error}"
        else:
            assert not (output / WORK).exists(), where
        found = read_tree(output)
        assert model_of(found) == model_of(self.finished(scene.cut)), f"{where}: {sorted(found)}"
        assert RECORD in found, where

    def steps(self, scene: Scene, names: tuple[str, ...]) -> list[str]:
        output = self.begin(scene)
        with Steps(names).watched() as steps:
            self.run(scene, output)
        return steps.taken


def _check_record(tree: Tree, model: Tree, where: str) -> None:
    """The record beside a model is of that model."""
    record = json.loads(tree.get(RECORD) or "{}")
    assert {*record["files"]} == {RECORD, *model}, where
    for name, shard in record["shards"].items():
        assert shard["xxh3_128"] == xxhash.xxh3_128_hexdigest(model[name] or b""), f"{where}: {name}"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("crashes")
    yield Stand(build(folder), folder / "disks")
    shutil.rmtree(folder)


def test_what_an_undisturbed_run_gives_is_loaded(stand: Stand) -> None:
    for merge in MERGES:
        output = stand.new()
        write_tree(output, stand.finished(merge))
        assert stand.loads(output), merge
        assert {kind: len([*output.glob(f"*{kind}")]) for kind in merge.weights} == merge.weights
        _check_record(read_tree(output), model_of(read_tree(output)), str(merge))


def test_half_a_gguf_file_is_not_loaded(stand: Stand) -> None:
    (name,) = (name for name in stand.finished(GGUF) if name.endswith(".gguf"))
    data = stand.finished(GGUF)[name] or b""
    for part in (b"", data[:100], data[: len(data) // 2], bytes(len(data))):
        output = stand.new()
        write_tree(output, {name: part})
        assert not stand.loads(output), len(part)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", [name for name, scene in SCENES.items() if scene.before])
def test_a_finished_model_is_replaced_only_if_that_was_said(scene: str, stand: Stand) -> None:
    output = stand.begin(SCENES[scene])
    before = read_tree(output)
    with pytest.raises(PlanError, match="already holds a finished merge"):
        SCENES[scene].cut.run(stand.folder, output)
    assert read_tree(output) == before


@pytest.mark.parametrize(("scene", "other"), [("new-gguf", ONE), ("new-file", GGUF), ("gguf-over-gguf", GGUF_F16)])
def test_an_unfinished_merge_is_not_taken_up_as_another_format(scene: str, other: Merge, stand: Stand) -> None:
    refused = 0
    for at, step in enumerate(stand.steps(SCENES[scene], ("replace", "unlink"))):
        output = stand.begin(SCENES[scene])
        with pytest.raises(Cut), Steps(("replace", "unlink"), at, cut).watched():
            stand.run(SCENES[scene], output)
        if is_unfinished(output):
            before = key_of(read_tree(output))
            with pytest.raises(ResumeError, match=r"output\.(format|quantization) was"):
                other.run(stand.folder, output)
            assert key_of(read_tree(output)) == before, f"{step} {at}"
            refused += 1
    assert refused > 5


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("tokenizer.json", "<63>", "<xy>"), ("config.json", '"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06')],
)
def test_a_gguf_file_is_not_taken_up_once_it_would_be_made_of_something_else(
    name: str, old: str, new: str, tmp_path: Path
) -> None:
    """Of the same size, so that nothing else tells."""
    file, output = build(tmp_path) / "base" / name, tmp_path / "out"
    settings = {**json.loads((tmp_path / "base" / "config.json").read_text()), "rms_norm_eps": 1e-5}
    write_json(tmp_path / "base" / "config.json", settings)
    with pytest.raises(Cut), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "begin_commit", lambda self, files: cut())
        GGUF.run(tmp_path, output)
    before, text = key_of(read_tree(output)), file.read_text()
    file.write_text(text.replace(old, new))
    with pytest.raises(ResumeError, match=re.escape(name)):
        GGUF.run(tmp_path, output)
    assert key_of(read_tree(output)) == before
    file.write_text(text)
    assert GGUF.run(tmp_path, output).shards_reused == 1


# --- steps that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", some("shards-over-shards"))
def test_a_merge_that_is_cut_at_any_step_is_taken_up(scene: str, stand: Stand) -> None:
    taken = stand.steps(SCENES[scene], WRITES)
    assert set(taken) >= {"open", "write", "pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir"}
    for at, step in enumerate(taken):
        output = stand.begin(SCENES[scene])
        with contextlib.suppress(Cut), Steps(WRITES, at, cut).watched() as steps:
            stand.run(SCENES[scene], output)
        assert len(steps.taken) > at
        stand.check(output, SCENES[scene], f"{step}, {at} of {len(taken)}")


#: A step that may be refused: a directory that filelock makes though it is there.
_DISPENSABLE = ("mkdir",)


@pytest.mark.parametrize("code", slow_but([errno.EIO, errno.ENOSPC, errno.EDQUOT]), ids=errno.errorcode.get)
@pytest.mark.parametrize("scene", some("new-shards"))
def test_a_step_that_the_disk_refuses_is_an_output_error(scene: str, code: int, stand: Stand) -> None:
    taken = stand.steps(SCENES[scene], WRITES)
    for at, step in enumerate(taken):
        output, where = stand.begin(SCENES[scene]), f"{step}, {at} of {len(taken)}"
        try:
            with Steps(WRITES, at, refuse(code)).watched():
                stand.run(SCENES[scene], output)
            assert step in _DISPENSABLE, where
        except OutputError as error:
            # The file, or the directory that was to hold its name; and why.
            assert str(output.parent) in str(error) and os.strerror(code) in str(error), where
        assert not list(output.rglob("*.tmp")), where
        stand.check(output, SCENES[scene], where)


@pytest.mark.parametrize(
    "scene", slow_but(["new-shards", "shards-over-shards", "gguf-over-shards"], "shards-over-shards")
)
def test_a_disk_that_refuses_everything_from_some_step_on(scene: str, stand: Stand) -> None:
    """As one does that was turned read-only, or came off: not even tidying up succeeds."""
    taken = stand.steps(SCENES[scene], WRITES)
    for at in range(0, len(taken), 3):
        output = stand.begin(SCENES[scene])
        with pytest.raises(OutputError), Steps(WRITES, at, refuse(errno.EROFS), times=10**9).watched():
            stand.run(SCENES[scene], output)
        stand.check(output, SCENES[scene], f"from {taken[at]} on, {at} of {len(taken)}")


@pytest.mark.parametrize("scene", ["new-shards", "new-gguf"])
def test_a_source_that_cannot_be_read_from_some_read_on_is_a_source_error(scene: str, stand: Stand) -> None:
    taken = stand.steps(SCENES[scene], ("preadv",))
    for at in range(len(taken)):
        output = stand.begin(SCENES[scene])
        refused = pytest.raises((SourceError, PlanError))
        with refused as caught, Steps(("preadv",), at, refuse(errno.EIO), times=10**9).watched():
            stand.run(SCENES[scene], output)
        # What could not be read, why, and in what state the output is. A plan lists all files that it could not read.
        error = caught.value
        assert all(re.search(r"(base|x)/.*: cannot be read: Input/output error", text) for text in error.problems)
        if isinstance(error, PlanError):
            assert len(error.problems) > 1 and "nothing was written" in str(error)
        else:
            assert re.search(r"Input/output error\. \w+", str(error)) and error.exit_code == 5
        stand.check(output, SCENES[scene], f"read {at} of {len(taken)}")


@pytest.mark.parametrize("most", [7, 5000], ids="up-to-{}".format)
@pytest.mark.parametrize("scene", ["new-shards", "new-gguf"])
def test_a_system_that_reads_and_writes_a_few_bytes_at_a_time(scene: str, most: int, stand: Stand) -> None:
    chance = random.Random(most)
    output = stand.begin(SCENES[scene])
    with few_bytes(lambda: chance.randint(1, most)):
        stand.run(SCENES[scene], output)
    assert model_of(read_tree(output)) == model_of(stand.finished(SCENES[scene].cut))


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system in memory, whose size `remount` sets."""
    disk = tmp_path / "small"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(disk)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a file system of its own may not be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, pages: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(disk)], check=True)


@pytest.mark.parametrize(
    "scene",
    slow_but(["new-shards", "shards-over-shards", "gguf-over-shards", "shards-over-gguf"], "shards-over-shards"),
)
def test_a_disk_of_any_size(scene: str, small_disk: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real file system says that it is full, wherever in the merge that is; with more space the merge goes on."""
    monkeypatch.setattr(checks, "check_space", lambda output, needed: [])
    of, output, full = SCENES[scene], small_disk / "out", 0
    for pages in range(1, 200):
        shutil.rmtree(output, ignore_errors=True)
        remount(small_disk, 10_000)
        if of.before:
            write_tree(output, stand.finished(of.before))
        used = sum(entry.stat().st_blocks for entry in small_disk.rglob("*")) // 8
        remount(small_disk, used + pages)
        try:
            stand.run(of, output)
            break
        except OutputError as error:
            full += 1
            assert "No space left on device" in str(error) and str(output) in str(error)
        remount(small_disk, 10_000)
        stand.check(output, of, f"{pages} pages")
    assert full >= 10
    assert model_of(read_tree(output)) == model_of(stand.finished(of.cut))


# --- another merge takes over -----------------------------------------------------------------------------------------


#: Who takes over, by what was cut.
THIRD = {
    "new-shards": ONE_B,
    "file-over-shards": TWO_B,
    "shards-over-file": TWO_B,
    "gguf-over-shards": GGUF_F16,
    "gguf-over-gguf": TWO_B,
    "shards-over-gguf": GGUF_B,
}


@pytest.mark.parametrize("scene", slow_but(THIRD, "gguf-over-shards"))
def test_another_merge_may_take_over_what_was_cut_and_nothing_of_it_stays(scene: str, stand: Stand) -> None:
    third = THIRD[scene]
    steps, seen = ("replace", "unlink"), set()
    for at, step in enumerate(stand.steps(SCENES[scene], steps)):
        output = stand.begin(SCENES[scene])
        with pytest.raises(Cut), Steps(steps, at, cut).watched():
            stand.run(SCENES[scene], output)
        if (key := key_of(read_tree(output))) in seen:
            continue
        seen.add(key)
        third.run(stand.folder, output, overwrite=True)
        assert model_of(read_tree(output)) == model_of(stand.finished(third)), f"{step} {at}"


@pytest.mark.parametrize(
    ("finished", "taking"),
    [
        pytest.param(ONE, TWO_B, id="file", marks=pytest.mark.slow),
        pytest.param(TWO, TWO_B, id="shards"),
        pytest.param(GGUF, GGUF_B, id="gguf", marks=pytest.mark.slow),
        pytest.param(GGUF, TWO_B, id="gguf-by-shards", marks=pytest.mark.slow),
        pytest.param(TWO, GGUF, id="shards-by-gguf", marks=pytest.mark.slow),
    ],
)
def test_taking_over_what_was_complete_but_for_its_work_folder_can_be_cut_too(
    finished: Merge, taking: Merge, stand: Stand
) -> None:
    steps, scene = ("replace", "unlink"), Scene(finished, taking)
    whole = stand.new()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalDirectory, "_clean_up", lambda self: None)
        finished.run(stand.folder, whole)
    tree = read_tree(whole)

    def begin() -> Path:
        output = stand.new()
        write_tree(output, tree)
        return output

    with Steps(steps).watched() as taken:
        stand.run(scene, begin())
    for at, step in enumerate(taken.taken):
        output = begin()
        with pytest.raises(Cut), Steps(steps, at, cut).watched():
            stand.run(scene, output)
        stand.check(output, scene, f"{step}, {at} of {len(taken.taken)}")


# --- a process that dies ----------------------------------------------------------------------------------------------


def _killed(how: str, names: list[str], stand: Stand) -> None:
    """Have a process of its own let children of it be killed, and look at what is left."""
    command = [sys.executable, "-m", "tests.end_to_end.test_crashes", str(stand.folder), how, *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) >= (20 if how == "thirds" else 50) * len(names)
    for line in lines:
        name, output, where = line.split(" ", 2)
        stand.check(Path(output), SCENES[name], where)


def test_a_process_that_is_killed_at_any_step_leaves_what_can_be_taken_up(stand: Stand) -> None:
    _killed("thirds", ["new-file"], stand)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_step_in_all_scenes(stand: Stand) -> None:
    _killed("steps", [*SCENES], stand)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment(stand: Stand) -> None:
    _killed("moments", ["shards-over-shards", "new-gguf", "gguf-over-shards", "shards-over-gguf"], stand)


def _at_steps(scene: Scene, stand: Stand, every: int = 1) -> Iterator[tuple[Path, str]]:
    taken = stand.steps(scene, WRITES)
    for at in range(0, len(taken), every):
        step, output = taken[at], stand.begin(scene)

        def merge(output: Path = output, at: int = at) -> None:
            with Steps(WRITES, at, die).watched():
                stand.run(scene, output)

        status = in_child(merge)
        assert status == -9, f"{step}, {at}: exit status {status}"
        yield output, f"killed at {step}, {at} of {len(taken)}"


def _at_moments(scene: Scene, stand: Stand) -> Iterator[tuple[Path, str]]:
    """Within the time that a whole merge takes here and now; one that is faster is not counted."""
    chance, killed = random.Random(50), 0
    output, began = stand.begin(scene), time.monotonic()
    stand.run(scene, output)
    took = time.monotonic() - began
    while killed < 50:
        output, moment = stand.begin(scene), chance.uniform(0, took)
        if in_child(partial(stand.run, scene, output), moment) == -9:
            killed += 1
            yield output, f"killed after {moment:.4f} s of {took:.4f}"


def _drive(folder: Path, how: str, names: list[str]) -> None:
    """Let a child be killed at each step, each third step or random moments of each scene. A line for each: scene,
    output, where.
    """
    torch.set_num_threads(1)
    os.fsync = lambda fd: None
    stand = Stand(folder, folder / f"disks-{os.getpid()}")
    kinds: dict[str, Callable[[Scene, Stand], Iterator[tuple[Path, str]]]]
    kinds = {"steps": _at_steps, "thirds": partial(_at_steps, every=3), "moments": _at_moments}
    for name in names:
        for output, where in kinds[how](SCENES[name], stand):
            print(name, output, where)


# --- a power failure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", some("shards-over-shards"))
def test_a_power_failure_after_any_step_leaves_what_can_be_taken_up(scene: str, stand: Stand) -> None:
    output = stand.begin(SCENES[scene])
    failure = PowerFailure(output.parent)
    with failure.watching():
        stand.run(SCENES[scene], output)
    assert failure.steps > 50
    _check_left(failure, SCENES[scene], stand)


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["new-file", "shards-over-shards", "gguf-over-gguf"])
def test_a_power_failure_after_any_step_of_a_run_that_takes_up_a_killed_one(scene: str, stand: Stand) -> None:
    """What the killed one did is on the disk in part only; the system does not tell, until there is no power."""
    # Killed just before something is made durable.
    cuts = [at for at, step in enumerate(stand.steps(SCENES[scene], WRITES)) if step == "fsync"]
    for at in cuts:
        output = stand.begin(SCENES[scene])
        failure = PowerFailure(output.parent)
        with failure.watching():
            failure.armed = False
            with contextlib.suppress(Cut), Steps(WRITES, at, cut).watched():
                stand.run(SCENES[scene], output)
            failure.armed = True
            with contextlib.suppress(PlanError):
                stand.run(SCENES[scene], output)
        _check_left(failure, SCENES[scene], stand)


def _check_left(failure: PowerFailure, scene: Scene, stand: Stand) -> None:
    for where, tree in failure.left.values():
        disk = stand.new().parent
        write_tree(disk, tree)
        stand.check(disk / "out", scene, where)
        shutil.rmtree(disk)


def test_the_model_of_a_power_failure_finds_what_is_not_durable(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that forgets an fsync is found out."""
    monkeypatch.setattr(durable, "fsync_directory", lambda path: None)
    output = stand.begin(SCENES["shards-over-shards"])
    failure = PowerFailure(output.parent)
    with failure.watching():
        stand.run(SCENES["shards-over-shards"], output)
    with pytest.raises(AssertionError):
        _check_left(failure, SCENES["shards-over-shards"], stand)


if __name__ == "__main__":
    _drive(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
