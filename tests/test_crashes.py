"""A merge is cut at every step that it takes on the disk; what is left is absent, resumable or complete.

In this process a step raises; in a process of its own (`python -m tests.test_crashes FOLDER`) a step is the last thing
that the process does, so that no handler cleans up.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge
from shardmerge import OutputError, PlanError
from shardmerge.journal import Journal
from tests.peft_oracle import make_config, random, write_adapter, write_base

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("replace", "fsync", "pwrite", "unlink", "rmdir")
TARGETS = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
MARKERS = ("model.safetensors", "model.safetensors.index.json")
Files = dict[str, bytes]


class Cut(BaseException):
    """Raised where a step was to be taken. No handler of errors catches it."""


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the disk itself nothing needs to go: a process that dies takes no written page with it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# --- merges of a small model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """One merge of the small model: which of its two adapters, into how many files."""

    adapter: str
    max_shard_size: int | str = "same"

    def run(self, folder: Path, output: Path, *, overwrite: bool = False) -> shardmerge.MergeReport:
        options = {"max_shard_size": self.max_shard_size}
        config = make_config(output, folder / "base", [folder / self.adapter], **options)
        return shardmerge.merge(config, overwrite=overwrite)


#: Two shards, as the base has them; one file; four shards. B is with the other adapter.
TWO, TWO_B, ONE, ONE_B, FOUR = Merge("x"), Merge("y"), Merge("x", 10**9), Merge("y", 10**9), Merge("y", 1)


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
    "file-over-shards": Scene(FOUR, ONE),
    "shards-over-file": Scene(ONE, FOUR),
}


def build(folder: Path) -> Path:
    """The base with its neighbours, and the adapters x and y."""
    shards = [
        {f"{target}.weight": random(20, 12, seed=number), f"norm.{number}": random(7, seed=number)}
        for number, target in enumerate(TARGETS)
    ]
    base = write_base(folder / "base", shards)
    (base / "tokenizer.json").write_text("{}")
    for seed, name in enumerate("xy"):
        modules = {target: (random(2, 12, seed=seed + 10), random(20, 2, seed=seed + 20)) for target in TARGETS}
        write_adapter(folder / name, modules)
    return folder


def files(output: Path) -> Files:
    """The model in a directory: everything but the record, which holds times, and the work folder."""
    found = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith(".shardmerge/") and name != "shardmerge.json"
    }


class Expected:
    """What each merge gives, made once in directories of its own. The output's path is in none of the files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Merge, Files] = {}

    def __getitem__(self, merge: Merge) -> Files:
        if merge not in self._known:
            output = self._folder / f"expected-{len(self._known)}"
            merge.run(self._folder, output)
            self._known[merge] = files(output)
        return self._known[merge]


def check_cut(output: Path, complete: list[Files], where: str) -> None:
    """What makes a directory a model is there only with all the rest of one model, and with nothing of another."""
    if any((output / marker).exists() for marker in MARKERS):
        assert files(output) in complete, f"{where}: a model that is not complete: {sorted(files(output))}"


def check_taken_up(
    folder: Path, output: Path, merge: Merge, expected: Expected, where: str, *, overwrite: bool
) -> None:
    """The same merge again completes it, or it was complete but for its own work folder."""
    try:
        merge.run(folder, output, overwrite=overwrite)
    except PlanError as error:
        assert "already holds a finished merge" in str(error), where
    else:
        assert not (output / ".shardmerge").exists(), where
    assert files(output) == expected[merge], f"{where}: {sorted(files(output))}"
    assert (output / "shardmerge.json").is_file(), where


# --- steps that fail --------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Counts calls of functions of `os`; the one number ``at`` does ``fail`` instead."""

    names: tuple[str, ...]
    at: int = -1
    fail: Callable[[], None] = lambda: None
    taken: list[str] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[Steps]:
        originals = {name: getattr(os, name) for name in STEPS}
        for name, original in originals.items():
            setattr(os, name, self._wrap(name, original))
        try:
            yield self
        finally:
            for name, original in originals.items():
                setattr(os, name, original)

    def _wrap(self, name: str, original: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            if name in self.names:
                self.taken.append(name)
                if len(self.taken) - 1 == self.at:
                    self.fail()
            return original(*args, **options)

        return step


def count_steps(folder: Path, scene: Scene, names: tuple[str, ...]) -> list[str]:
    output = folder / "counted"
    if scene.before:
        scene.before.run(folder, output)
    with Steps(names).watched() as steps:
        scene.cut.run(folder, output, overwrite=True)
    _remove(output)
    return steps.taken


def _remove(output: Path) -> None:
    for path in sorted(output.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    output.rmdir()


def _raise(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("step", "scene"),
    [
        *((step, scene) for step in ("replace", "fsync", "unlink") for scene in SCENES),
        ("pwrite", "new-shards"),
        ("rmdir", "new-file"),
        ("rmdir", "shards-over-shards"),
        ("rmdir", "file-over-file"),
    ],
)
def test_a_merge_that_is_cut_at_any_step_is_taken_up(step: str, scene: str, tmp_path: Path) -> None:
    _cut_at_every_step(step, SCENES[scene], build(tmp_path))


def _cut_at_every_step(step: str, scene: Scene, folder: Path) -> None:
    expected = Expected(folder)
    complete = [expected[merge] for merge in (scene.before, scene.cut) if merge]
    count = len(count_steps(folder, scene, (step,)))
    assert count >= 2
    for at in range(count):
        output, where = folder / f"out-{at}", f"{step} {at} of {count}"
        if scene.before:
            scene.before.run(folder, output)
        with pytest.raises(Cut), Steps((step,), at, _raise(Cut())).watched():
            scene.cut.run(folder, output, overwrite=True)
        check_cut(output, complete, where)
        check_taken_up(folder, output, scene.cut, expected, where, overwrite=scene.before is not None)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["no-space", "input-output-error"])
@pytest.mark.parametrize("step", ["replace", "fsync", "pwrite"])
def test_a_step_that_the_disk_refuses_is_an_output_error(step: str, code: int, tmp_path: Path) -> None:
    folder = build(tmp_path)
    expected = Expected(folder)
    for at in range(len(count_steps(folder, SCENES["new-shards"], (step,)))):
        output, where = folder / f"out-{at}", f"{step} {at}"
        reason = os.strerror(code)
        fail = _raise(OSError(code, reason))
        with pytest.raises(OutputError, match=reason) as caught, Steps((step,), at, fail).watched():
            TWO.run(folder, output)
        # The file, or the directory that was to hold its name.
        assert str(folder) in str(caught.value), where
        check_cut(output, [expected[TWO]], where)
        assert not list(output.rglob("*.tmp")), where
        check_taken_up(folder, output, TWO, expected, where, overwrite=False)


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path)
    expected = Expected(folder)[TWO]
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:7], offset))
    TWO.run(folder, folder / "out")
    assert files(folder / "out") == expected


# --- another merge takes over -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["new-shards", "file-over-shards", "shards-over-file"])
@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_another_merge_may_take_over_what_was_cut_and_nothing_of_it_stays(
    step: str, scene: str, tmp_path: Path
) -> None:
    folder = build(tmp_path)
    expected = Expected(folder)
    before, cut = SCENES[scene].before, SCENES[scene].cut
    third = ONE_B if scene == "new-shards" else TWO_B
    for at in range(len(count_steps(folder, SCENES[scene], (step,)))):
        output, where = folder / f"out-{at}", f"{step} {at}"
        if before:
            before.run(folder, output)
        with pytest.raises(Cut), Steps((step,), at, _raise(Cut())).watched():
            cut.run(folder, output, overwrite=True)
        third.run(folder, output, overwrite=True)
        assert files(output) == expected[third], f"{where}: {sorted(files(output))}"


@pytest.mark.parametrize("finished", [ONE, TWO], ids=["file", "shards"])
@pytest.mark.parametrize("step", ["replace", "unlink"])
def test_taking_over_what_was_complete_but_for_its_work_folder_can_be_cut_too(
    step: str, finished: Merge, tmp_path: Path
) -> None:
    folder = build(tmp_path)
    expected = Expected(folder)
    complete = [expected[finished], expected[TWO_B]]

    def begin(output: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "finish", lambda self: None)
            finished.run(folder, output)

    begin(folder / "counted")
    with Steps((step,)).watched() as steps:
        TWO_B.run(folder, folder / "counted", overwrite=True)
    for at in range(len(steps.taken)):
        output = folder / f"out-{at}"
        begin(output)
        with pytest.raises(Cut), Steps((step,), at, _raise(Cut())).watched():
            TWO_B.run(folder, output, overwrite=True)
        check_cut(output, complete, f"{step} {at} of {steps.taken}")
        check_taken_up(folder, output, TWO_B, expected, f"{step} {at}", overwrite=True)


# --- a process that dies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["new-file", "shards-over-shards"])
def test_a_process_that_dies_at_any_step_leaves_what_can_be_taken_up(scene: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.test_crashes", scene, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) > 30


def _in_child(act: Callable[[], object]) -> int:
    """Run in a fork, which is safe since this process has no other thread; the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        act()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _drive(scene: Scene, folder: Path) -> int:
    """Let a child die at each step in turn, and another take up what it left. The number of steps."""
    torch.set_num_threads(1)
    os.fsync = lambda fd: None
    build(folder)
    expected = Expected(folder)
    complete = [expected[merge] for merge in (scene.before, scene.cut) if merge]
    taken = count_steps(folder, scene, STEPS)
    for at, step in enumerate(taken):
        output, where = folder / f"out-{at}", f"{step}, {at} of {len(taken)}"
        if scene.before:
            scene.before.run(folder, output)

        def die(output: Path = output, at: int = at) -> None:
            with Steps(STEPS, at, lambda: os._exit(9)).watched():
                scene.cut.run(folder, output, overwrite=True)

        status = _in_child(die)
        assert status == 9, f"{where}: exit status {status}"
        check_cut(output, complete, where)
        check_taken_up(folder, output, scene.cut, expected, where, overwrite=scene.before is not None)
    return len(taken)


if __name__ == "__main__":
    print(_drive(SCENES[sys.argv[1]], Path(sys.argv[2])))
