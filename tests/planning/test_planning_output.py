"""Where a merge must not write, and what it needs there: place, disk, memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardmerge
from shardmerge.destinations.local.directory import Commit
from shardmerge.errors import PlanError
from shardmerge.spec.tensors import BUFFER_SLACK, LIBRARY_BYTES
from tests.support.builders import Place, make_place, snapshot, write_json, write_pure
from tests.support.refusals import Refusal, refused


def to(path: str) -> Callable[[Place], dict[str, Any]]:
    """The output is this path below the place's folder."""
    return lambda place: place.config(output={"path": str(place.folder / path)})


def made(
    path: str, *, folder: bool = False, output: str = "merged", mode: int = 0o644
) -> Callable[[Place], dict[str, Any]]:
    """There is this file or folder, and the output is there too."""

    def setup(place: Place) -> dict[str, Any]:
        target = place.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            target.mkdir()
        else:
            target.write_text("x")
            target.chmod(mode)
        return to(output)(place)

    return setup


def link(path: str, target: str) -> Callable[[Place], dict[str, Any]]:
    def setup(place: Place) -> dict[str, Any]:
        (place.folder / path).symlink_to(place.folder / target)
        return to(path)(place)

    return setup


def single_file_base(output: str) -> Callable[[Place], dict[str, Any]]:
    def setup(place: Place) -> dict[str, Any]:
        for name in place.base.glob("*.safetensors*"):
            name.unlink()
        make_place(place.folder, shards=1)
        return {**to(output)(place), "base": str(place.base / "model.safetensors")}

    return setup


def adapter_file(output: str) -> Callable[[Place], dict[str, Any]]:
    def setup(place: Place) -> dict[str, Any]:
        path = write_pure(place.adapter / "x.pt")
        return {**to(output)(place), "adapters": [{"path": str(path), "alpha": 8}]}

    return setup


PLACES: dict[str, Refusal] = {
    "the base": Refusal(to("base"), ["is the directory of the base", "never written to"]),
    "the base with dots": Refusal(to("adapter/../base"), ["is the directory of the base"]),
    "a link to the base": Refusal(link("link", "base"), ["is the directory of the base"]),
    "inside the base": Refusal(to("base/merged"), ["is inside the base", "choose a place beside it"]),
    "deep inside the base": Refusal(to("base/a/b/c"), ["is inside the base"]),
    "through a link into the base": Refusal(
        lambda place: link("link", "base")(place) | to("link/merged")(place), ["is inside the base"]
    ),
    "around the base": Refusal(lambda place: place.config(output={"path": str(place.folder)}), ["holds the base"]),
    "the folder of a base that is one file": Refusal(single_file_base("base"), ["is the directory of the base"]),
    "the adapter": Refusal(to("adapter"), ["is the directory of the adapter", "never written to"]),
    "inside the adapter": Refusal(to("adapter/merged"), ["is inside the adapter"]),
    "the folder of an adapter that is one file": Refusal(adapter_file("adapter"), ["is the directory of the adapter"]),
    "a file": Refusal(made("merged"), ["merged is a file; it must be a directory"]),
    "below a file": Refusal(made("file", output="file/merged"), ["file"]),
    "below a file that may be run": Refusal(made("file", output="file/merged", mode=0o755), ["file"]),
    "a link to itself": Refusal(link("loop", "loop"), ["loop"]),
    "a link to nowhere": Refusal(link("dangling", "nowhere"), ["dangling"]),
    "a name that is too long": Refusal(to("x" * 300), ["xxx"]),
    "a name with a zero byte": Refusal(to("a\0b"), ["output.path"]),
    "the home of nobody": Refusal(lambda place: place.config(output={"path": "~no-such-user/x"}), ["~no-such-user"]),
    "not empty": Refusal(made("merged/notes.txt"), ["is not empty (notes.txt", "overwrite=True"]),
    "not empty but for a folder": Refusal(made("merged/sub", folder=True), ["is not empty (sub", "overwrite=True"]),
    "not empty but for a hidden file": Refusal(made("merged/.git"), ["is not empty (.git", "overwrite=True"]),
}


@pytest.mark.parametrize("refusal", PLACES.values(), ids=PLACES)
def test_place(tmp_path: Path, refusal: Refusal) -> None:
    place = make_place(tmp_path)
    refused(tmp_path, refusal.setup(place), refusal)


def test_place_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    refused(tmp_path, place.config(), Refusal(Place.config, [f"{tmp_path} cannot be written to"]))


@pytest.mark.parametrize(
    "setup",
    [
        to("merged"),
        to("a/b/c"),
        made("merged", folder=True),
        link("link", "room"),
        single_file_base("base/merged"),
        adapter_file("adapter/merged"),
        made("merged/.shardmerge", folder=True),
    ],
    ids=["new", "new and deep", "empty", "a link to an empty one", "beside a base of one file", "beside a .pt", "lock"],
)
def test_place_that_is_fine(tmp_path: Path, setup: Callable[[Place], dict[str, Any]]) -> None:
    place = make_place(tmp_path)
    (tmp_path / "room").mkdir()
    config = setup(place)
    before = snapshot(tmp_path)
    assert shardmerge.plan(config).output == config["output"]["path"]
    assert snapshot(tmp_path) == before


def test_relative_output_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shardmerge.plan(place.config(output={"path": "x/y"})).output == str(tmp_path / "x" / "y")
    assert shardmerge.plan(place.config(output={"path": "~/z"})).output == str(tmp_path / "z")


# --- what is there already --------------------------------------------------------------------------------------------


def test_finished_merge_is_replaced_only_on_demand(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    config = place.config()
    shardmerge.merge(config)
    refused(tmp_path, config, Refusal(Place.config, ["already holds a finished merge", "overwrite=True"]))
    assert shardmerge.plan(config, overwrite=True).overwrite
    before = snapshot(place.output)
    other = place.config(adapters=[{"path": str(place.adapter), "weight": 2}])
    shardmerge.merge(other, overwrite=True)
    assert snapshot(place.output) != before
    assert json.loads((place.output / "shardmerge.json").read_text())["config"]["adapters"][0]["weight"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pt", "x.pth", "x.gguf"])
def test_foreign_weights_are_not_replaced_even_on_demand(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    place.output.mkdir()
    (place.output / name).write_text("somebody's work")
    (place.output / "config.json").write_text("{}")
    refused(
        tmp_path, place.config(), Refusal(Place.config, ["weights that shardmerge did not write", name]), overwrite=True
    )


def test_other_files_are_replaced_on_demand(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.output.mkdir()
    for name in ("config.json", "notes.txt"):
        (place.output / name).write_text("old")
    shardmerge.merge(place.config(), overwrite=True)
    assert (place.output / "config.json").read_bytes() == (place.base / "config.json").read_bytes()
    assert (place.output / "notes.txt").read_text() == "old"


@pytest.mark.parametrize("text", ["{", "[]", ""], ids=repr)
def test_broken_record_is_no_finished_merge(tmp_path: Path, text: str) -> None:
    place = make_place(tmp_path)
    place.output.mkdir()
    (place.output / "shardmerge.json").write_text(text)
    refused(tmp_path, place.config(), Refusal(Place.config, ["is not empty (shardmerge.json"]))


def test_unfinished_merge_is_taken_up(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    folder = place.output / ".shardmerge"
    folder.mkdir(parents=True)
    write_json(folder / "journal.json", {"digest": "x"})
    (place.output / "config.json").write_text("{}")
    assert shardmerge.plan(place.config()).output == str(place.output)


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how many bytes are free on every file system."""
    real = os.statvfs

    def set_free(count: int) -> None:
        def statvfs(path: Any) -> os.statvfs_result:
            values = list(real(path))
            values[1], values[4] = 512, count // 512  # f_frsize, f_bavail
            return os.statvfs_result(values)

        monkeypatch.setattr(os, "statvfs", statvfs)

    return set_free


def test_too_little_disk(tmp_path: Path, free: Callable[[int], None]) -> None:
    place = make_place(tmp_path)
    needed = shardmerge.plan(place.config()).bytes_written
    free(8192)
    refused(
        tmp_path,
        place.config(),
        Refusal(
            Place.config,
            ["too little disk", f"writes {needed:,} bytes", "8,192 are free", f"{needed - 8192:,} are missing"],
        ),
    )


def test_just_enough_disk(tmp_path: Path, free: Callable[[int], None]) -> None:
    place = make_place(tmp_path)
    needed = shardmerge.plan(place.config()).bytes_written
    free(needed // 512 * 512)
    with pytest.raises(PlanError, match="too little disk"):
        shardmerge.plan(place.config())
    free((needed // 512 + 1) * 512)
    shardmerge.plan(place.config())


def test_work_of_an_earlier_run_needs_no_second_place(tmp_path: Path, free: Callable[[int], None]) -> None:
    place = make_place(tmp_path)
    needed = shardmerge.plan(place.config()).bytes_written
    stage = place.output / ".shardmerge" / "stage"
    stage.mkdir(parents=True)
    write_json(stage.parent / "journal.json", {})
    (stage / "model-00001-of-00002.safetensors").write_bytes(bytes(needed - 1000))
    free(1024)
    shardmerge.plan(place.config())
    free(512)
    with pytest.raises(PlanError, match="488 are missing"):
        shardmerge.plan(place.config())


def test_what_an_unfinished_merge_has_put_into_place_counts_too(tmp_path: Path, free: Callable[[int], None]) -> None:
    """Killed in its commit, with a disk that is all but full."""
    place = make_place(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Commit, "_copy", lambda self, aux: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shardmerge.merge(place.config())
    assert (place.output / "model-00001-of-00002.safetensors").exists()
    free(4096)
    assert shardmerge.merge(place.config()).shards_reused == 2


def test_an_old_model_in_the_way_is_kept_and_told_of(tmp_path: Path, free: Callable[[int], None]) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    before = snapshot(place.output)
    free(8192)
    with pytest.raises(PlanError, match=r"is kept until the new one is complete.*remove .*merged yourself"):
        shardmerge.merge(place.config(), overwrite=True)
    assert snapshot(place.output) == before


# --- memory -----------------------------------------------------------------------------------------------------------


def test_too_little_memory(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    config = place.config(compute={"max_memory": 1000})
    message = refused(tmp_path, config, Refusal(Place.config, ["compute.max_memory is 1,000 bytes", "needs "]))
    needed = int(message.split("needs ")[1].split()[0].replace(",", ""))
    plan = shardmerge.plan(place.config(compute={"max_memory": needed}))
    assert plan.memory.total == needed
    with pytest.raises(PlanError, match=f"needs {needed:,}"):
        shardmerge.plan(place.config(compute={"max_memory": needed - 1}))


@pytest.mark.parametrize("limit", ["11MB", "13MB", "64MB", "1GB"])
def test_memory_stays_within_its_limit(tmp_path: Path, limit: str) -> None:
    place = make_place(tmp_path)
    plan = shardmerge.plan(place.config(compute={"max_memory": limit}))
    size = int(limit[:-2]) * {"MB": 10**6, "GB": 10**9}[limit[-2:]]
    memory = plan.memory
    assert memory.total <= size
    buffers = memory.buffers * (memory.buffer_bytes + BUFFER_SLACK)
    assert memory.total == buffers + memory.workers * memory.workspace_bytes + memory.factor_bytes + LIBRARY_BYTES
