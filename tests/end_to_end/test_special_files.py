"""FIFOs, sockets, devices and folders where a file is expected: named, not waited for, and not taken for "missing"."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import shardmerge
from shardmerge.config.schema import load_yaml
from shardmerge.config.yaml_text import MAX_CONFIG_BYTES
from shardmerge.errors import ConfigError, ShardmergeError, SourceError
from shardmerge.file_formats.torch_pickle import read_pickled
from shardmerge.inference.hf import check_directory
from shardmerge.reporting.inspection import inspect_path
from shardmerge.reporting.origin import read_origin
from shardmerge.reporting.starter import starter_config
from shardmerge.system.regular_files import NotRegularError, TooLargeError, open_regular, read_small
from tests.support.builders import Place, make_place, run_cli, snapshot, write_peft
from tests.support.crowded import EVERY_FILE, LOOKED_FOR, harmed, instead, listening, make_crowded, no_waiting

KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (instead(os.mkfifo), "is a FIFO; expected a regular file"),
    "socket": (listening, "is a socket; expected a regular file"),
    "folder": (instead(Path.mkdir), "is a directory; expected a regular file"),
    "link to a FIFO": (instead(lambda path: _linked(path, os.mkfifo)), "is a FIFO; expected a regular file"),
    "endless": (instead(lambda path: path.symlink_to("/dev/zero")), ""),
}

SLOW = pytest.mark.slow


def _linked(path: Path, make: Callable[[Path], object]) -> None:
    hidden = path.with_name(f".{path.name}")
    hidden.unlink(missing_ok=True)
    make(hidden)
    path.symlink_to(hidden.name)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_crowded(tmp_path / "place")


@pytest.mark.parametrize("name", EVERY_FILE)
def test_every_file_that_is_read_or_copied(place: Place, name: str) -> None:
    path = place.folder / name
    for kind, (harm, why) in KINDS.items():
        if kind == "folder" and name not in LOOKED_FOR:  # an empty folder of a base, as it may have any
            continue
        with harmed(path, harm):
            before = snapshot(place.folder)
            with no_waiting(), pytest.raises(ShardmergeError) as raised:
                shardmerge.plan(place.config())
            assert str(path) in str(raised.value) and why in str(raised.value), kind
            assert snapshot(place.folder) == before


@pytest.mark.parametrize(
    "name", ["base/added.txt", "base/code/added.py", "adapter/added.txt", "base/adapter_config.json"]
)
def test_what_nobody_looks_for(place: Place, name: str) -> None:
    os.mkfifo(place.folder / name)
    with no_waiting(), pytest.raises(ShardmergeError, match=f"{Path(name).name}: is a FIFO"):
        shardmerge.plan(place.config())


@pytest.mark.parametrize(
    "command", ["run", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plan", "verify"))]
)
def test_on_the_command_line(tmp_path: Path, command: str) -> None:
    """In a process of its own: what waits is killed. `verify` and `compare` read the base of a finished merge."""
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    path = place.base / "config.json"
    path.unlink()
    os.mkfifo(path)
    other = place.config_file(output={"path": str(place.folder / "other")})
    done = run_cli(command, place.output if command == "verify" else other)
    assert f"{path}: is a FIFO; expected a regular file" in done.stdout + done.stderr
    assert done.returncode == (5 if command != "verify" else done.returncode)
    assert not (place.folder / "other").exists()
    with no_waiting(), pytest.raises(SourceError, match="is a FIFO"):  # what `compare` loads the base from
        read_origin(place.output).base_folder()


def test_a_config_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    done = run_cli("run", tmp_path / "config.yaml")
    assert done.returncode == 2
    assert "config.yaml: the config cannot be read: is a FIFO; expected a regular file" in done.stdout + done.stderr


def test_configs_that_have_no_end(tmp_path: Path) -> None:
    with no_waiting(), pytest.raises(ConfigError, match="is a device"):
        load_yaml(Path("/dev/zero"))
    with no_waiting(), pytest.raises(ConfigError, match="is a directory"):
        load_yaml(tmp_path)
    path = tmp_path / "sparse.yaml"
    path.touch()
    os.truncate(path, 1 << 40)
    with no_waiting(), pytest.raises(ConfigError, match=f"over {MAX_CONFIG_BYTES} bytes long"):
        load_yaml(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_inspect_a_base(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    for harm, why in (KINDS["FIFO"], KINDS["folder"]):
        with harmed(place.base / name, harm), no_waiting(), pytest.raises(SourceError, match=f"{name}: {why}"):
            inspect_path(str(place.base))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_inspect_and_init_an_adapter(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    for harm, why in (KINDS["FIFO"], KINDS["folder"]):
        with harmed(place.adapter / name, harm), no_waiting():
            for look in (inspect_path, lambda path: starter_config(path, "config.yaml")):
                with pytest.raises(SourceError, match=f"{name}: {why}"):
                    look(str(place.adapter))


def test_a_config_that_is_not_a_file_is_not_missing(tmp_path: Path) -> None:
    """A base and an adapter may do without; then what they say is not known."""
    place = make_place(tmp_path)
    for path in (place.base / "config.json", place.adapter / "adapter_config.json"):
        for kind in ("FIFO", "folder", "socket"):
            with harmed(path, KINDS[kind][0]), pytest.raises(SourceError, match=f"{path.name}: is a "):
                shardmerge.plan(place.config())


def test_pickled_weights(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_peft(place.adapter, pickled=True)
    (place.adapter / "adapter_model.safetensors").unlink()
    path = place.adapter / "adapter_model.bin"
    for kind in ("FIFO", "socket", "link to a FIFO"):
        with harmed(path, KINDS[kind][0]), no_waiting():
            with pytest.raises(SourceError, match=r"adapter_model\.bin: is a "):
                shardmerge.plan(place.config())
            with pytest.raises(SourceError, match=r"adapter_model\.bin: cannot be read: is a "):
                read_pickled(path, str(path))  # where a FIFO takes the file's place after that


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_what_a_library_will_load(tmp_path: Path, name: str) -> None:
    """`compare` and `chat` give the directory to transformers, which would wait."""
    place = make_place(tmp_path)
    check_directory(place.base)
    for kind in ("FIFO", "socket", "folder"):
        harm = harmed(place.base / name, KINDS[kind][0])
        with harm, no_waiting(), pytest.raises(SourceError, match=f"{name}: is a "):
            check_directory(place.base)


@pytest.mark.parametrize("name", ["base/LICENSE", "base/model-00001-of-00002.safetensors", "adapter/tokenizer.json"])
def test_a_fifo_that_takes_a_file_s_place_after_the_plan(place: Place, name: str) -> None:
    plan = shardmerge.plan(place.config())
    harm = harmed(place.folder / name, KINDS["FIFO"][0])
    with harm, no_waiting(), pytest.raises(SourceError, match=f"{Path(name).name}: is a FIFO"):
        shardmerge.merge(plan)


# --- the reader of small files ----------------------------------------------------------------------------------------


def test_the_reader_of_small_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(TooLargeError):
        read_small(path, 4)
    for harm, why in KINDS.values():
        with harmed(path, harm), no_waiting(), pytest.raises(NotRegularError, match=why or "is a device"):
            read_small(path, 5)
    (tmp_path / "link").symlink_to("x")
    assert read_small(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", follow_link=False)
