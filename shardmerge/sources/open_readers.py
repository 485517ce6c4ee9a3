"""Readers of a plan's files that stay open while they are in use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shardmerge.errors import SourceError
from shardmerge.sources.inline import is_inline
from shardmerge.sources.source import Reader, open_reader
from shardmerge.spec.tensors import SourceFile

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST = 8


class OpenReaders:
    """Readers of a plan's files: the few that were used last stay open. For one thread at a time."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self._files = {file.uri: file for file in files}
        self._open: dict[str, Reader] = {}

    def add(self, file: SourceFile) -> None:
        self._files[file.uri] = file

    def get(self, uri: str) -> Reader:
        """The reader of a listed file, or of inline bytes, which need not be listed. `SourceError` for others."""
        reader = self._open.pop(uri, None)
        if reader is None:
            if uri not in self._files and not is_inline(uri):
                raise SourceError(f"{uri}: is not a file of this merge")
            reader = open_reader(self._files.get(uri) or SourceFile(uri, 0))
        self._open[uri] = reader  # the dictionary's order is the order of use
        if len(self._open) > _MOST:
            with self._open.pop(next(iter(self._open))) as oldest:
                oldest.check()
        return reader

    def check(self) -> None:
        """`ChangedError` if a file that is open is no longer what it was."""
        for reader in self._open.values():
            reader.check()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
