"""Local files, read by ``pread``: there is no shared position, and pages of an mmap would count as resident memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardmerge.errors import ChangedError, SourceError
from shardmerge.sources import links
from shardmerge.sources.source import Reader
from shardmerge.spec.tensors import PAGE, SourceFile
from shardmerge.system.page_cache import Residency, open_direct
from shardmerge.system.regular_files import NotRegularError, open_regular

IS_PINNED = False


def _problem(path: str, error: OSError) -> SourceError:
    what = error.strerror or str(error)
    return SourceError(f"{path}: {what if isinstance(error, NotRegularError) else f'cannot be read: {what}'}")


#: With the size, these identify a version of a file; 0 is unknown.
_VERSION = ("mtime_ns", "inode", "device", "ctime_ns")


def _seen(path: str, status: os.stat_result) -> SourceFile:
    """A file with its version, which changes when the file is written to, cut or replaced.

    A program can reset mtime, but not ctime. A change of the mode, owner, name or number of hard links changes ctime,
    too, and cannot be distinguished. Reading a file or sharing its blocks changes neither.
    """
    return SourceFile(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, status.st_ctime_ns)


def _changed(before: SourceFile, after: SourceFile) -> str:
    """How a file changed, as far as ``before`` is known; empty if it did not."""
    changed = {key for key in _VERSION if getattr(before, key) not in (0, getattr(after, key))}
    if before.size != after.size:
        return f"it was {before.size:,} bytes, it is {after.size:,}"
    if "mtime_ns" in changed:
        return "it was written again"
    if changed & {"inode", "device"}:
        return "another file has taken its place"
    if not changed:
        return ""
    return "its ctime changed: it was written to and its mtime reset, or its mode, owner, name or links changed"


class LocalSource:
    """A directory, or a single file (``only``), seen as a directory with just that file.

    ``stat``, ``read`` and ``fetch`` refuse everything but regular files, and every link that `links` does not allow.
    """

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

    @property
    def local_path(self) -> Path | None:
        return Path(self.location)

    def directory(self) -> LocalSource:
        return LocalSource(self.root) if self.only else self

    def names(self) -> list[str]:
        """See `Source.names`. Other entries are listed, too: they are refused when they are used, not "missing"."""
        if self.only:
            return [self.only]
        found = []
        for folder, folders, files in os.walk(self.root, onerror=self._unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            relative = os.path.relpath(folder, self.root)
            before = "" if relative == "." else f"{relative}/".replace(os.sep, "/")
            found += [before + name for name in files if not name.startswith(".")]
            found += [before + name for name in folders if name.endswith(links.FILES)]
            found += [f"{before}{name}/" for name in folders if self._is_linked(before + name)]
        for name in found:
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise SourceError(f"{self.root}: {name!r} is not a file name in UTF-8; rename or remove the file")
        return sorted(found)

    def _is_linked(self, folder: str) -> bool:
        return not folder.endswith(links.FILES) and os.path.islink(self._path(folder))

    def _unreadable(self, error: OSError) -> None:
        # Unreadable folders further down, such as lost+found, do not matter.
        if error.filename == self.root:
            raise _problem(self.root, error) from None

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def leads_out(self, name: str) -> bool:
        """See `Source.leads_out`. Only weights may."""
        return name != self.only and links.leads_out(self.root, name)

    def _real(self, name: str) -> str:
        """The path without links of a file. `SourceError`."""
        if name == self.only and os.path.exists(self._path(name)):
            return os.path.realpath(self._path(name))  # a person named this very path
        return links.real_path(self.root, name)

    def stat(self, name: str) -> SourceFile:
        path = self._path(name)
        try:
            status = os.lstat(self._real(name))
            if not stat.S_ISREG(status.st_mode):
                raise NotRegularError(path, status.st_mode)
        except OSError as error:
            raise _problem(path, error) from None
        return _seen(path, status)

    def read(self, name: str, offset: int, size: int) -> bytes:
        file = self.stat(name)
        data = bytearray(max(0, min(size, file.size - offset)))
        with LocalReader(file) as reader:  # it notices if a link leads elsewhere by now
            reader.read_into(offset, memoryview(data))
        return bytes(data)

    def fetch(self, name: str) -> Path:
        self.stat(name)
        return Path(self._path(name))


class LocalReader(Reader):
    """One open local file, checked against its version in the plan."""

    def __init__(self, file: SourceFile, path: str | None = None) -> None:
        self.path = path or file.uri
        self._fd = -1
        self._direct: int | None = None
        self._residency: Residency | None = None
        try:
            self._fd, status = open_regular(self.path)
        except OSError as error:
            self.close()
            raise _problem(self.path, error) from None
        # If a link leads elsewhere by now, the version differs.
        self._opened = _seen(self.path, status)
        if how := _changed(file, self._opened):
            self.close()
            raise ChangedError(f"{self.path}: changed since the plan was made ({how})")

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise _problem(self.path, error) from None
            if count == 0:
                raise SourceError(
                    f"{self.path}: ends at byte {offset + done}, {len(view) - done} bytes short; it was cut while it "
                    "was being read"
                )
            done += count

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None:
        """See `Reader.read_block`. Bytes that are not in the page cache are read past it."""
        before = offset % PAGE
        if self._direct is None:
            self._direct = open_direct(self.path, os.O_RDONLY | os.O_NONBLOCK)
            if self._direct >= 0 and not os.path.sameopenfile(self._direct, self._fd):
                raise ChangedError(f"{self.path}: another file has taken its place while it was being read")
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
                break  # the end of the file, or not supported by this file system
        if done < before + size:
            done = max(done, before)
            self.read_into(offset - before + done, pages[done : before + size])

    def fileno(self) -> int:
        return self._fd

    def check(self) -> None:
        try:
            found = _seen(self.path, os.stat(self.path))
        except FileNotFoundError:
            raise ChangedError(f"{self.path}: was removed while it was being read") from None
        except OSError as error:
            raise _problem(self.path, error) from None
        if how := _changed(self._opened, found):
            raise ChangedError(f"{self.path}: changed while it was being read ({how})")

    def close(self) -> None:
        if self._residency is not None:
            self._residency.close()
            self._residency = None
        for fd in (self._fd, self._direct):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


open_source, open_reader = LocalSource, LocalReader
