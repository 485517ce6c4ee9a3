"""What every source and every reader promises (`sources.source`). A new one is a row in ``PLACES``."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from shardmerge.api.library import merge
from shardmerge.errors import ChangedError, MissingError, SourceError
from shardmerge.sources import hub
from shardmerge.sources.inline import inline_file
from shardmerge.sources.source import (
    SCHEMES,
    Reader,
    Source,
    is_pinned,
    open_reader,
    open_source,
    read_file,
)
from shardmerge.spec.tensors import PAGE, SourceFile
from tests.support import memory_source
from tests.support.builders import contents, make_place
from tests.support.hub_stub import running_hub

SHARD = "model.safetensors"
FILES = {
    "config.json": b'{"v": 1}',
    SHARD: bytes(range(256)) * 100,
    "folder/tokenizer.json": b"{}",
    "folder/empty.txt": b"",
    ".hidden": b"x",
    ".git/config": b"x",
}
NAMES = ["config.json", "folder/empty.txt", "folder/tokenizer.json", SHARD]


@dataclass
class Case:
    """A source that holds ``FILES``; ``change`` gives a file other bytes of the same length, in its place."""

    source: Source
    change: Callable[[str, bytes], None]


def write(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def local(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    write(folder / "files")
    yield Case(open_source(str(folder / "files")), lambda name, data: _overwrite(folder / "files" / name, data))


def _overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@contextmanager
def on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    write(folder / "files")
    with running_hub() as stub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(hub._API, "endpoint", stub.endpoint)
        stub.commit("org/model", folder / "files")

        def change(name: str, content: bytes) -> None:
            _overwrite(folder / "files" / name, content)
            stub.commit("org/model", folder / "files")

        yield Case(open_source("org/model"), change)


@contextmanager
def in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setitem(SCHEMES, memory_source.SCHEME, memory_source.__name__)
    location = memory_source.put_folder("memory:files", write(folder / "files"))
    yield Case(open_source(location), lambda name, content: memory_source.put(location, name, content))


PLACES = {"local": local, "hub": on_the_hub, "memory": in_memory}


@pytest.fixture(params=list(PLACES.values()), ids=list(PLACES))
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    with request.param(tmp_path, monkeypatch) as found:
        yield found


# --- sources ----------------------------------------------------------------------------------------------------------


def test_names_are_sorted_and_relative_and_none_is_hidden(case: Case) -> None:
    assert case.source.names() == NAMES


def test_files_are_read_in_ranges(case: Case) -> None:
    data = FILES[SHARD]
    for offset, size in ((0, 8), (300, 5), (0, len(data)), (len(data) - 3, 99), (len(data), 5), (7, 0)):
        assert case.source.read(SHARD, offset, size) == data[offset : offset + size]
    assert case.source.read("folder/empty.txt", 0, 5) == b""


def test_a_file_is_read_whole_up_to_a_limit(case: Case) -> None:
    file = case.source.stat("config.json")
    assert read_file(file, 8) == FILES["config.json"]
    with pytest.raises(SourceError, match=r"config\.json: is over 7 bytes"):
        read_file(file, 7)


def test_fetch_gives_a_file_of_this_machine(case: Case) -> None:
    for name in NAMES:
        assert case.source.fetch(name).read_bytes() == FILES[name]


@pytest.mark.parametrize("name", ["nothere.json", "../files/config.json", "/etc/hostname", "folder/../../x", ""])
@pytest.mark.parametrize("how", ["stat", "read", "fetch"])
def test_what_is_not_there_or_is_outside_is_refused(case: Case, name: str, how: str) -> None:
    use = {"stat": case.source.stat, "read": lambda name: case.source.read(name, 0, 1), "fetch": case.source.fetch}
    with pytest.raises(SourceError):
        use[how](name)


def test_a_directory_is_its_own_directory(case: Case) -> None:
    assert case.source.directory() is case.source
    assert not any(case.source.leads_out(name) for name in case.source.names())
    assert case.source.local_path is None or case.source.local_path.is_dir()


def test_the_version_is_the_same_until_the_file_changes(case: Case) -> None:
    before = case.source.stat(SHARD)
    assert before.size == len(FILES[SHARD]) and case.source.stat(SHARD) == before
    case.change(SHARD, FILES[SHARD][::-1])
    if is_pinned(before):
        assert case.source.revision is not None and case.source.revision in before.uri
        assert case.source.stat(SHARD) == before
        assert read_file(before, before.size) == FILES[SHARD]
    else:
        assert case.source.stat(SHARD) != before
        with pytest.raises(ChangedError, match="changed since the plan was made"):
            open_reader(before)


def test_a_plan_carries_files_as_data(case: Case) -> None:
    file = pickle.loads(pickle.dumps(case.source.stat(SHARD)))
    assert read_file(file, file.size) == FILES[SHARD]


# --- readers ----------------------------------------------------------------------------------------------------------


@dataclass
class Opened:
    file: SourceFile
    reader: Reader


@pytest.fixture(params=[*PLACES, "inline"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """A reader of ``FILES[SHARD]``."""
    if request.param == "inline":
        file = inline_file(FILES[SHARD])
        with open_reader(file) as reader:
            yield Opened(file, reader)
        return
    with PLACES[request.param](tmp_path, monkeypatch) as found:
        file = found.source.stat(SHARD)
        with open_reader(file) as reader:
            yield Opened(file, reader)


def test_a_reader_fills_a_view(opened: Opened) -> None:
    opened.reader.prefetch([(0, 7), (300, 100)])
    for offset, size in ((0, 7), (300, 100), (len(FILES[SHARD]) - 1, 1), (5, 0)):
        data = bytearray(size)
        opened.reader.read_into(offset, memoryview(data))
        assert data == FILES[SHARD][offset : offset + size]


@pytest.mark.parametrize("offset", [0, 5, PAGE, PAGE + 5])
@pytest.mark.parametrize("position", [0, 5, 100])
def test_a_block_of_aligned_memory(opened: Opened, offset: int, position: int) -> None:
    size = len(FILES[SHARD]) - offset
    with mmap.mmap(-1, 16 * PAGE) as memory, memoryview(memory) as view:
        opened.reader.read_block(view, position, offset, size)
        assert view[position : position + size] == FILES[SHARD][offset:]


def test_a_file_that_ends_too_soon(opened: Opened) -> None:
    with pytest.raises(SourceError):
        opened.reader.read_into(len(FILES[SHARD]) - 3, memoryview(bytearray(4)))


def test_a_reader_is_closed_by_its_block_and_may_be_closed_again(opened: Opened) -> None:
    opened.reader.check()
    with open_reader(opened.file) as other:
        assert other.fileno() >= -1
    other.close()
    opened.reader.read_into(0, memoryview(bytearray(1)))


def test_a_reader_of_what_the_plan_saw_otherwise(case: Case) -> None:
    file = case.source.stat(SHARD)
    with pytest.raises(ChangedError, match="changed since the plan was made"):
        open_reader(replace(file, size=file.size - 1))
    with pytest.raises(SourceError):
        open_reader(replace(file, uri=file.uri.replace(SHARD, "nothere.safetensors")))


# --- all together -----------------------------------------------------------------------------------------------------


def test_a_merge_from_memory_is_the_one_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, memory_source.SCHEME, memory_source.__name__)
    place = make_place(tmp_path)
    merge(place.config())
    base = memory_source.put_folder("memory:base", place.base)
    adapter = memory_source.put_folder("memory:adapter", place.adapter)
    merge({"base": base, "adapters": [adapter], "output": {"path": str(tmp_path / "other")}})
    assert contents(tmp_path / "other") == contents(place.output)


def test_a_location_of_an_unknown_place() -> None:
    for location in ("memory:none", "data:;base64,eA==", "s3://bucket/model"):
        with pytest.raises(MissingError):
            open_source(location)
