"""Bytes that a plan carries itself, for what no file holds: a ``data:`` URI (RFC 2397)."""

from __future__ import annotations

import base64

from shardmerge.spec.tensors import SourceFile

SCHEME = "data:"
_HEAD = f"{SCHEME};base64,"


def inline_file(content: bytes) -> SourceFile:
    """A file that holds ``content``."""
    return SourceFile(_HEAD + base64.b64encode(content).decode(), len(content))


class InlineReader:
    """Reads an `inline_file`."""

    def __init__(self, uri: str) -> None:
        self._content = base64.b64decode(uri.removeprefix(_HEAD))

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self._content[offset : offset + len(view)]

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None:
        self.read_into(offset, memory[position : position + size])

    def fileno(self) -> int:
        return -1

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
