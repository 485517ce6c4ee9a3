"""A summary of any GGUF file from its header: version, short values, and the tensors of each type.

    "GGUF", version (u32), number of tensors (u64), number of key-values (u64)
    each key-value:  key, type (u32), value
    each tensor:     name, number of dimensions (u32), dimensions (u64), type (u32), offset (u64)

A string is its length (u64) and its bytes; an array is the type of its items (u32), their number (u64) and the items;
little-endian. Source: ggml's docs/gguf.md. The file is untrusted: its header is read in chunks, no memory is reserved
for items that have not been read, and long values are skipped.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.errors import FormatError
from shardmerge.gguf.formats import ARRAY, STRING, TYPES, Cursor, Read

#: Bytes and items of a header. The largest vocabularies, with their merges, take 20 MB and a million items.
_MOST_BYTES, _MOST_ITEMS = 128 << 20, 4 << 20
_MOST_TENSORS, _MOST_KEYS, _MOST_DIMENSIONS = 1 << 18, 1 << 14, 8
#: Bytes of the longest string that is kept, and of the longest name.
_KEPT = 4096

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Glance:
    """Short values by key; the number of tensors, and the bytes of their data with padding, by type."""

    version: int
    values: Mapping[str, Value]
    tensors: Mapping[str, int]
    nbytes: Mapping[str, int]

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None


def glance(read: Read, size: int, where: str) -> Glance:
    """Read the header of a file of ``size`` bytes. Raises `FormatError`."""
    cursor = _Cursor(read, min(size, _MOST_BYTES), where)
    if cursor.take(4) != b"GGUF":
        raise FormatError(f"{where}: is not a GGUF file")
    version, tensors, keys = cursor.unpack("<IQQ")
    if version not in (2, 3) or tensors > _MOST_TENSORS or keys > _MOST_KEYS:
        raise FormatError(
            f"{where}: GGUF version {version} with {tensors} tensors and {keys} key-values; expected version 2 or 3, "
            f"and at most {_MOST_TENSORS} and {_MOST_KEYS}"
        )
    found = ((cursor.text(), _value(cursor)) for _ in range(keys))
    values = {key: value for key, value in found if value is not None}
    places = [_tensor(cursor) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    padding = -cursor.at % alignment if type(alignment) is int and alignment > 0 else 0
    return Glance(int(version), values, Counter(kind for _, kind in places), _sizes(places, size - cursor.at - padding))


def _sizes(places: list[tuple[int, str]], data_bytes: int) -> Counter[str]:
    """Bytes by type. Every tensor ends where the next begins."""
    sizes: Counter[str] = Counter()
    ordered = sorted(places)
    for (start, kind), end in zip(ordered, [*(start for start, _ in ordered[1:]), data_bytes], strict=True):
        sizes[kind] += max(0, min(end, data_bytes) - start)
    return sizes


class _Cursor(Cursor):
    """A cursor that also counts and limits the items of a header."""

    _items = 0

    def length(self, most: int = _MOST_BYTES) -> int:
        (length,) = self.unpack("<Q")
        self.count(1)
        if length > most:
            raise FormatError(f"{self.where}: a text of {length} bytes at byte {self.at}; expected {most} at most")
        return length

    def text(self) -> str:
        return self.take(self.length(_KEPT)).decode(errors="backslashreplace")

    def count(self, items: int) -> None:
        """Refuse a header of too many items."""
        self._items += items
        if self._items > _MOST_ITEMS:
            raise FormatError(f"{self.where}: its header has over {_MOST_ITEMS} items; expected less")


def _value(cursor: _Cursor) -> Value | None:
    """The next value. A long one is skipped: None."""
    (kind,) = cursor.unpack("<I")
    if kind == STRING:
        length = cursor.length()
        if length <= _KEPT:
            return cursor.take(length).decode(errors="backslashreplace")
        cursor.skip(length)
        return None
    if kind == ARRAY:
        _skip_array(cursor)
        return None
    scalar: Value = cursor.unpack(cursor.layout(kind))[0]
    return scalar


def _skip_array(cursor: _Cursor) -> None:
    item, count = cursor.unpack("<IQ")
    if item != STRING:
        cursor.skip(count * struct.calcsize(cursor.layout(item)))
        return
    cursor.count(min(count, _MOST_ITEMS + 1))
    for _ in range(count):
        cursor.skip(cursor.length())


def _tensor(cursor: _Cursor) -> tuple[int, str]:
    """Where a tensor's data begins, and its type."""
    cursor.text()
    (dimensions,) = cursor.unpack("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise FormatError(f"{cursor.where}: a tensor of {dimensions} dimensions at byte {cursor.at}")
    cursor.skip(8 * dimensions)
    code, offset = cursor.unpack("<IQ")
    return offset, TYPES.get(code, f"type {code}")
