"""Where files come from: the protocols `Source` (a place that holds files) and `Reader` (the bytes of one file).

``open_source`` opens the place that a person named (a directory, a file, a Hub id); ``open_reader`` opens a file by the
``uri`` in a plan, perhaps on another machine. Each scheme is one module with a row in `SCHEMES`; no other package asks
for a file's scheme.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from shardmerge.errors import MissingError, SourceError
from shardmerge.spec.tensors import SourceFile

if TYPE_CHECKING:
    from typing_extensions import Self

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
#: Readers that `OpenReaders` keeps open.
_MOST = 8


class Source(Protocol):
    """The files of a directory, read only. Names are relative, with ``/``, and untrusted.

    An implementation promises: a source that is pinned to a ``revision`` never changes; any other reports the version
    of each file in ``stat``, so that a reader notices a change. Every problem with a place or a file is a `SourceError`
    that names it. No name leads to a file outside the place, except as ``leads_out`` allows.
    """

    @property
    def location(self) -> str:
        """Its name for a person: an absolute path, or ``org/name``."""

    @property
    def local_path(self) -> Path | None:
        """The directory or the file, if it is on this machine."""

    @property
    def revision(self) -> str | None:
        """The commit that it is pinned to, if it has commits."""

    @property
    def note(self) -> str | None:
        """A note for a person about how it was reached, for example that a cache was used."""

    def directory(self) -> Source:
        """The directory around a source that was named as one file; any other source itself."""

    def names(self) -> list[str]:
        """Every file in it, sorted, without hidden files and folders.

        A local directory also lists entries that only look like a file: a FIFO, a device, a broken link, a folder with
        a file's name. A link to a folder ends with ``/``, and is not followed.
        """

    def leads_out(self, name: str) -> bool:
        """Whether a name is a link to a file outside the directory. `SourceError` where the link is broken."""

    def stat(self, name: str) -> SourceFile:
        """A file's uri, its size in bytes, and its version: mtime, ctime, inode and device, or a commit in the uri."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, fewer only at the end of the file."""

    def fetch(self, name: str) -> Path:
        """A local path that holds the whole file, downloaded if necessary."""


class Reader(Protocol):
    """One open file, unchanged since the plan: opening a file that has changed is a `ChangedError`.

    A reader is a context manager that closes the file. One thread at a time uses it.
    """

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on. `SourceError` if the file ends before that."""

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None:
        """Read ``size`` bytes from ``offset`` to ``position`` of page-aligned ``memory``.

        The rest of the pages that hold these bytes may be overwritten. The read can avoid the page cache only if
        ``position`` and ``offset`` agree modulo the page size.
        """
        self.read_into(offset, memory[position : position + size])

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint that these (offset, size) will be read next, in this order. It may do nothing."""
        return

    def fileno(self) -> int:
        """The descriptor of a local file, whose blocks may be shared; -1 for any other file."""
        return -1

    def check(self) -> None:
        """`ChangedError` if the file has changed since it was opened."""
        return

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Scheme(Protocol):
    """A module that implements one kind of place."""

    #: Whether a uri determines the bytes: it contains them, or the hash of a commit.
    IS_PINNED: bool

    def open_source(self, location: str) -> Source:
        """The place that a person named. `MissingError` or `SourceError`."""

    def open_reader(self, file: SourceFile) -> Reader:
        """The reader of a file of a plan. `SourceError` or `ChangedError`."""


#: A plan contains the bytes of such a file itself.
INLINE = "data:"
#: Prefix of uris → their module. It is imported when it is needed: importing the Hub's client takes a quarter of a
#: second. A path has no prefix.
SCHEMES: dict[str, str] = {
    "hub://": "shardmerge.sources.hub",
    INLINE: "shardmerge.sources.inline",
    "": "shardmerge.sources.local",
}


def _scheme(uri: str) -> Scheme:
    found = max((prefix for prefix in SCHEMES if uri.startswith(prefix)), key=len)
    return cast("Scheme", import_module(SCHEMES[found]))


def open_source(location: str) -> Source:
    """The place that ``location`` names. A local path takes precedence over a Hub id.

    Raises `MissingError` if there is no such place, `SourceError` if it cannot be reached.
    """
    path = os.path.expanduser(location)
    if os.path.exists(path):
        return _scheme("").open_source(path)
    if location.startswith(tuple(filter(None, SCHEMES))):
        return _scheme(location).open_source(location)
    if _HUB_ID.fullmatch(location):
        return _scheme("hub://").open_source(location)
    raise MissingError(
        f"{location}: no such file or directory{looked_in(path)} (and it is not a Hub id, which would be org/name or "
        "org/name@revision)"
    )


def looked_in(path: str) -> str:
    """`` in /the/working/directory`` for a relative path; empty for an absolute one."""
    return "" if os.path.isabs(path) else f" in {os.getcwd()}"


def open_reader(file: SourceFile) -> Reader:
    """The reader of a file of a plan. `SourceError` if it is gone, `ChangedError` if it has changed since the plan."""
    return _scheme(file.uri).open_reader(file)


def is_pinned(file: SourceFile) -> bool:
    """Whether the uri determines the bytes, so that they need not be read to know that they are the same."""
    return _scheme(file.uri).IS_PINNED


def read_file(file: SourceFile, limit: int) -> bytearray:
    """All bytes of a file of a plan. `SourceError` if there are more than ``limit``, or `ChangedError`."""
    if file.size > limit:
        raise SourceError(f"{file.uri}: is over {limit:,} bytes long; expected less")
    content = bytearray(file.size)
    with open_reader(file) as reader:
        reader.read_into(0, memoryview(content))
    return content


class OpenReaders:
    """Readers of a plan's files. The most recently used stay open. For one thread at a time."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self._files = {file.uri: file for file in files}
        self._open: dict[str, Reader] = {}

    def add(self, file: SourceFile) -> None:
        self._files[file.uri] = file

    def get(self, uri: str) -> Reader:
        """The reader of a file of the plan, or of inline bytes. `SourceError` for any other uri."""
        reader = self._open.pop(uri, None)
        if reader is None:
            if uri not in self._files and not uri.startswith(INLINE):
                raise SourceError(f"{uri}: is not a file of this merge")
            reader = open_reader(self._files.get(uri) or SourceFile(uri, 0))
        self._open[uri] = reader  # the dictionary's order is the order of use
        if len(self._open) > _MOST:
            with self._open.pop(next(iter(self._open))) as oldest:
                oldest.check()
        return reader

    def check(self) -> None:
        """`ChangedError` if an open file has changed."""
        for reader in self._open.values():
            reader.check()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
