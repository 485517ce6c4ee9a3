"""What "unchanged" means of a file that a merge reads: size, times of writing and of change, and which file it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import shardmerge
from shardmerge.errors import ChangedError
from shardmerge.sources.local import LocalSource
from shardmerge.sources.source import open_reader
from tests.support.builders import Place, contents, make_place

FILES = (
    "base/model-00001-of-00002.safetensors",
    "base/config.json",
    "base/tokenizer.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path / "place")


def later(path: Path, change: Callable[[Path], object]) -> None:
    """Change a file after the clock of the kernel has gone on: it ticks every few milliseconds."""
    clock = path.with_name(".clock")
    before = path.stat().st_ctime_ns
    clock.touch()
    while clock.stat().st_ctime_ns <= before:
        time.sleep(0.001)
        clock.touch()
    change(path)
    clock.unlink()


def rewrite(path: Path) -> None:
    """Another last byte, and the time of writing put back."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns


CHANGES: dict[str, Callable[[Path], object]] = {
    "written, the time put back": rewrite,
    "mode": lambda path: path.chmod(0o600),
    "another hard link": lambda path: os.link(path, path.with_name(".link")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FILES)
def test_between_plan_and_merge(place: Place, name: str, change: str) -> None:
    plan = shardmerge.plan(place.config())
    later(place.folder / name, CHANGES[change])
    with pytest.raises(ChangedError, match=f"{Path(name).name}: .*ctime changed"):
        shardmerge.merge(plan)
    assert not (place.output / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_while_it_is_read(place: Place, change: str) -> None:
    path = place.folder / FILES[0]
    reader = open_reader(LocalSource(str(path.parent)).stat(path.name))
    reader.check()
    later(path, CHANGES[change])
    with pytest.raises(ChangedError, match=r"changed while it was being read .*ctime changed"):
        reader.check()
    reader.close()


def test_in_the_middle_of_a_merge(place: Place) -> None:
    """The last byte of a shard, changed when its first tensors are merged already."""
    path = place.base / "model-00002-of-00002.safetensors"
    done = False

    def change(progress: shardmerge.Progress) -> None:
        nonlocal done
        if progress.shard == path.name and not done:
            later(path, rewrite)
            done = True

    with pytest.raises(ChangedError, match=r"(?s)ctime changed.*start anew with overwrite=True"):
        shardmerge.merge(place.config(), progress=change)
    assert done and not (place.output / "model.safetensors.index.json").exists()


def test_a_change_of_mode_is_no_other_merge(place: Place) -> None:
    """It stops a merge, since nobody can say what it was; the same command takes up what was finished."""
    path = place.base / "model-00002-of-00002.safetensors"
    plan = shardmerge.plan(place.config())
    later(path, CHANGES["mode"])
    with pytest.raises(ChangedError):
        shardmerge.merge(plan)
    assert shardmerge.merge(place.config()).shards_reused == 1


def test_what_a_merge_does_itself_changes_nothing(place: Place) -> None:
    """Files are read, their bytes perhaps shared; two merges of one plan are the same."""
    plan = shardmerge.plan(place.config())
    before = {path: path.stat() for folder in (place.base, place.adapter) for path in folder.iterdir()}
    shardmerge.merge(plan)
    shardmerge.verify(place.output).raise_for_status()
    for path, status in before.items():
        assert path.stat().st_ctime_ns == status.st_ctime_ns
    first = contents(place.output)
    place.output.rename(place.folder / "first")
    shardmerge.merge(plan)
    assert contents(place.output) == first
