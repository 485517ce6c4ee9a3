"""Bytes that a plan carries itself, of no file: a ``data:`` URI (RFC 2397)."""

from __future__ import annotations

import base64

from shardmerge.errors import MissingError, SourceError
from shardmerge.sources.source import Reader, Source
from shardmerge.spec.tensors import SourceFile

IS_PINNED = True
_HEAD = "data:;base64,"


def inline_file(content: bytes) -> SourceFile:
    """A file that holds ``content``."""
    return SourceFile(_HEAD + base64.b64encode(content).decode(), len(content))


def is_inline(uri: str) -> bool:
    """Whether a uri holds the bytes themselves."""
    return uri.startswith(_HEAD)


class InlineReader(Reader):
    """Reads an `inline_file`."""

    def __init__(self, file: SourceFile) -> None:
        self._content = base64.b64decode(file.uri.removeprefix(_HEAD))

    def read_into(self, offset: int, view: memoryview) -> None:
        found = self._content[offset : offset + len(view)]
        if len(found) < len(view):
            raise SourceError(f"inline bytes end at byte {len(self._content)}, {len(view) - len(found)} bytes short")
        view[:] = found


def open_source(location: str) -> Source:
    """Nobody can name inline bytes as a place."""
    raise MissingError(f"{location}: is not a place")


open_reader = InlineReader
