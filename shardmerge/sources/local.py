"""Files of this machine, read by ``pread``: no mmap (its pages would count as resident memory), no shared position."""

from __future__ import annotations

import os
from pathlib import Path

from shardmerge.errors import SourceError
from shardmerge.sources.residency import Residency, open_direct
from shardmerge.spec import PAGE, SourceFile


def _problem(path: str, error: OSError) -> SourceError:
    return SourceError(f"{path}: cannot be read: {error.strerror or error}")


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
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            relative = os.path.relpath(folder, self.root)
            for name in files:
                if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)):
                    found.append(name if relative == "." else f"{relative}/{name}".replace(os.sep, "/"))
        return sorted(found)

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def stat(self, name: str) -> SourceFile:
        path = self._path(name)
        try:
            status = os.stat(path)
        except OSError as error:
            raise _problem(path, error) from None
        return SourceFile(uri=path, size=status.st_size, mtime_ns=status.st_mtime_ns)

    def read(self, name: str, offset: int, size: int) -> bytes:
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
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
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._fd)
        except OSError as error:
            self.close()
            raise _problem(self.path, error) from None
        if status.st_size != file.size or (file.mtime_ns and status.st_mtime_ns != file.mtime_ns):
            self.close()
            raise SourceError(
                f"{self.path}: changed since the plan was made (it was {file.size} bytes, it is {status.st_size}; "
                "or it was written again). Make a new plan."
            )

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

    def close(self) -> None:
        if self._residency is not None:
            self._residency.close()
            self._residency = None
        for fd in (self._fd, self._direct):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1
