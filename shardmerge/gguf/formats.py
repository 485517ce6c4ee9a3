"""What GGML calls its tensor types and file types, and how many bytes a row takes.

Source: ggml's gguf.md and ggml.h; the numbers are those of the file format and never change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.spec.tensors import BLOCKS, row_nbytes


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of tensor data: ``nbytes`` for every ``block`` elements of a row."""

    name: str
    #: The number that a tensor's entry in the file carries.
    code: int
    #: Elements of a block. Blocks run along a row, so a row's length is a multiple of it.
    block: int
    #: Bytes of a block.
    nbytes: int
    #: ``general.file_type`` of a file whose matrices are mostly of this type (llama.cpp's ``llama_ftype``).
    file_type: int

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of this shape are whole blocks."""
        return bool(shape) and shape[-1] % self.block == 0

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape. ``ValueError`` where rows are not whole blocks."""
        elements = math.prod(shape)
        if self.block > 1 and not self.fits(shape):
            raise ValueError(f"{self.name} holds rows of a multiple of {self.block} elements; this shape is {shape}")
        return elements // self.block * self.nbytes


TYPES: Mapping[str, GgmlType] = {
    kind.name: kind
    for kind in (
        GgmlType("F32", 0, 1, row_nbytes("F32", 1), 0),
        GgmlType("F16", 1, 1, row_nbytes("F16", 1), 1),
        GgmlType("Q4_0", 2, *BLOCKS["Q4_0"], 2),
        GgmlType("Q4_1", 3, *BLOCKS["Q4_1"], 3),
        GgmlType("Q5_0", 6, *BLOCKS["Q5_0"], 8),
        GgmlType("Q5_1", 7, *BLOCKS["Q5_1"], 9),
        GgmlType("Q8_0", 8, *BLOCKS["Q8_0"], 7),
        GgmlType("BF16", 30, 1, row_nbytes("BF16", 1), 32),
    )
}

#: ``output.quantization`` → the type of most matrices.
QUANTIZATIONS: Mapping[str, str] = {name.lower(): name for name in TYPES}

#: Where tensor data begins in the file, and each tensor in it, is a multiple of this many bytes.
ALIGNMENT = 32


def padded(nbytes: int) -> int:
    """Bytes up to the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
