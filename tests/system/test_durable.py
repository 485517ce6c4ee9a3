"""Files are there whole or not at all, and every failure is an `OutputError` that names the file."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from shardmerge import OutputError, SourceError
from shardmerge.system import durable
from shardmerge.system.directory import Directory


def refusing(code: int) -> Any:
    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths in the order in which they were fsynced."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to know which file a descriptor is of")
    paths: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: paths.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    return paths


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory(tmp_path) as directory:
        yield directory


# --- write_file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks", [[], [b""], [b"a"], [b"ab", b"", b"c" * 100_000]], ids=["none", "empty", "one", "more"]
)
def test_a_file_holds_all_chunks(chunks: list[bytes], tmp_path: Path, directory: Directory) -> None:
    durable.write_file(directory / "f", chunks)
    assert (tmp_path / "f").read_bytes() == b"".join(chunks)
    assert os.listdir(tmp_path) == ["f"]


def test_the_data_is_synced_under_the_temporary_name_and_then_the_directory(
    tmp_path: Path, directory: Directory, synced: list[str]
) -> None:
    durable.write_file(directory / "f", [b"x"])
    assert synced == [str(tmp_path / "f.tmp"), str(tmp_path)]


def test_a_file_that_was_there_stays_until_the_new_one_is_whole(tmp_path: Path, directory: Directory) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"new"
        assert (tmp_path / "f").read_bytes() == b"old"
        yield b"er"

    durable.write_file(directory / "f", chunks())
    assert (tmp_path / "f").read_bytes() == b"newer"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=["no-space", "io", "quota"])
def test_a_failed_write_leaves_what_was_there(
    code: int, step: str, tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    monkeypatch.setattr(os, step, refusing(code))
    with pytest.raises(OutputError) as caught:
        durable.write_file(directory / "f", [b"new"])
    assert str(tmp_path / "f") in str(caught.value) and os.strerror(code) in str(caught.value)
    assert caught.value.exit_code == 5
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"old"}


@pytest.mark.parametrize("error", [SourceError("gone"), KeyboardInterrupt()], ids=["source-error", "interrupt"])
def test_an_error_of_the_chunks_goes_through_and_leaves_nothing(
    error: BaseException, tmp_path: Path, directory: Directory
) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise error

    with pytest.raises(type(error)) as caught:
        durable.write_file(directory / "f", chunks())
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_place_of_the_file_is_an_output_error(tmp_path: Path, directory: Directory) -> None:
    (tmp_path / "f" / "inner").mkdir(parents=True)
    with pytest.raises(OutputError, match=str(tmp_path / "f")):
        durable.write_file(directory / "f", [b"x"])
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_the_mode_follows_the_umask(umask: int, tmp_path: Path, directory: Directory) -> None:
    before = os.umask(umask)
    try:
        durable.write_file(directory / "f", [b"x"])
        durable.make_folder(directory / "d/e")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "d").stat().st_mode & 0o777 == (tmp_path / "d" / "e").stat().st_mode & 0o777 == 0o777 & ~umask


# --- rename, remove, make_directory -----------------------------------------------------------------------------------


def test_a_rename_makes_both_directories_durable(tmp_path: Path, directory: Directory, synced: list[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"x")
    durable.rename(directory / "a/f", directory / "b/g")
    assert (tmp_path / "b" / "g").read_bytes() == b"x" and not (tmp_path / "a" / "f").exists()
    # The new name before the loss of the old one: at no time has the file none.
    assert synced == [str(tmp_path / "b"), str(tmp_path / "a")]


def test_a_rename_of_nothing_is_an_output_error(tmp_path: Path, directory: Directory) -> None:
    with pytest.raises(OutputError, match=str(tmp_path / "g")):
        durable.rename(directory / "f", directory / "g")


def test_a_removed_file_is_gone_durably_and_a_missing_one_is_no_error(
    tmp_path: Path, directory: Directory, synced: list[str]
) -> None:
    (tmp_path / "f").write_bytes(b"x")
    durable.remove(directory / "f")
    assert not (tmp_path / "f").exists() and synced == [str(tmp_path)]
    durable.remove(directory / "f")
    durable.remove(directory / "no/such/folder/f")


def test_what_cannot_be_removed_is_an_output_error(tmp_path: Path, directory: Directory) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=str(tmp_path / "folder")):
        durable.remove(directory / "folder")


def test_directories_are_made_with_their_parents_durably(tmp_path: Path, synced: list[str]) -> None:
    durable.make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert set(synced) == {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")}
    synced.clear()
    durable.make_directory(tmp_path / "a" / "b" / "c")
    assert synced == []


def test_a_directory_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(OutputError, match=str(tmp_path / "f")):
        durable.make_directory(tmp_path / "f" / "d")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF], ids=["EINVAL", "ENOTSUP", "EBADF"])
def test_a_file_system_that_syncs_no_directories_is_no_error(
    code: int, tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(code))
    durable.fsync_directory(directory.here)


def test_a_directory_that_cannot_be_synced_is_an_output_error(
    tmp_path: Path, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    closed: list[int] = []
    close = os.close

    def noting(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    monkeypatch.setattr(os, "close", noting)
    with pytest.raises(OutputError, match=str(tmp_path)):
        durable.fsync_directory(directory / "inner")
    assert len(closed) == 1


# --- in another process -----------------------------------------------------------------------------------------------


def test_a_pickled_directory_is_closed_and_opens_as_the_same(tmp_path: Path) -> None:
    with Directory(tmp_path) as directory:
        copy = pickle.loads(pickle.dumps(directory / "a")).root
        assert directory.is_open and not copy.is_open
        with durable.held(copy):
            assert os.path.samestat(os.fstat(copy.fd), os.fstat(directory.fd))
            with durable.held(copy):
                pass
            assert copy.is_open
        assert not copy.is_open


def test_a_pickled_directory_is_no_other_that_has_taken_its_place(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    with Directory(place) as directory:
        copy = pickle.loads(pickle.dumps(directory))
    place.rename(tmp_path / "moved")
    place.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="another directory has taken its place"), durable.held(copy):
        pass
    assert not copy.is_open
