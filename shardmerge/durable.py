"""Files that are either there, whole and on the disk, or not there.

A file is written under another name, fsynced, renamed into place, and the directory that now holds its name is fsynced
too. What fsync cannot promise: that a disk which lies about its write cache keeps what it acknowledged.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from shardmerge.errors import OutputError

TEMPORARY_SUFFIX = ".tmp"


def output_error(path: Path | str, doing: str, error: OSError) -> OutputError:
    """An `OutputError` that names the file and what was being done to it."""
    return OutputError(f"{path}: {doing} failed: {error.strerror or error}")


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable. Some file systems refuse to fsync a directory; that is not an error."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise output_error(path, "fsync", error) from None
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise output_error(path, "fsync", error) from None
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> list[Path]:
    """Create a directory and its parents, durably; those that were missing, innermost first. On failure none stays."""
    made: list[Path] = []
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError):  # somebody else was as quick
                folder.mkdir()
                made.insert(0, folder)
            fsync_directory(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        remove_empty(made)
        raise output_error(path, "making the directory", error) from None
    except BaseException:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove directories that are empty, in this order, up to the first that is not or that cannot be removed."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def rename(source: Path, target: Path) -> None:
    """Replace ``target`` by ``source`` and make the new name durable."""
    try:
        os.replace(source, target)
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


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file durably, all or nothing. Its mode follows the umask."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        _write_temporary(temporary, chunks)
        rename(temporary, path)
    except OSError as error:
        remove_leftover(temporary)
        raise output_error(path, "writing", error) from None
    except BaseException:
        remove_leftover(temporary)
        raise


def _write_temporary(path: Path, chunks: Iterable[bytes]) -> None:
    # 0o666 so that the mode follows the umask.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftover(path: Path) -> None:
    """Remove a temporary file if that can be done. It hurts nobody, and another error may be on its way."""
    with suppress(OSError):
        path.unlink()


def remove(path: Path) -> None:
    """Remove a file if it is there; its absence is durable when this returns."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(path, "removing", error) from None
    fsync_directory(path.parent)
