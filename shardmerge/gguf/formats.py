"""Key-values of a GGUF file as data, and the numbers by which it names the types of its tensors and of itself.

Source: ggml's gguf.md and ggml.h; the numbers are those of the file format and never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The numbers that a tensor's entry in a file may carry, by their names in ggml.h.
TYPES: Mapping[int, str] = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), 6)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"), 16)),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), 24)),
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
#: ``general.file_type`` of a file whose matrices are mostly of this type (llama.cpp's ``llama_ftype``); these are
#: the types that can be written.
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
#: The number of a type that can be written.
TYPE_CODES: Mapping[str, int] = {name: number for number, name in TYPES.items() if name in FILE_TYPES}
#: ``output.quantization`` → the type of most matrices.
QUANTIZATIONS: Mapping[str, str] = {name.lower(): name for name in TYPE_CODES}

#: Where tensor data begins in the file, and each tensor in it, is a multiple of this many bytes.
ALIGNMENT = 32

Scalar = int | float | bool | str | bytes


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key and its value; ``kind`` is ``u32``, ``i32``, ``f32``, ``bool`` or ``str``, of a tuple that of its items.

    A string may be bytes: tokens are not always UTF-8.
    """

    key: str
    kind: str
    value: Scalar | tuple[Scalar, ...]


def padded(nbytes: int) -> int:
    """Bytes up to the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
