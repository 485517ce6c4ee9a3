"""Writes the header of a GGUF file, version 3, little-endian.

    magic, version, number of tensors, number of key-values
    each key-value:  key, type, value
    each tensor:     name, number of dimensions, dimensions (columns first), type, offset
    padding to 32 bytes; then the data of each tensor at its offset, padded to 32 bytes

A string is its length (u64) and its bytes; an array is the type of its items, their number and the items.
Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from shardmerge.gguf.formats import ARRAY, SCALARS, STRING, TYPE_CODES, KeyValue, Scalar, padded
from shardmerge.gguf.layout import OutputTensor

_MAGIC, _VERSION = b"GGUF", 3
#: `KeyValue.kind` → number of the type.
_KINDS: Mapping[str, int] = {"u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": STRING}


def encode_header(values: Sequence[KeyValue], tensors: Sequence[OutputTensor]) -> bytes:
    """All bytes before the tensor data, padding included.

    ``ValueError`` if a value does not fit its type, or if two tensors or keys have one name.
    """
    _check_names("key", [value.key for value in values])
    _check_names("tensor", [tensor.name for tensor in tensors])
    head = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(values)))
    for value in values:
        head += _string(value.key)
        head += _value(value)
    for tensor in tensors:
        head += _string(tensor.name)
        head += struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", TYPE_CODES[tensor.kind], tensor.offset)
    return bytes(head.ljust(padded(len(head)), b"\0"))


def unencodable(values: Sequence[KeyValue]) -> list[str]:
    """Problems with the values that `encode_header` would refuse."""
    problems = []
    for value in values:
        try:
            _value(value)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _check_names(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the {what} {twice!r} occurs twice")


def _value(value: KeyValue) -> bytes:
    code = _KINDS[value.kind]
    try:
        if not isinstance(value.value, tuple):
            return struct.pack("<I", code) + _items(value.kind, (value.value,))
        items = value.value
        return struct.pack("<IIQ", ARRAY, code, len(items)) + _items(value.kind, items)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"{value.key}: a value is not a valid {value.kind}: {error}") from None


def _items(kind: str, items: Sequence[Scalar]) -> bytes:
    if kind == "str":
        return b"".join(_string(item) for item in items if isinstance(item, (str, bytes)))
    return struct.pack(f"<{len(items)}{SCALARS[_KINDS[kind]]}", *items)


def _string(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content
