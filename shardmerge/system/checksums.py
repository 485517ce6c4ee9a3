"""Checksums of files: xxh3_128 always, as it is almost free, and optionally sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import xxhash

from shardmerge.system.aligned_memory import pages

_BLOCK = 4 << 20


class Blocks(Protocol):
    """A file that is read in blocks; a `Reader` is one."""

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None: ...


class Checksums:
    """Checksums of a stream of bytes. xxhash and hashlib release the interpreter's lock."""

    def __init__(self, sha256: bool = False) -> None:
        self._hashes: dict[str, Any] = {"xxh3_128": xxhash.xxh3_128()}
        if sha256:
            self._hashes["sha256"] = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        for value in self._hashes.values():
            value.update(data)

    def hex(self) -> dict[str, str]:
        """By name: ``xxh3_128``, ``sha256``."""
        return {name: value.hexdigest() for name, value in self._hashes.items()}


def of_file(
    file: Blocks, size: int, sha256: bool = False, advance: Callable[[int], None] = lambda count: None
) -> dict[str, str]:
    """The checksums of a file's first ``size`` bytes, by name; ``advance`` is called with the bytes of each step."""
    checksums = Checksums(sha256)
    memory = pages(_BLOCK)
    for offset in range(0, size, _BLOCK):
        count = min(_BLOCK, size - offset)
        file.read_block(memory, 0, offset, count)
        checksums.update(memory[:count])
        advance(count)
    return checksums.hex()
