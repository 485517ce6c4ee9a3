"""Files of a plan that are kept open while they are read from."""

from __future__ import annotations

from collections.abc import Iterable

from shardmerge.sources.source import Reader, open_reader
from shardmerge.spec.tensors import SourceFile

_MOST = 8


class OpenReaders:
    """Readers of a plan's files, kept open: the latest few of them. For one thread at a time."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self._files = {file.uri: file for file in files}
        self._open: dict[str, Reader] = {}

    def get(self, uri: str) -> Reader:
        # What is inline is in no list, and needs none.
        reader = self._open.pop(uri, None) or open_reader(self._files.get(uri) or SourceFile(uri, 0))
        self._open[uri] = reader  # the dictionary's order is the order of use
        if len(self._open) > _MOST:
            oldest = self._open.pop(next(iter(self._open)))
            oldest.check()
            oldest.close()
        return reader

    def check(self) -> None:
        """`ChangedError` if a file that is open is no longer what it was."""
        for reader in self._open.values():
            reader.check()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
