"""Where files come from. A source is a place that holds files; a reader gives one file's bytes.

``open_source`` turns what a person wrote (a directory, a file, a Hub id) into a `Source`; ``open_reader`` turns the
``uri`` that a plan carries back into a `Reader`, perhaps on another machine. A scheme is one module here; the rest of
the package never asks which.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

from shardmerge.errors import MissingError
from shardmerge.sources.inline import SCHEME as INLINE_SCHEME
from shardmerge.sources.inline import InlineReader, inline_file
from shardmerge.sources.local import LocalReader, LocalSource
from shardmerge.spec.tensors import SourceFile
from shardmerge.system.page_cache import open_direct

__all__ = [
    "HUB_SCHEME",
    "LocalReader",
    "LocalSource",
    "Reader",
    "Source",
    "directory_of",
    "inline_file",
    "looked_in",
    "open_direct",
    "open_reader",
    "open_source",
]

HUB_SCHEME = "hub://"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


class Source(Protocol):
    """A directory's worth of files, read only. Names are relative, with ``/``."""

    @property
    def location(self) -> str:
        """What a person calls it: an absolute path, or ``org/name``."""

    @property
    def revision(self) -> str | None:
        """The commit it is pinned to, where there is such a thing."""

    @property
    def note(self) -> str | None:
        """What a person should know about how it was reached, for example that it was taken from a cache."""

    def names(self) -> list[str]:
        """Every file in it, sorted; hidden files and folders are left out.

        Of a local directory also what only stands where a file is looked for: a FIFO, a device, a link that leads
        nowhere, a folder that is called like a file. A link to a folder has ``/`` at its end, and is not followed.
        """

    def leads_out(self, name: str) -> bool:
        """Whether it is a link to what is outside of the directory. `SourceError` where it leads nowhere."""

    def stat(self, name: str) -> SourceFile:
        """The file's uri, size and times. `SourceError` if it is not there, or is not a file that may be read."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``, fewer only at the end of the file. For headers and small files."""

    def fetch(self, name: str) -> Path:
        """A local path that holds the whole file, downloaded if it must be."""


class Reader(Protocol):
    """One open file."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on. `SourceError` if the file ends before."""

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None:
        """Put ``size`` bytes from ``offset`` at ``position`` of page-aligned ``memory``, perhaps past the page cache.

        The rest of the pages that they lie in may be overwritten. Only where ``position`` and ``offset`` are the same
        within a page can that be had.
        """

    def fileno(self) -> int:
        """The descriptor of a local file, for who would share its blocks; -1 where there is none."""

    def check(self) -> None:
        """`ChangedError` if the file is no longer what it was when it was opened."""

    def close(self) -> None:
        """Give the file back. Calling it twice does no harm."""


def open_source(location: str) -> Source:
    """The source that ``location`` names. A local path of that name wins over the Hub.

    Raises `MissingError` if there is no such place, `SourceError` if it cannot be reached.
    """
    path = os.path.expanduser(location)
    if os.path.exists(path):
        return LocalSource(path)
    if _HUB_ID.fullmatch(location):
        # The Hub's client takes a quarter of a second to import; only those who use it pay.
        from shardmerge.sources.hub import HubSource

        return HubSource.open(location)
    raise MissingError(
        f"{location}: no such file or directory{looked_in(path)} (and it is no Hub id, which would be org/name or "
        "org/name@revision)"
    )


def looked_in(path: str) -> str:
    """`` in /the/working/directory``, where a path is relative to that; empty where it is absolute."""
    return "" if os.path.isabs(path) else f" in {os.getcwd()}"


def directory_of(source: Source) -> Source:
    """The directory around a source that was named as one file; any other source is one itself."""
    return LocalSource(source.root) if isinstance(source, LocalSource) and source.only else source


def open_reader(file: SourceFile) -> Reader:
    """A reader for a file of a plan. `SourceError` if it is gone, `ChangedError` if it is not what the plan saw."""
    if file.uri.startswith(HUB_SCHEME):
        from shardmerge.sources.hub import open_hub_reader

        return open_hub_reader(file)
    if file.uri.startswith(INLINE_SCHEME):
        return InlineReader(file.uri)
    return LocalReader(file)
