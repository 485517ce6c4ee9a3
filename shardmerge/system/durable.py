"""Files that are either there, whole and on the disk, or not there.

A file is written under another name, fsynced, renamed into place, and the directory that now holds its name is fsynced
too. What fsync cannot promise: that a disk which lies about its write cache keeps what it acknowledged.

All but the directory itself is named by an `Entry` of it, so that no link in it leads outside.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from shardmerge.errors import OutputError
from shardmerge.system.directory import Directory, Entry

TEMPORARY_SUFFIX = ".tmp"


def output_error(path: Path | Entry | str, doing: str, error: OSError) -> OutputError:
    """An `OutputError` that names the file and what was being done to it."""
    return OutputError(f"{path}: {doing} failed: {error.strerror or error}")


# --- the directory itself ---------------------------------------------------------------------------------------------


def make_directory(path: Path) -> list[Path]:
    """Create a directory and its parents, durably; those that were missing, innermost first. On failure none stays."""
    made: list[Path] = []
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError):  # somebody else was as quick
                folder.mkdir()
                made.insert(0, folder)
            with Directory(folder.parent) as parent:
                fsync_directory(parent.here)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        remove_empty(made)
        raise output_error(path, "making the directory", error) from None
    except BaseException:
        remove_empty(made)
        raise
    return made


def open_directory(directory: Directory) -> None:
    """Hold a directory that is there open, until `Directory.close`."""
    try:
        directory.open()
    except OSError as error:
        raise output_error(directory.path, "opening", error) from None


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove directories that are empty, in this order, up to the first that is not or that cannot be removed."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


# --- what lies in it --------------------------------------------------------------------------------------------------


def fsync_directory(folder: Entry) -> None:
    """Make the names in a folder durable. Some file systems refuse to fsync a directory; that is not an error."""
    try:
        with folder.descriptor() as descriptor:
            _fsync_names(descriptor)
    except OSError as error:
        raise output_error(folder, "fsync", error) from None


def _fsync_names(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def make_folder(folder: Entry) -> bool:
    """Create a folder, and those that it lies in, durably; whether it was missing. A link is not taken for one."""
    if not folder.parts:
        return False
    make_folder(folder.parent)
    try:
        is_missing = folder.status() is None
        if is_missing:
            with suppress(FileExistsError):  # somebody else was as quick
                folder.mkdir()
            _fsync_or_remove(folder)
        with folder.descriptor():
            return is_missing
    except OSError as error:
        raise output_error(folder, "making the directory", error) from None


def _fsync_or_remove(folder: Entry) -> None:
    """Make the name of a new and empty folder durable, or take it away."""
    try:
        fsync_directory(folder.parent)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def rename(source: Entry, target: Entry) -> None:
    """Replace ``target`` by ``source`` and make the new name durable."""
    try:
        source.replace(target)
    except OSError as error:
        raise output_error(target, "the rename into place", error) from None
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``, though the system may take only a part of it at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(file: Entry, chunks: Iterable[bytes]) -> None:
    """Write a file durably, all or nothing. Its mode follows the umask."""
    temporary = file.with_ending(TEMPORARY_SUFFIX)
    try:
        _write_temporary(temporary, chunks)
        rename(temporary, file)
    except OSError as error:
        remove_leftover(temporary)
        raise output_error(file, "writing", error) from None
    except BaseException:
        remove_leftover(temporary)
        raise


def _write_temporary(file: Entry, chunks: Iterable[bytes]) -> None:
    descriptor = file.create()
    try:
        for chunk in chunks:
            write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftover(file: Entry) -> None:
    """Remove a temporary file if that can be done. It hurts nobody, and another error may be on its way."""
    with suppress(OSError):
        file.unlink()


def remove(file: Entry) -> None:
    """Remove a file if it is there; its absence is durable when this returns."""
    try:
        file.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(file, "removing", error) from None
    fsync_directory(file.parent)


def remove_tree(folder: Entry) -> None:
    """Remove a folder and all that lies in it, if it is there."""
    try:
        folder.remove_tree()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{folder}: cannot be removed: {error.strerror or error}") from None
