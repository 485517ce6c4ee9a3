"""How much memory a stranger's JSON takes, before it is read.

Python's objects take up to thirty times the text that they were read from. They are counted by what stands between
values; what stands so within texts counts, too, which is little in what people write.
"""

from __future__ import annotations

#: Of what a plan reads whole; a million numbers fit, and three hundred thousand names with a file for each.
MAX_BYTES = 200_000_000
#: For each of a text's bytes: itself, the text decoded, and the strings in it, of a letter's size where it is ASCII.
_ASCII, _WIDE = 3, 6
#: For each item, key, and list or object; measured with Python 3.11.
_ITEM, _KEY, _INSIDE = 65, 165, 20


def bytes_in_memory(text: bytes) -> int:
    """About the most that reading this JSON takes, the text itself included."""
    keys, inside = text.count(b":"), text.count(b"{") + text.count(b"[")
    return (
        len(text) * (_ASCII if text.isascii() else _WIDE)
        + text.count(b",") * _ITEM
        + keys * _KEY
        + inside * (_ITEM + _INSIDE)
    )


def too_large(text: bytes, limit: int = MAX_BYTES) -> str:
    """What is said of JSON that takes more than ``limit`` bytes; empty where it takes no more."""
    size = bytes_in_memory(text)
    if size <= limit:
        return ""
    return f"would take about {size // 1_000_000:,} MB of memory to read; the limit is {limit // 1_000_000:,} MB"
