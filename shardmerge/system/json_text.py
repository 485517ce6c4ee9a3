"""Parses JSON of untrusted files: bytes, memory and nesting are bounded, contradictions are refused."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardmerge.system.regular_files import read_small

#: Bytes of a config. A million token ids fit.
MAX_BYTES = 10_000_000
#: Estimated bytes of memory for parsing. A million numbers fit, and 300,000 names with a file for each.
MAX_MEMORY = 200_000_000
#: Depth of nested objects and lists. Real files have five; other code may recurse.
MAX_DEPTH = 100
#: Bytes of memory for each byte of text: the text, the decoded text, and its strings (wider if not ASCII).
_ASCII, _WIDE = 3, 6
#: Bytes of memory for each item, key, and list or object; measured with Python 3.11.
_ITEM, _KEY, _INSIDE = 65, 165, 20


class JsonError(ValueError):
    """A problem with a text; its message follows the name of the file."""


class NotJsonError(JsonError):
    """The text is not JSON."""


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice; the message is the key."""


def parse(
    text: bytes | bytearray,
    limit: int = MAX_BYTES,
    memory: int = MAX_MEMORY,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """The value of a JSON text of at most ``limit`` bytes that takes about ``memory`` bytes at most.

    ``NaN`` and ``Infinity`` are not JSON, but real configs have them. ``constant`` converts them, or raises a
    `ValueError`; without it they are floats. A key may be repeated only with the same value. Raises `JsonError`.
    """
    if len(text) > limit:
        raise JsonError(f"is over {limit:,} bytes long; expected less")
    if (size := bytes_in_memory(text)) > memory:
        raise JsonError(
            f"would take about {size // 1_000_000:,} MB of memory to read; the limit is {memory // 1_000_000:,} MB; "
            "expected fewer entries"
        )
    try:
        value = json.loads(text, object_pairs_hook=_without_contradiction, parse_constant=constant)
        if b"\\u" in text:  # half of a surrogate pair could not be stored again
            json.dumps(value, ensure_ascii=False).encode()
    except DuplicateKeyError as error:
        raise JsonError(f"has the key {error} twice, and not with the same value; remove one") from None
    except (ValueError, RecursionError) as error:
        raise NotJsonError(f"is not JSON: {error}") from None
    if _depth(value) > MAX_DEPTH:
        raise JsonError(f"has objects and lists nested over {MAX_DEPTH} deep; expected less")
    return value


def parse_object(
    text: bytes | bytearray,
    limit: int = MAX_BYTES,
    memory: int = MAX_MEMORY,
    constant: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """`parse` for a text that must be a JSON object."""
    value = parse(text, limit, memory, constant)
    if not isinstance(value, dict):
        raise JsonError("is not a JSON object")
    return value


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object of a local file. Raises `JsonError`, or `OSError` if it cannot be read."""
    return parse_object(read_small(path, limit), limit)


def bytes_in_memory(text: bytes | bytearray) -> int:
    """About the most bytes that parsing takes, with the text itself.

    Python's objects take up to thirty times their text. They are counted by the characters between values; the same
    characters inside of strings count, too.
    """
    keys, inside = text.count(b":"), text.count(b"{") + text.count(b"[")
    return (
        len(text) * (_ASCII if text.isascii() else _WIDE)
        + text.count(b",") * _ITEM
        + keys * _KEY
        + inside * (_ITEM + _INSIDE)
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook``: ``json`` would silently drop a duplicate key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(reprlib.repr(keys.most_common(1)[0][0]))
    return result


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs) or all(result[key] == value for key, value in pairs):
        return result
    return unique_keys(pairs)


def _depth(value: Any) -> int:
    """The depth of nested objects and lists, up to `MAX_DEPTH` + 1."""
    depth, level = 0, [value] if isinstance(value, (dict, list)) else []
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in inner if isinstance(item, (dict, list))]
    return depth
