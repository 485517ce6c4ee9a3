"""Bytes that a plan contains itself: a ``data:`` URI (RFC 2397)."""

from __future__ import annotations

import base64

from shardmerge.errors import MissingError, SourceError
from shardmerge.sources.source import INLINE, Reader, Source
from shardmerge.spec.tensors import SourceFile

IS_PINNED = True
_HEAD = f"{INLINE};base64,"


def inline_file(content: bytes) -> SourceFile:
    """A file with this content."""
    return SourceFile(_HEAD + base64.b64encode(content).decode(), len(content))


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
    """Inline bytes cannot be named as a place."""
    raise MissingError(f"{location}: is not a place")


open_reader = InlineReader
