"""The numbers by which a GGUF file names the types of its tensors, and of itself.

Source: ggml's gguf.md and ggml.h; the numbers are those of the file format and never change.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The number that a tensor's entry in the file carries.
TYPE_CODES: Mapping[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "BF16": 30,
}
#: ``general.file_type`` of a file whose matrices are mostly of this type (llama.cpp's ``llama_ftype``).
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

#: ``output.quantization`` → the type of most matrices.
QUANTIZATIONS: Mapping[str, str] = {name.lower(): name for name in TYPE_CODES}

#: Where tensor data begins in the file, and each tensor in it, is a multiple of this many bytes.
ALIGNMENT = 32


def padded(nbytes: int) -> int:
    """Bytes up to the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
