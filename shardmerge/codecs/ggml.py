"""GGML's types, as GGUF files hold them: output formats only.

Values are rounded first as in a merged checkpoint: so the file is the one that converting that checkpoint would make.
Settings of an encoding:

- ``through``: the codec of that checkpoint's floats;
- ``shuffle`` (g, a, b): rows seen as (g, a, b) are the file's rows seen as (g, b, a);
- ``addend``: added in float32, or in float16 where values go through F16;
- ``seed``, of stochastic rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from shardmerge.codecs.codec import Codec, CodecMemory, Output, ReadPart, TileSlot
from shardmerge.codecs.floats import FLOATS, OVERFLOW
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, DTYPE_NAMES, Encoding, RowRange, tensor_nbytes

if TYPE_CHECKING:
    from torch import Tensor

#: Elements and bytes of a block of a row.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
}
#: Allocated by a thread to make blocks of a tile of 512 KiB. Measured with 1 to 4 threads.
_BETWEEN_BYTES = 1 << 20
#: d is a fraction of the largest magnitude of a block. m, which Q4_1 and Q5_1 have too, is not.
_LEVELS = {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16}
_THROUGH = {codec.name: codec for codec in FLOATS}


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. ``ValueError`` where its rows are not whole blocks."""
    block, size = BLOCKS[kind]
    if block > 1 and not fits(kind, shape):
        raise ValueError(f"{kind} holds rows of a multiple of {block} elements; this shape is {shape}")
    return math.prod(shape) // block * size


def fits(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether rows of this shape are whole blocks."""
    return bool(shape) and shape[-1] % BLOCKS[kind][0] == 0


def size_in(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file of this type, in which vectors are F32, and rows that are not whole blocks F16."""
    if len(shape) < 2:
        return tensor_nbytes("F32", shape)
    return nbytes(kind if fits(kind, shape) else "F16", shape)


class Ggml(Codec):
    """A type of GGML."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"ggml-{kind}"
        self.holds_blocks = BLOCKS[kind][0] > 1

    @property
    def holds_infinity(self) -> bool:  # type: ignore[override]
        return not self.holds_blocks

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        return (Output("values", name, self.kind, shape, nbytes(self.kind, shape)),)

    def row_unit(self, encoding: Encoding) -> int:
        shuffle = encoding.setting("shuffle")
        return int(shuffle[1] * shuffle[2]) if shuffle else 1

    def stochastic(self, encoding: Encoding, seed: int) -> Encoding | None:
        dtype = _through(encoding).values
        through = _THROUGH[dtype].stochastic(Encoding(dtype), seed)
        assert through is not None, dtype
        settings = {**dict(encoding.settings), **dict(through.settings), "through": through.codec}
        return dataclasses.replace(encoding, settings=tuple(settings.items()))

    def keeps(self, tensor: TensorPlan) -> bool:
        encoding = tensor.encoding
        assert encoding is not None
        is_plain = not encoding.setting("shuffle") and not encoding.setting("addend")
        dtypes = {self.kind, _through(encoding).values, tensor.source.dtype}
        return is_plain and len(dtypes) == 1 and tensor.decoding is None

    def rounds_to(self, tensor: TensorPlan) -> str:
        return _through(tensor.encoding).values

    def largest(self, tensor: TensorPlan) -> float:
        through = _through(tensor.encoding)
        limit = overflow_limit(self.kind)
        if limit >= OVERFLOW[through.values]:
            return through.largest(tensor)
        # The limit before values are rounded, which may round some up to it.
        return _least_that_rounds_up(limit, through.values, is_stochastic=through.name != through.values)

    def too_large(self, tensor: TensorPlan, value: float) -> tuple[str, str]:
        what = f"{DTYPE_NAMES[self.rounds_to(tensor)]} in {self.kind}"
        return what, "Another output.dtype or output.quantization may hold it"

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        through = _through(tensor.encoding)
        element = max(DTYPE_BITS[dtype] for dtype in (tile_dtype, through.values, "F32")) // 8
        between = _BETWEEN_BYTES if self.holds_blocks else 0
        return CodecMemory(element, between + through.memory(tensor, tile_dtype).between)

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """Each step writes to the half of the memory that the step before has not filled: the scratch is free now."""
        import torch

        from shardmerge.codecs import ggml_blocks
        from shardmerge.codecs.rounding import TORCH_DTYPES, is_below, seen_as

        encoding, shape = slot.tensor.encoding, tile.shape
        if not slot.is_checked and not is_below(tile, self.largest(slot.tensor)):
            return False
        through = _through(encoding)
        here, free = slot.halves()
        merged = tile
        if TORCH_DTYPES[through.values] != tile.dtype:
            here, free, merged = free, here, seen_as(free, through.values, shape)
            through.encode(slot, tile, merged)
        values = ggml_blocks.arrange(encoding, merged, seen_as(free, "F32", shape))
        scratch = free if values is merged else here
        out = target.view(-1).view(torch.uint8)
        ggml_blocks.quantize_into(out, values, self.kind, seen_as(scratch, "F32", shape))
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """Half a step of a block, or a whole one next to the end of the levels, and what rounding d and m costs."""
        from shardmerge.codecs import rounding

        through = _through(encoding).rounding_bound(encoding, values, rows, part)
        if not self.holds_blocks:
            return through + rounding.half_unit(values.abs() + through, self.kind)
        blocks = values.view(-1, BLOCKS[self.kind][0])
        levels = {"Q4_1": 15, "Q5_1": 31}.get(self.kind)
        if levels is None:
            span, levels = blocks.abs().amax(-1, keepdim=True), _LEVELS[self.kind]
            off = rounding.half_unit(span / levels, "F16") * levels
            step = span / levels * (0.5 if self.kind == "Q8_0" else 1.0)
        else:
            low = blocks.amin(-1, keepdim=True)
            span = blocks.amax(-1, keepdim=True) - low
            off = rounding.half_unit(span / levels, "F16") * levels + rounding.half_unit(low.abs(), "F16")
            step = span / levels * 0.5
        within = (step + off).expand_as(blocks).reshape(values.shape)
        return within * (1 + 2.0**-18) + 2 * through


def _through(encoding: Encoding | None) -> Codec:
    return _THROUGH[encoding.setting("through", "F32") if encoding else "F32"]


def overflow_limit(kind: str) -> float:
    """The least magnitude that type ``kind`` may be unable to hold: it, or its block's d or m, becomes infinite."""
    if BLOCKS[kind][0] == 1:
        return math.inf if kind == "F32" else OVERFLOW[kind]
    return OVERFLOW["F16"] * _LEVELS.get(kind, 1)


def _least_that_rounds_up(limit: float, dtype: str, is_stochastic: bool) -> float:
    """The least magnitude that may become ``limit``, or more, by rounding it to ``dtype``."""
    bits = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}[dtype]
    unit = 2.0 ** (math.frexp(math.nextafter(limit, 0.0))[1] - bits)
    below = math.ceil(limit / unit) * unit - unit
    return math.nextafter(below, math.inf) if is_stochastic else below + unit / 2


GGML: tuple[Codec, ...] = tuple(Ggml(kind) for kind in BLOCKS)
