"""The GGUF format: numbers of types, key-values as data, and a cursor over the bytes of a header.

Source: ggml's docs/gguf.md and ggml.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardmerge.errors import FormatError

#: Number of a tensor's type → its name in ggml.h.
TYPES: Mapping[int, str] = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 6)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"), 16)),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), 24)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
#: Types that can be written → ``general.file_type`` of a file with mostly matrices of this type (``llama_ftype``).
FILE_TYPES: Mapping[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "BF16": 32,
}
#: Types that can be written → their numbers.
TYPE_CODES: Mapping[str, int] = {name: number for number, name in TYPES.items() if name in FILE_TYPES}
#: ``output.quantization`` → the type of most matrices.
QUANTIZATIONS: Mapping[str, str] = {name.lower(): name for name in TYPE_CODES}

#: Bytes; tensor data, and each tensor in it, starts at a multiple.
ALIGNMENT = 32

#: Number of a value's type, and for scalars → their format for `struct`.
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: Mapping[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
#: Bytes that a `Cursor` reads at once.
CHUNK = 1 << 20

Scalar = int | float | bool | str | bytes
#: ``read(offset, size)`` returns up to ``size`` bytes.
Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key and its value. ``kind``, of a tuple that of its items, is ``u32``, ``i32``, ``f32``, ``bool`` or ``str``.

    A string may be bytes: tokens are not always UTF-8.
    """

    key: str
    kind: str
    value: Scalar | tuple[Scalar, ...]


def padded(nbytes: int) -> int:
    """``nbytes``, rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Cursor:
    """Reads a header, which ends before byte ``end``, in chunks. `FormatError` if it is not complete.

    A count is used only after a check that the file has that many bytes.
    """

    def __init__(self, read: Read, end: int, where: str) -> None:
        self.where = where
        self._read, self._end = read, end
        self._chunk, self._used, self._start = b"", 0, 0

    @property
    def at(self) -> int:
        return self._start + self._used

    def take(self, count: int) -> bytes:
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
        """The `struct` format of a scalar."""
        if kind not in SCALARS:
            raise FormatError(f"{self.where}: a value of type {kind} at byte {self.at}, which is unknown")
        return f"<{SCALARS[kind]}"

    def _check(self, count: int, end: int | None = None) -> None:
        if count > (self._end if end is None else end) - self.at:
            raise FormatError(f"{self.where}: its header is not complete at byte {self.at}")
