"""safetensors headers that must be refused, and what the message must say."""

from __future__ import annotations

import json
from typing import Any

from shardmerge.file_formats.safetensors_header import (
    MAX_HEADER_BYTES,
    Metadata,
    read_header,
)
from shardmerge.spec.tensors import TensorInfo

WHERE = "some/file.safetensors"

ONE: dict[str, Any] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def entry(**changes: Any) -> dict[str, Any]:
    """A well-formed entry of one byte with something else in it; a change to ``...`` leaves a key out."""
    return {key: value for key, value in {**ONE, **changes}.items() if value is not ...}


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A file of a header, given as bytes or as what its JSON says, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def parse(raw: bytes) -> tuple[Metadata, dict[str, TensorInfo], int]:
    return read_header(lambda offset, size: raw[offset : offset + size], len(raw), WHERE)


def f32(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


DEEP = b'{"a":' + b"[" * 100_000

REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["0 bytes long", "too short"]),
    "seven bytes": (b"1234567", ["7 bytes long", "too short"]),
    "length above the limit": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
        [str(MAX_HEADER_BYTES + 1), str(MAX_HEADER_BYTES), "not a safetensors file"],
    ),
    "text instead of a length": (b"some lines of a text", ["not a safetensors file"]),
    "header ends after the file": (raw_file({"a": ONE})[:-1], ["the header ends at byte", "cut?"]),
    "not JSON": (raw_file(b"{no json}"), ["the header is not JSON"]),
    "not UTF-8": (raw_file(b'{"\xff":{}}'), ["the header is not JSON"]),
    "nested too deeply": (raw_file(DEEP), ["the header is not JSON"]),
    "empty header": (raw_file(b""), ["the header is not JSON"]),
    "a list": (raw_file([ONE]), ["not a JSON object"]),
    "begins with a space": (raw_file(b" {}"), ["not a JSON object"]),
    "a name twice": (raw_file(b'{"a":1,"b":2,"a":3}'), ["names 'a' twice"]),
    "a key of an entry twice": (raw_file(b'{"a":{"dtype":"U8","dtype":"I8"}}'), ["names 'dtype' twice"]),
    "metadata is a list": (raw_file({"__metadata__": ["a"]}), ["__metadata__ must map strings to strings"]),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), ["__metadata__ must map strings to strings"]),
    "an entry that is a list": (raw_file({"a": []}), ["entry of 'a' must have dtype, shape and data_offsets"]),
    "no dtype": (raw_file({"a": entry(dtype=...)}, b"x"), ["entry of 'a' must have dtype"]),
    "no shape": (raw_file({"a": entry(shape=...)}, b"x"), ["entry of 'a' must have dtype"]),
    "no offsets": (raw_file({"a": entry(data_offsets=...)}, b"x"), ["entry of 'a' must have dtype"]),
    "unknown dtype": (raw_file({"a": entry(dtype="F7")}, b"x"), ["'a'", "unknown dtype 'F7'", "BF16"]),
    "dtype that is not a string": (raw_file({"a": entry(dtype=["F32"])}, b"x"), ["unknown dtype ['F32']"]),
    "shape that is not a list": (raw_file({"a": entry(shape=1)}, b"x"), ["'a' has the shape 1"]),
    "negative size": (raw_file({"a": entry(shape=[-1])}, b"x"), ["'a' has the shape [-1]"]),
    "size true": (raw_file({"a": entry(shape=[True])}, b"x"), ["'a' has the shape [True]"]),
    "size 1.0": (raw_file({"a": entry(shape=[1.0])}, b"x"), ["'a' has the shape [1.0]"]),
    "size of 2**63": (raw_file({"a": entry(shape=[1 << 63])}, b"x"), ["not a list of sizes"]),
    "three offsets": (raw_file({"a": entry(data_offsets=[0, 1, 2])}, b"x"), ["'a'", "not a pair of offsets"]),
    "negative offset": (raw_file({"a": entry(data_offsets=[-1, 0])}, b"x"), ["[-1, 0]", "not a pair of offsets"]),
    "offsets of text": (raw_file({"a": entry(data_offsets=["0", "1"])}, b"x"), ["not a pair of offsets"]),
    "offsets that are not list": (raw_file({"a": entry(data_offsets=1)}, b"x"), ["not a pair of offsets"]),
    "a hole at the start": (raw_file({"a": entry(data_offsets=[1, 2])}, b"xy"), ["'a'", "leaves a hole before it"]),
    "a hole between": (
        raw_file({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, bytes(12)),
        ["'b' starts at data byte 8 where 4 was expected", "leaves a hole"],
    ),
    "an overlap": (
        raw_file({"a": f32([2], 0, 8), "b": f32([1], 4, 8)}, bytes(8)),
        ["'b' starts at data byte 4 where 8 was expected", "overlaps"],
    ),
    "too few bytes for the shape": (
        raw_file({"a": f32([2, 3], 0, 20)}, bytes(20)),
        ["'a' is F32 of shape [2, 3], which takes 24 bytes", "[0, 20] hold 20"],
    ),
    "offsets the wrong way round": (raw_file({"a": entry(data_offsets=[0, 0])}, b""), ["takes 1 bytes", "hold 0"]),
    "a size beyond all files": (raw_file({"a": f32([1 << 62] * 3, 0, 4)}, bytes(4)), ["'a'", "F32 of shape"]),
    "half a byte": (raw_file({"a": entry(dtype="F4", shape=[3])}, b"x"), ["'a'", "does not fill whole bytes"]),
    "data cut": (raw_file({"a": f32([2], 0, 8)}, bytes(7)), ["take 8 bytes", "holds 7", "the file was cut"]),
    "data too long": (raw_file({"a": f32([2], 0, 8)}, bytes(9)), ["holds 9", "bytes follow that no tensor owns"]),
    "data without tensors": (raw_file({}, b"x"), ["take 0 bytes", "holds 1"]),
    # The library refuses these two as well; Python's json guesses encodings, and takes half a surrogate pair.
    "UTF-16": (raw_file(json.dumps({"a": ONE}).encode("utf-16-le"), b"x"), ["the header is not JSON"]),
    "a name of two lines": (raw_file({"a\nb": ONE}, b"x"), [r"the name 'a\nb' has characters that cannot be shown"]),
    "a name that is a command": (raw_file({"a\x9b2J": ONE}, b"x"), [r"the name 'a\x9b2J' has characters"]),
    "a name that turns": (raw_file({"a\u202e": ONE}, b"x"), [r"the name 'a\u202e' has characters"]),
    "half a surrogate pair": (raw_file({"a\ud800": ONE}, b"x"), [r"\ud800"]),
}
