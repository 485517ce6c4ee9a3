"""Durable changes of files: a file is either complete and on the disk, or absent.

A file is written under another name, fsynced and renamed; then its directory is fsynced. A disk that acknowledges
writes which are only in its cache can still lose them. Every name in the directory is an `Entry`, so that no link leads
outside.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shardmerge.errors import OutputError
from shardmerge.system.directory import Directory, Entry

TEMPORARY_SUFFIX = ".tmp"


def output_error(path: Path | Entry | str, doing: str, error: OSError) -> OutputError:
    """An `OutputError` that names the file and the step that failed."""
    return OutputError(f"{path}: {doing} failed: {error.strerror or error}")


@contextmanager
def reported(path: Path | Entry, doing: str) -> Iterator[None]:
    """Turn an `OSError` in the block into an `output_error`."""
    try:
        yield
    except OSError as error:
        raise output_error(path, doing, error) from None


# --- the directory itself ---------------------------------------------------------------------------------------------


def make_directory(path: Path) -> list[Path]:
    """Create a directory and its parents durably, or none. Returns those that were missing, innermost first."""
    made: list[Path] = []
    try:
        with reported(path, "making the directory"):
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            for folder in reversed(missing):
                with suppress(FileExistsError):  # another process made it
                    folder.mkdir()
                    made.insert(0, folder)
                with Directory(folder.parent) as parent:
                    fsync_directory(parent.here)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except BaseException:
        remove_empty(made)
        raise
    return made


def open_directory(directory: Directory) -> None:
    """Hold an existing directory open until `Directory.close`."""
    with reported(directory.path, "opening"):
        directory.open()


@contextmanager
def held(directory: Directory) -> Iterator[None]:
    """Have the directory open in the block."""
    if directory.is_open:
        yield
        return
    open_directory(directory)
    try:
        yield
    finally:
        directory.close()


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove empty directories, in this order, up to the first that cannot be removed."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


# --- its entries ------------------------------------------------------------------------------------------------------


def fsync_directory(folder: Entry) -> None:
    """Make the names in a folder durable. Some file systems cannot fsync a directory; that is not an error."""
    with reported(folder, "fsync"), folder.descriptor() as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise


def make_folder(folder: Entry) -> bool:
    """Create a folder and its parents durably. Returns whether it was missing. A link is an error."""
    if not folder.parts:
        return False
    make_folder(folder.parent)
    with reported(folder, "making the directory"):
        is_missing = folder.status() is None
        if is_missing:
            with suppress(FileExistsError):  # another process made it
                folder.mkdir()
            try:  # if its name cannot be made durable, the new folder is removed
                fsync_directory(folder.parent)
            except BaseException:
                with suppress(OSError):
                    folder.rmdir()
                raise
        with folder.descriptor():
            return is_missing


def rename(source: Entry, target: Entry) -> None:
    """Replace ``target`` by ``source`` and make the new name durable."""
    with reported(target, "the rename into place"):
        source.replace(target)
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``; one system call may write only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(file: Entry, chunks: Iterable[bytes]) -> None:
    """Write a file durably, all or nothing. umask applies."""
    temporary = file.with_ending(TEMPORARY_SUFFIX)
    try:
        with reported(file, "writing"):
            _write_temporary(temporary, chunks)
            rename(temporary, file)
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
    """Remove a temporary file if possible. A failure is ignored: another error may be the cause."""
    with suppress(OSError):
        file.unlink()


def remove(file: Entry) -> None:
    """Remove a file if it exists; its absence is durable when this returns."""
    with reported(file, "removing"):
        try:
            file.unlink()
        except FileNotFoundError:
            return
    fsync_directory(file.parent)


def remove_tree(folder: Entry) -> None:
    """Remove a folder and everything in it, if it exists."""
    with reported(folder, "removing"), suppress(FileNotFoundError):
        folder.remove_tree()
