"""The one reader of JSON in untrusted files: bytes, memory and nesting are bounded, contradictions are refused."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardmerge.system.regular_files import read_small

#: Bytes of a config; a million token numbers fit.
MAX_BYTES = 10_000_000
#: Bytes of memory that reading takes, estimated; a million numbers fit, and 300,000 names with a file for each.
MAX_MEMORY = 200_000_000
#: Objects and lists inside each other. Real files have five; code that walks through them may recurse for each.
MAX_DEPTH = 100
#: Bytes of memory for each byte of text: the text itself, the decoded text, and its strings (wider where not ASCII).
_ASCII, _WIDE = 3, 6
#: The same for each item, key, and list or object; measured with Python 3.11.
_ITEM, _KEY, _INSIDE = 65, 165, 20


class JsonError(ValueError):
    """What is wrong with a text; the message follows the name of its file."""


class NotJsonError(JsonError):
    """The text is not JSON at all."""


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice; the key is the message."""


def parse(
    text: bytes | bytearray,
    limit: int = MAX_BYTES,
    memory: int = MAX_MEMORY,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """The value of a JSON text of at most ``limit`` bytes, which takes about ``memory`` bytes at most. `JsonError`.

    ``NaN`` and ``Infinity`` are not JSON, but Python writes them, and real configs have them. ``constant`` converts
    them, or raises a `ValueError`; without it they are floats. A key may be repeated with the same value only.
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
        if b"\\u" in text:  # it may hold half of a surrogate pair, which cannot be stored again
            json.dumps(value, ensure_ascii=False).encode()
    except DuplicateKeyError as error:
        raise JsonError(f"has the key {error} twice, and not with the same value; remove one") from None
    except (ValueError, RecursionError) as error:
        raise NotJsonError(f"is not JSON: {error}") from None
    if _depth(value) > MAX_DEPTH:
        raise JsonError(f"has over {MAX_DEPTH} objects and lists inside each other; expected less")
    return value


def parse_object(
    text: bytes | bytearray,
    limit: int = MAX_BYTES,
    memory: int = MAX_MEMORY,
    constant: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """The same of a text that must be a JSON object."""
    value = parse(text, limit, memory, constant)
    if not isinstance(value, dict):
        raise JsonError("holds no JSON object")
    return value


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file of this machine. `JsonError`, or `OSError` where the file cannot be read."""
    return parse_object(read_small(path, limit), limit)


def bytes_in_memory(text: bytes | bytearray) -> int:
    """About the most that reading this JSON takes, the text itself included.

    Python's objects take up to thirty times the text that they were read from. They are counted by what stands between
    values; the same characters inside strings count too, which is little in what people write.
    """
    keys, inside = text.count(b":"), text.count(b"{") + text.count(b"[")
    return (
        len(text) * (_ASCII if text.isascii() else _WIDE)
        + text.count(b",") * _ITEM
        + keys * _KEY
        + inside * (_ITEM + _INSIDE)
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook``: of a key that is given twice, ``json`` would drop one silently."""
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
    """How many objects and lists are inside each other, `MAX_DEPTH` + 1 at most."""
    depth, level = 0, [value] if isinstance(value, (dict, list)) else []
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in inner if isinstance(item, (dict, list))]
    return depth
