"""Reads the entries of a safetensors header's JSON, in bounded memory and without losing duplicates.

A header is untrusted and may have 100 MB. Python's objects take up to thirty times the memory of their JSON.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from typing import Any

from shardmerge.system.json_text import unique_keys

METADATA = "__metadata__"
#: Characters of a tensor's name and entry. Real ones have two hundred.
MAX_ENTRY = 2_000_000
#: Characters of ``__metadata__``, which may contain a picture.
MAX_METADATA = 10_000_000
#: Header bytes that are decoded at a time.
_PART = 1 << 20
#: Characters of entries that are read at once.
_AT_ONCE = 1 << 18
#: Within so many characters of the end of a part (``-Infinity``), a JSON error may be due to the cut.
_NEAR = 9
_SPACES = re.compile(r"[ \t\n\r]*")


class TooLongError(Exception):
    """An entry is too long; the message is the limit."""


def entries(data: bytes) -> Iterable[tuple[str, Any]]:
    """Keys and values of a header's JSON.

    Raises `ValueError` if it is not a JSON object or has a key twice, `RecursionError`, or `TooLongError`.
    """
    return _entries(data) if len(data) <= MAX_ENTRY else _entries_of_many(data)


def _entries(data: bytes) -> Iterable[tuple[str, Any]]:
    # Decoded here, since json would accept UTF-16.
    entries = _without_duplicates(data.decode())
    if b"\\u" in data:
        _check_surrogates(entries)
    found: Iterable[tuple[str, Any]] = entries.items()
    return found


def _without_duplicates(text: str) -> Any:
    """The value of a JSON text. Raises `DuplicateKeyError` for an object with a key twice.

    Each key has a colon. If there are no more colons than keys, no key was lost; otherwise each object is checked,
    which takes 4 % of a plan of 45,000 targets.
    """
    value = json.loads(text)
    if isinstance(value, dict):
        keys = len(value) + sum([len(entry) for entry in value.values() if type(entry) is dict])
        if text.count(":") == keys:
            return value
    return json.loads(text, object_pairs_hook=unique_keys)


def _check_surrogates(value: Any) -> None:
    """`ValueError` for half of a surrogate pair, which cannot be stored again."""
    json.dumps(value, ensure_ascii=False).encode()


def _entries_of_many(data: bytes) -> Iterator[tuple[str, Any]]:
    """`_entries` with few entries at a time in memory."""
    has_escapes = b"\\u" in data
    parts = _Parts(data)
    index = parts.next(parts.reach(0, MAX_ENTRY), "{") + 1
    if parts.text.startswith("}", parts.skip(index)):
        index = parts.skip(index)
    else:
        while True:
            name, value, index = _entry(parts, index)
            if has_escapes:
                _check_surrogates([name, value])
            yield name, value
            many, index = _whole_entries(parts, index, has_escapes)
            yield from many
            index = parts.skip(index)
            if parts.text.startswith("}", index):
                break
            index = parts.next(index, ",") + 1
    index += 1
    while (index := parts.skip(index)) == len(parts.text) and not parts.is_last:
        index = parts.reach(index, 1)
    if index < len(parts.text):
        raise parts.wrong("extra data", index)


def _whole_entries(parts: _Parts, index: int, has_escapes: bool) -> tuple[Iterable[tuple[str, Any]], int]:
    """The complete entries after a comma at ``index`` in this part, perhaps none, and their end.

    The text is cut at an apparent end of an entry. If the cut is not JSON, its entries are read one by one. Reading all
    90,000 entries one by one would take 8 % of a plan of 45,000 targets.
    """
    if not parts.text.startswith(',"', index):
        return (), index
    end = parts.text.rfind('},"', index, index + _AT_ONCE)
    if end < 0:
        return (), index
    try:
        entries = _without_duplicates("{" + parts.text[index + 1 : end + 1] + "}")
        if has_escapes:
            _check_surrogates(entries)
    except (ValueError, RecursionError):
        return (), index
    return entries.items(), end + 1


def _entry(parts: _Parts, index: int) -> tuple[str, Any, int]:
    """The key and the value at ``index``, and their end."""
    limit, scan = MAX_ENTRY, _any_value
    # The entry, and the text up to the next.
    start = index = parts.reach(index, 2 * limit)
    try:
        name, index = scan(parts.text, parts.next(index, '"'))
        index = parts.skip(parts.next(index, ":") + 1)
        if name == METADATA:
            limit, scan = MAX_METADATA, _strings
            start = index = parts.reach(index, limit + 1)
        value, index = scan(parts.text, index)
    except json.JSONDecodeError as error:
        # An entry that is not complete in this part is too long, whatever the JSON error.
        if not parts.is_last and (error.msg.startswith("Unterminated") or error.pos > len(parts.text) - _NEAR):
            raise TooLongError(f"{limit:,}") from None
        raise parts.wrong(error.msg, error.pos) from None
    if index - start > limit:
        raise TooLongError(f"{limit:,}")
    return name, value, parts.begin_again(index) if name == METADATA else index


class _Parts:
    """UTF-8 that is decoded in parts: one string could take four times its bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._decoder = getincrementaldecoder("utf-8")()
        #: Characters before this part.
        self._before = 0
        self.text = ""
        self.is_last = False

    def reach(self, index: int, size: int) -> int:
        """Have ``size`` characters from ``index`` on, or all, in this part. Returns the new index of the first."""
        while not self.is_last and len(self.text) - index < size:
            data = self._data[self._at : self._at + _PART]
            self._at += len(data)
            self.is_last = self._at == len(self._data)
            self._before += index
            self.text = self.text[index:] + self._decoder.decode(data, self.is_last)
            index = 0
        return index

    def begin_again(self, index: int) -> int:
        """Drop a part that has become long, and decode the text after ``index`` again."""
        self._at -= len(self.text[index:].encode()) + len(self._decoder.getstate()[0])
        self._decoder.reset()
        self._before += index
        self.text, self.is_last = "", False
        return self.reach(0, MAX_ENTRY)

    def skip(self, index: int) -> int:
        """The index of the next character that is not a space."""
        found = _SPACES.match(self.text, index)
        return found.end() if found else index

    def next(self, index: int, wanted: str) -> int:
        """The index of the next character, which must be ``wanted``."""
        index = self.skip(index)
        if not self.text.startswith(wanted, index):
            raise self.wrong(f"expecting {wanted!r}", index)
        return index

    def wrong(self, what: str, index: int) -> ValueError:
        return ValueError(f"{what}: char {self._before + index}")


def _strings_alone(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """None, which takes no memory, for an object that has other values than strings."""
    return unique_keys(pairs) if all(isinstance(value, str) for _, value in pairs) else None


_any_value = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode
_strings = json.JSONDecoder(object_pairs_hook=_strings_alone).raw_decode
