"""Links in a stranger's base or adapter: none makes us read or copy what is outside of its directory.

Hard links are not tested: nothing tells such a file from another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.errors import ChangedError, PlanError, ShardmergeError, SourceError
from shardmerge.inference.hf import check_directory
from shardmerge.sources.local import LocalSource
from shardmerge.sources.source import open_reader
from tests.support.builders import AUX_FILES, Place, contents, make_place, run_cli, snapshot, write_json
from tests.support.crowded import (
    EVERY_FILE,
    FIRST,
    SECOND,
    SMALL,
    WEIGHTS,
    harmed,
    instead,
    link_in,
    link_out,
    make_crowded,
    no_waiting,
)

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_crowded(tmp_path / "place")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "id_rsa"
    path.write_text(SECRET)
    return path


def refusal(place: Place) -> str:
    """Why no plan is made; nothing is written."""
    before = snapshot(place.folder)
    with no_waiting(), pytest.raises(ShardmergeError) as raised:
        shardmerge.plan(place.config())
    assert snapshot(place.folder) == before
    return str(raised.value)


# --- every file, every link -------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nowhere": (instead(lambda path: path.symlink_to("gone")), "leads nowhere, to gone"),
    "itself": (instead(lambda path: path.symlink_to(path.name)), "leads back to itself"),
    "a circle": (instead(lambda path: path.symlink_to(f"{path.name}/..")), "leads back to itself"),
    "this process": (instead(lambda path: path.symlink_to("/proc/self/environ")), "environ"),
}


@pytest.mark.parametrize("name", EVERY_FILE)
def test_every_file_as_a_link(place: Place, name: str) -> None:
    path = place.folder / name
    for kind, (harm, why) in REFUSED.items():
        with harmed(path, harm):
            if kind != "this process" or name in SMALL:
                message = refusal(place)
                assert path.name in message and why in message, kind
    with harmed(path, link_out), no_waiting():
        if name in WEIGHTS:
            shardmerge.plan(place.config())
        else:
            assert f"{path}: is a link that leads out of its directory, to {path.resolve()}" in refusal(place)
    with harmed(path, link_in), no_waiting():
        shardmerge.plan(place.config())


def test_links_that_stay_inside_and_weights_anywhere_are_merged(tmp_path: Path) -> None:
    plain, linked = make_crowded(tmp_path / "plain"), make_crowded(tmp_path / "linked")
    for name in SMALL:
        link_in(linked.folder / name)
    for name in WEIGHTS:
        link_out(linked.folder / name)
    for place in (plain, linked):
        shardmerge.merge(place.config())
    assert contents(linked.output) == contents(plain.output)
    assert not any(path.is_symlink() for path in linked.output.rglob("*"))
    assert shardmerge.verify(linked.output).raise_for_status().ok


def test_all_are_named_at_once(place: Place, secret: Path) -> None:
    found = ("base/LICENSE", "base/code/ops.py", "adapter/tokenizer_x.json", "adapter/README.md")
    for name in found:
        path = place.folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(place.config())
    assert sorted(problem.partition(": ")[0] for problem in raised.value.problems) == sorted(
        str(place.folder / name) for name in found
    )


def test_on_the_command_line(place: Place, secret: Path) -> None:
    (place.base / "NOTICE.txt").symlink_to(secret)
    done = run_cli("run", place.config_file())
    assert done.returncode == 3, done.stderr
    assert f"{place.base}/NOTICE.txt: is a link that leads out of its directory" in done.stderr
    assert not place.output.exists()


@pytest.mark.parametrize(
    "target",
    ["/proc/self/environ", "/proc/self/fd/0", "/proc/self/cwd/x.toml", "/dev/stdin", "/etc/passwd", "/"],
)
@pytest.mark.parametrize("name", ["base/NOTICE.txt", "base/code/x.txt", "adapter/tokenizer_x.json"])
def test_places_that_every_machine_has(place: Place, name: str, target: str) -> None:
    (place.folder / name).symlink_to(target)
    assert name in refusal(place)


def test_a_link_in_a_folder_on_the_way(place: Place, tmp_path: Path) -> None:
    """What counts is the end: a link that seems to stay inside goes through one that does not."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_text(SECRET)
    (place.base / ".way").symlink_to(tmp_path / "outside")
    (place.base / "NOTICE.txt").symlink_to(".way/x")
    assert "NOTICE.txt: is a link that leads out of its directory" in refusal(place)


def test_a_way_that_leads_out_and_back_in(place: Place, tmp_path: Path) -> None:
    (tmp_path / "back").symlink_to(place.base)
    (place.base / "NOTICE.txt").symlink_to(tmp_path / "back" / "LICENSE")
    shardmerge.merge(place.config())
    assert (place.output / "NOTICE.txt").read_text() == AUX_FILES["LICENSE"]


def test_a_folder_of_nearly_the_same_name_is_another(place: Place) -> None:
    shutil.copytree(place.base, f"{place.base}-private")
    (place.base / "NOTICE.txt").symlink_to("../base-private/LICENSE")
    assert "NOTICE.txt: is a link that leads out of its directory" in refusal(place)


@pytest.mark.parametrize("name", ["../id_rsa", "a/../../id_rsa", "../x.safetensors"])
def test_a_name_that_leads_out_by_itself(tmp_path: Path, name: str) -> None:
    (tmp_path / "base" / "a").mkdir(parents=True)
    for other in ("id_rsa", "x.safetensors"):
        (tmp_path / other).write_text(SECRET)
    source = LocalSource(str(tmp_path / "base"))
    for use in (source.stat, source.fetch, lambda name: source.read(name, 0, 1)):
        for full in (name, str(tmp_path / "id_rsa")):
            with pytest.raises(SourceError, match="is not the name of a file in this directory"):
                use(full)


# --- files that are called weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NOTICE.bin", "NOTICE.pt", "NOTICE.pth", "NOTICE.h5", "NOTICE.npz", "NOTICE.pkl"])
def test_what_is_called_weights_and_copied_stays_inside(place: Place, secret: Path, name: str) -> None:
    (place.base / name).symlink_to(secret)
    message = refusal(place)
    assert name in message and "is a link that leads out of its directory" in message


def test_what_is_called_safetensors_and_is_none_is_not_copied(place: Place, secret: Path) -> None:
    (place.base / "NOTICE.safetensors").symlink_to(secret)
    plan = shardmerge.plan(place.config())
    assert "NOTICE.safetensors" not in {aux.name for aux in plan.aux}
    assert any("not copied: NOTICE.safetensors (cannot be read" in warning for warning in plan.warnings)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_a_folder_that_is_copied_whole(place: Place, secret: Path, name: str) -> None:
    write_json(place.base / "modules.json", [{"path": "1_Dense"}])
    dense = place.base / "1_Dense"
    dense.mkdir()
    (dense / "config.json").write_text("{}")
    (dense / name).symlink_to(secret)
    message = refusal(place)
    assert f"1_Dense/{name}" in message and "leads out of its directory" in message
    (dense / name).unlink()
    save_file({"linear.weight": torch.ones(2, 2)}, place.folder / "dense")
    if name == "model.safetensors":  # known to be weights by its header
        (dense / name).symlink_to(place.folder / "dense")
        shardmerge.merge(place.config())
        assert (place.output / "1_Dense" / name).read_bytes() == (place.folder / "dense").read_bytes()


def test_a_tokenizer_that_is_called_weights(place: Place, secret: Path) -> None:
    (place.adapter / "tokenizer.bin").symlink_to(secret)
    assert "tokenizer.bin" in refusal(place)


def test_weights_that_nobody_uses_may_lead_anywhere(place: Place, secret: Path) -> None:
    (place.base / "pytorch_model.bin").symlink_to(secret)
    (place.base / "consolidated.safetensors").symlink_to("gone")
    (place.adapter / "optimizer.pt").symlink_to(secret)
    shardmerge.merge(place.config())
    assert not any(SECRET.encode() in content for content in contents(place.output).values())


def test_one_file_may_be_a_link(tmp_path: Path) -> None:
    """A person named it. What lies beside it is judged as in any directory."""
    place = make_place(tmp_path / "place", shards=1)
    for path in (place.base / "model.safetensors", place.adapter / "adapter_model.safetensors"):
        link_out(path)
    config = place.config(base=str(place.base / "model.safetensors"))
    config["adapters"] = [str(place.adapter / "adapter_model.safetensors")]
    shardmerge.merge(config)
    (place.adapter / "adapter_config.json").rename(tmp_path / "settings")
    (place.adapter / "adapter_config.json").symlink_to(tmp_path / "settings")
    with pytest.raises(SourceError, match=r"adapter_config.json: is a link that leads out"):
        shardmerge.plan(config | {"output": {"path": str(tmp_path / "out")}})


@pytest.mark.parametrize("name", [f"base/{FIRST}", "adapter/adapter_model-00001-of-00002.safetensors"])
def test_weights_that_are_in_the_output(place: Place, name: str) -> None:
    """They would be replaced while they are read."""
    place.output.mkdir()
    path = place.folder / name
    path.rename(place.output / path.name)
    path.symlink_to(place.output / path.name)
    with pytest.raises(
        PlanError, match=f"holds what 1 files of the {name.partition('/')[0]} are links to, for example"
    ):
        shardmerge.plan(place.config(), overwrite=True)


# --- links to folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "x.jinja").write_text(SECRET)
    return folder


@pytest.mark.parametrize("name", ["base/docs", "base/code/more", "base/config.json.d", "adapter/docs"])
def test_a_folder_outside_is_refused(place: Place, outside: Path, name: str) -> None:
    (place.folder / name).symlink_to(outside)
    assert f"{place.folder / name}/: is a link that leads out of its directory, to {outside}" in refusal(place)


@pytest.mark.parametrize("name", ["base/onnx", "base/runs", "base/onnx/more", "adapter/wandb", "adapter/checkpoint-7"])
def test_folders_that_hold_no_part_of_a_model_are_not_looked_into(place: Place, outside: Path, name: str) -> None:
    (place.folder / name).parent.mkdir(exist_ok=True)
    (place.folder / name).symlink_to(outside)
    assert not any(SECRET in str(aux.content) or "x.jinja" in aux.name for aux in shardmerge.plan(place.config()).aux)


@pytest.mark.parametrize("name", ["base/onnx/x.txt", "base/draft/x.txt", "adapter/checkpoint-7/x.txt"])
def test_files_in_folders_that_are_not_copied(place: Place, secret: Path, name: str) -> None:
    (place.folder / name).parent.mkdir()
    (place.folder / name).symlink_to(secret)
    save_file({"x": torch.ones(1)}, (place.folder / name).parent / "model.safetensors")
    assert not any(aux.name.endswith("x.txt") for aux in shardmerge.plan(place.config()).aux)


def test_a_folder_inside_is_named_and_not_followed(place: Place) -> None:
    (place.base / "latest").symlink_to("code")
    (place.base / "around").symlink_to(".")
    (place.adapter / "latest").symlink_to(".")
    plan = shardmerge.plan(place.config())
    assert [warning for warning in plan.warnings if "latest" in warning] == [
        "links of the base to folders in it are not followed: around/, latest/"
    ]
    assert not any(aux.name.startswith(("latest", "around")) for aux in plan.aux)


@pytest.mark.parametrize("name", ["base/additional_chat_templates", "adapter/additional_chat_templates", "base/1_Pool"])
def test_a_folder_that_is_needed_is_no_link(place: Place, name: str) -> None:
    write_json(place.base / "modules.json", [{"path": "1_Pool"}])
    folder = place.folder / name
    folder.mkdir(exist_ok=True)
    folder.rename(folder.with_name(".elsewhere"))
    folder.symlink_to(".elsewhere")
    assert f"{folder}/: is a link to a folder, which is not followed" in refusal(place)


# --- the Hub's cache --------------------------------------------------------------------------------------------------


def to_cache(folder: Path, entry: Path, revision: str = COMMIT, shared: bool = False) -> Path:
    """A folder as an entry of the Hub's cache: links into ``blobs``, and with ``shared`` from there into the store."""
    snapshot_ = entry / "snapshots" / revision
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_dir():
            continue
        blob, link = entry / "blobs" / f"{number:040x}", snapshot_ / path.relative_to(folder)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        if shared:
            stored = entry.parent / "blobs" / f"{number:02x}" / f"{number:02x}{number:062x}"
            stored.parent.mkdir(parents=True, exist_ok=True)
            path.rename(stored)
            blob.symlink_to(os.path.relpath(stored, blob.parent))
        else:
            path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(folder)
    folder.symlink_to(snapshot_)
    return snapshot_


@pytest.mark.parametrize(
    ("entry", "revision", "shared"),
    [
        ("hub/models--org--name", COMMIT, False),
        ("hub/models--org--name", "main", False),
        ("hub/models--org--name", COMMIT, True),
        ("copied", COMMIT, False),
    ],
)
def test_an_entry_of_the_cache_of_the_hub(tmp_path: Path, entry: str, revision: str, shared: bool) -> None:
    plain, cached = make_crowded(tmp_path / "plain"), make_crowded(tmp_path / "cached")
    to_cache(cached.base, tmp_path / entry, revision, shared)
    to_cache(cached.adapter, tmp_path / "hub" / "models--org--adapter")
    for place in (plain, cached):
        shardmerge.merge(place.config())
    assert contents(cached.output) == contents(plain.output)
    check_directory_of = LocalSource(str(cached.base))
    assert all(check_directory_of.stat(name).size for name in check_directory_of.names())


@pytest.mark.parametrize(
    "target",
    [
        "models--org--other/blobs/x",
        "models--org--name/refs/main",
        "models--org--name/blobs-private/x",
        "blobs/id_rsa",
        "blobs/00/id_rsa",
    ],
)
def test_other_places_of_the_cache_are_outside(place: Place, tmp_path: Path, target: str) -> None:
    snapshot_ = to_cache(place.base, tmp_path / "hub" / "models--org--name", shared=True)
    path = tmp_path / "hub" / target
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SECRET)
    (snapshot_ / "NOTICE.txt").symlink_to(os.path.relpath(path, snapshot_))
    assert "NOTICE.txt: is a link that leads out of its directory" in refusal(place)


def test_a_blob_that_is_a_link_itself(place: Place, tmp_path: Path, secret: Path) -> None:
    """Whoever made the entry made its blobs, too."""
    entry = tmp_path / "hub" / "models--org--name"
    snapshot_ = to_cache(place.base, entry)
    (entry / "blobs" / "x").symlink_to(secret)
    (snapshot_ / "NOTICE.txt").symlink_to("../../blobs/x")
    assert "NOTICE.txt: is a link that leads out of its directory" in refusal(place)


def test_blobs_that_are_a_link(place: Place, tmp_path: Path) -> None:
    entry = tmp_path / "hub" / "models--org--name"
    to_cache(place.base, entry)
    (entry / "blobs").rename(tmp_path / "private")
    (entry / "blobs").symlink_to(tmp_path / "private")
    assert "is a link that leads out of its directory" in refusal(place)


def test_a_folder_of_blobs_beside_any_other_directory_is_outside(place: Place) -> None:
    (place.folder / "blobs").mkdir()
    (place.base / "LICENSE").rename(place.folder / "blobs" / "x")
    (place.base / "LICENSE").symlink_to("../blobs/x")
    assert "LICENSE: is a link that leads out of its directory" in refusal(place)


# --- between plan and merge -------------------------------------------------------------------------------------------


def disguised(secret: Path, path: Path) -> None:
    """Give a secret the size and the time of a file."""
    status = path.stat()
    secret.write_bytes(SECRET.encode().ljust(status.st_size, b"x")[: status.st_size])
    os.utime(secret, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["base/LICENSE", "base/code/ops.py", "base/mtp.safetensors", "adapter/tokenizer.json"])
@pytest.mark.parametrize("swap", ["file for a link", "folder for a link"])
def test_what_the_plan_saw_is_what_is_copied(place: Place, secret: Path, name: str, swap: str) -> None:
    path = place.folder / name
    disguised(secret, path)
    plan = shardmerge.plan(place.config())
    if swap == "file for a link":
        path.unlink()
        path.symlink_to(secret)
    else:
        path.parent.rename(path.parent.with_name("moved"))
        shutil.copytree(path.parent.with_name("moved"), path.parent)
        shutil.copy2(secret, path)
    with no_waiting(), pytest.raises(ChangedError, match="another file has taken its place"):
        shardmerge.merge(plan)
    assert not any(SECRET[:5].encode() in content for content in contents(place.folder / "merged").values())


def test_a_link_that_is_turned_elsewhere_inside_the_directory(place: Place) -> None:
    (place.base / "a").write_text("one")
    (place.base / "b").write_text("two")
    (place.base / "NOTICE").symlink_to("a")
    plan = shardmerge.plan(place.config())
    (place.base / "NOTICE").unlink()
    (place.base / "NOTICE").symlink_to("b")
    with pytest.raises(ChangedError, match="NOTICE"):
        shardmerge.merge(plan)


def test_a_file_that_is_swapped_between_its_two_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader opens a file a second time, for reads past the page cache: it must be the same."""
    from shardmerge.sources import local

    (tmp_path / "x.bin").write_bytes(bytes(8192))
    (tmp_path / "secret").write_bytes(SECRET.encode().ljust(8192))

    times = (tmp_path / "x.bin").stat()
    os.utime(tmp_path / "secret", ns=(times.st_atime_ns, times.st_mtime_ns))

    def swapped(path: str, flags: int) -> int:
        os.replace(tmp_path / "secret", path)
        return os.open(path, flags)

    monkeypatch.setattr(local, "open_direct", swapped)
    reader = open_reader(LocalSource(str(tmp_path)).stat("x.bin"))
    with pytest.raises(ChangedError, match="another file has taken its place"):
        reader.read_block(memoryview(bytearray(8192)), 0, 0, 4096)
    reader.close()


# --- what else loads a directory --------------------------------------------------------------------------------------


def test_compare_and_chat_check_what_a_library_will_load(tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    check_directory(place.base)
    for name in ("config.json", "tokenizer.json", "generation_config.json", FIRST, SECOND):
        for harm, why in [REFUSED["nowhere"], REFUSED["itself"]]:
            with harmed(place.base / name, harm), no_waiting(), pytest.raises(SourceError, match=why):
                check_directory(place.base)
