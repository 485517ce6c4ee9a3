"""The bytes of a GGUF header, read in chunks. A count is used only after a check that the file has its bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from shardmerge.errors import FormatError

#: Types of values, and the scalars among them → their formats for `struct`. Source: ggml's docs/gguf.md.
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: Mapping[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
#: Bytes that are read at once.
CHUNK = 1 << 20

#: Up to so many bytes (the second) from an offset (the first).
Read = Callable[[int, int], bytes]


class Cursor:
    """Reads a header that ends at byte ``end`` at the latest. `FormatError` where it is not complete."""

    def __init__(self, read: Read, end: int, where: str) -> None:
        self.where = where
        self._read, self._end = read, end
        self._chunk, self._used, self._start = b"", 0, 0

    @property
    def at(self) -> int:
        return self._start + self._used

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self._chunk) - self._used:
            self._check(count)
            size = max(count, min(CHUNK, self._end - self.at))
            self._start, self._used, self._chunk = self.at, 0, self._read(self.at, size)
            self._check(count, self._start + len(self._chunk))
        self._used += count
        return self._chunk[self._used - count : self._used]

    def skip(self, count: int) -> None:
        self._check(count)
        if count <= len(self._chunk) - self._used:
            self._used += count
        else:
            self._start, self._used, self._chunk = self.at + count, 0, b""

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def layout(self, kind: int) -> str:
        """The `struct` format of a scalar of a type."""
        if kind not in SCALARS:
            raise FormatError(f"{self.where}: a value of type {kind} at byte {self.at}, which is unknown")
        return f"<{SCALARS[kind]}"

    def _check(self, count: int, end: int | None = None) -> None:
        if count > (self._end if end is None else end) - self.at:
            raise FormatError(f"{self.where}: its header is not complete at byte {self.at}")
