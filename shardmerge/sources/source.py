"""Where files come from: the protocols `Source` (a place that holds files) and `Reader` (the bytes of one file).

``open_source`` turns what a person wrote (a directory, a file, a Hub id) into a `Source`; ``open_reader`` turns the
``uri`` that a plan carries back into a `Reader`, perhaps on another machine. Each scheme is one module with a row in
`SCHEMES`; no other package asks which scheme a file is of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from shardmerge.errors import MissingError, SourceError
from shardmerge.spec.tensors import SourceFile

if TYPE_CHECKING:
    from typing_extensions import Self

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


class Source(Protocol):
    """A directory's worth of files, read only. Names are relative, with ``/``, and untrusted.

    An implementation promises: the files are those of one moment where it is pinned to a ``revision``; where it is not,
    ``stat`` gives the version of each file, so that a reader notices a change. Whatever is wrong with a place or a file
    is a `SourceError` that names it. No name leads to a file outside the place, except as ``leads_out`` allows.
    """

    @property
    def location(self) -> str:
        """What a person calls it: an absolute path, or ``org/name``."""

    @property
    def local_path(self) -> Path | None:
        """The directory or the file on this machine; None where the source is elsewhere."""

    @property
    def revision(self) -> str | None:
        """The commit that it is pinned to; None where there are no commits."""

    @property
    def note(self) -> str | None:
        """What a person should know about how it was reached, for example that it was taken from a cache."""

    def directory(self) -> Source:
        """The directory around a source that was named as one file; any other source itself."""

    def names(self) -> list[str]:
        """Every file in it, sorted, without hidden files and folders.

        A local directory also lists what only looks like a file: a FIFO, a device, a broken link, a folder with a
        file's name. A link to a folder ends with ``/``, and is not followed.
        """

    def leads_out(self, name: str) -> bool:
        """Whether a name is a link to a file outside the directory. `SourceError` where the link is broken."""

    def stat(self, name: str) -> SourceFile:
        """A file's uri, its size in bytes, and its version: mtime, ctime, inode and device, or a commit in the uri.

        `SourceError` if the file is missing, or may not be read.
        """

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, fewer only at the end of the file. For headers and small files."""

    def fetch(self, name: str) -> Path:
        """A local path that holds the whole file, downloaded if necessary."""


class Reader(Protocol):
    """One open file, as the plan saw it: opening one that has changed since is a `ChangedError`.

    A reader is a context manager that closes the file. It is used by one thread at a time.
    """

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on. `SourceError` if the file ends before that."""

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None:
        """Put ``size`` bytes from ``offset`` at ``position`` of page-aligned ``memory``, perhaps past the page cache.

        The rest of the pages that these bytes are in may be overwritten. Only where ``position`` and ``offset`` agree
        modulo the page size can the page cache be avoided.
        """
        self.read_into(offset, memory[position : position + size])

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """A hint: these (offset, size) will be read next, in this order. It may do nothing."""
        return

    def fileno(self) -> int:
        """The descriptor of a local file, whose blocks may be shared; -1 where there is none."""
        return -1

    def check(self) -> None:
        """`ChangedError` if the file is no longer what it was when it was opened."""
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

    #: Whether a uri determines the bytes: it holds them, or the hash of a commit.
    IS_PINNED: bool

    def open_source(self, location: str) -> Source:
        """The source that a person named. `MissingError` or `SourceError`."""

    def open_reader(self, file: SourceFile) -> Reader:
        """The reader of a file of a plan. `SourceError` or `ChangedError`."""


#: What uris begin with → the module, imported when the first of them is met: the Hub's client takes a quarter of a
#: second to import. A path has no scheme.
SCHEMES: dict[str, str] = {
    "hub://": "shardmerge.sources.hub",
    "data:": "shardmerge.sources.inline",
    "": "shardmerge.sources.local",
}


def _scheme(uri: str) -> Scheme:
    found = max((prefix for prefix in SCHEMES if uri.startswith(prefix)), key=len)
    return cast("Scheme", import_module(SCHEMES[found]))


def open_source(location: str) -> Source:
    """The source that ``location`` names. A local path of that name takes precedence over the Hub.

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
    """A reader for a file of a plan. `SourceError` if it is gone, `ChangedError` if it is not what the plan saw."""
    return _scheme(file.uri).open_reader(file)


def is_pinned(file: SourceFile) -> bool:
    """Whether the uri determines the bytes, so that they need not be read to know that they are the same."""
    return _scheme(file.uri).IS_PINNED


def read_file(file: SourceFile) -> bytearray:
    """All bytes of a file of a plan, which is small. `SourceError` or `ChangedError`."""
    content = bytearray(file.size)
    with open_reader(file) as reader:
        reader.read_into(0, memoryview(content))
    return content


def read_whole(source: Source, name: str, limit: int) -> bytes:
    """All bytes of a file of a source. `SourceError` where there are more than ``limit``."""
    content = source.read(name, 0, limit + 1)
    if len(content) > limit:
        raise SourceError(f"{source.location}: {name} is over {limit:,} bytes long; expected less")
    return content
