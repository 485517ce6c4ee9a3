"""Files that are either there, whole and on the disk, or not there.

A file is written under another name, fsynced, renamed into place, and the directory that now holds its name is fsynced
too. What fsync cannot promise: that a disk which lies about its write cache keeps what it acknowledged.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
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


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, "making the directory", error) from None
    for folder in missing:
        fsync_directory(folder.parent)


def rename(source: Path, target: Path) -> None:
    """Replace ``target`` by ``source`` and make the new name durable."""
    try:
        os.replace(source, target)
    except OSError as error:
        raise output_error(target, "the rename into place", error) from None
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file durably, all or nothing. Its mode follows the umask."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise output_error(path, "writing", error) from None
    else:
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file if it is there; its absence is durable when this returns."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(path, "removing", error) from None
    fsync_directory(path.parent)
