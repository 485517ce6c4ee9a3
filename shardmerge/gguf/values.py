"""Key-values of a GGUF file, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: GGUF's types of values → (number in the file, format of `struct`).
SCALARS: Mapping[str, tuple[int, str]] = {
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
}
STRING, ARRAY = 8, 9

Scalar = int | float | bool | str | bytes


@dataclass(frozen=True, slots=True)
class KeyValue:
    """``kind`` is a key of `SCALARS` or ``str``, or with a tuple as ``value`` what its items are.

    A string may be bytes: tokens are not always UTF-8.
    """

    key: str
    kind: str
    value: Scalar | tuple[Scalar, ...]
