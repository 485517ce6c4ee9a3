"""Files of this machine, read by ``pread``: no mmap (its pages would count as resident memory), no shared position."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardmerge.errors import ChangedError, SourceError
from shardmerge.sources.residency import Residency, open_direct
from shardmerge.spec import PAGE, SourceFile


def _problem(path: str, error: OSError) -> SourceError:
    return SourceError(f"{path}: cannot be read: {error.strerror or error}")


def _regular(path: str, status: os.stat_result) -> os.stat_result:
    """Refuse what is no file of bytes: a FIFO keeps its reader waiting for ever, and a device may have no end."""
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path}: is no regular file")
    return status


def _open(path: str) -> tuple[int, os.stat_result]:
    """A descriptor of a file, and what it is; `OSError` or `SourceError`."""
    # Nothing is waited for even if a FIFO has just taken the file's place; to a regular file the flag means nothing.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return fd, _regular(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    """Size, time and inode: a file that was written to, cut or replaced has another."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def _change(before: tuple[int, int, int], after: tuple[int, int, int]) -> str:
    if before[0] != after[0]:
        return f"it was {before[0]:,} bytes, it is {after[0]:,}"
    return "it was written again" if before[1] != after[1] else "another file has taken its place"


class LocalSource:
    """A directory, or a single file seen as a directory that holds just that file (``only``)."""

    revision: str | None = None
    note: str | None = None

    def __init__(self, path: str) -> None:
        full = os.path.abspath(os.path.expanduser(path))
        self.only: str | None = None
        if not os.path.isdir(full):
            full, self.only = os.path.split(full)
        self.root = full

    @property
    def location(self) -> str:
        return os.path.join(self.root, self.only) if self.only else self.root

    def names(self) -> list[str]:
        if self.only:
            return [self.only]
        found = []
        for folder, folders, files in os.walk(self.root, onerror=self._unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            relative = os.path.relpath(folder, self.root)
            for name in files:
                if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)):
                    found.append(name if relative == "." else f"{relative}/{name}".replace(os.sep, "/"))
        for name in found:
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise SourceError(f"{self.root}: {name!r} is no file name in UTF-8; rename the file or take it away")
        return sorted(found)

    def _unreadable(self, error: OSError) -> None:
        # A folder further down may well be none of our business, as lost+found is.
        if error.filename == self.root:
            raise _problem(self.root, error) from None

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def stat(self, name: str) -> SourceFile:
        path = self._path(name)
        try:
            status = _regular(path, os.stat(path))
        except OSError as error:
            raise _problem(path, error) from None
        return SourceFile(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def read(self, name: str, offset: int, size: int) -> bytes:
        path = self._path(name)
        try:
            with open(_open(path)[0], "rb", buffering=0) as file:
                file.seek(offset)
                chunks = []
                while size > 0 and (chunk := file.read(size)):
                    chunks.append(chunk)
                    size -= len(chunk)
                return b"".join(chunks)
        except OSError as error:
            raise _problem(path, error) from None

    def fetch(self, name: str) -> Path:
        return Path(self._path(name))


class LocalReader:
    """One open local file, checked against what the plan saw of it."""

    def __init__(self, file: SourceFile, path: str | None = None) -> None:
        self.path = path or file.uri
        self._fd = -1
        self._direct: int | None = None
        self._residency: Residency | None = None
        try:
            self._fd, status = _open(self.path)
        except OSError as error:
            self.close()
            raise _problem(self.path, error) from None
        planned = (file.size, file.mtime_ns or status.st_mtime_ns, file.inode or status.st_ino)
        self._identity = _identity(status)
        if self._identity != planned:
            self.close()
            raise ChangedError(f"{self.path}: changed since the plan was made ({_change(planned, self._identity)})")

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise _problem(self.path, error) from None
            if count == 0:
                raise SourceError(
                    f"{self.path}: ends at byte {offset + done}, {len(view) - done} bytes short of what its header "
                    "promises; it was cut while it was being read"
                )
            done += count

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None:
        """See `Reader.read_block`. Bytes that are in the page cache come from there; others do not go there."""
        before = offset % PAGE
        if self._direct is None:
            self._direct = open_direct(self.path, os.O_RDONLY)
            self._residency = Residency(self._fd, os.fstat(self._fd).st_size) if self._direct >= 0 else None
        if self._direct < 0 or position % PAGE != before or (self._residency and self._residency.has(offset, size)):
            self.read_into(offset, memory[position : position + size])
            return
        pages = memory[position - before : position - before + -(-(before + size) // PAGE) * PAGE]
        done = 0
        while done < before + size:
            try:
                count = os.preadv(self._direct, [pages[done:]], offset - before + done)
            except OSError:
                count = 0
            done += count
            if count == 0 or count % PAGE:
                break  # the file's end, or what this file system cannot do
        if done < before + size:
            done = max(done, before)
            self.read_into(offset - before + done, pages[done : before + size])

    def fileno(self) -> int:
        return self._fd

    def check(self) -> None:
        try:
            found = _identity(os.stat(self.path))
        except FileNotFoundError:
            raise ChangedError(f"{self.path}: was removed while it was being read") from None
        except OSError as error:
            raise _problem(self.path, error) from None
        if found != self._identity:
            raise ChangedError(f"{self.path}: changed while it was being read ({_change(self._identity, found)})")

    def close(self) -> None:
        if self._residency is not None:
            self._residency.close()
            self._residency = None
        for fd in (self._fd, self._direct):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1
