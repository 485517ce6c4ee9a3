"""F64, F32, F16 and BF16, rounded once, to nearest (ties to even) or stochastically."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from shardmerge.codecs.codec import Codec, CodecMemory, Output, ReadPart, TileSlot
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_NAMES, FLOAT_DTYPES, Encoding, RowRange, tensor_nbytes

if TYPE_CHECKING:
    from torch import Tensor

#: The least magnitude that rounds to infinity: half a unit above the largest finite number.
OVERFLOW: Mapping[str, float] = {
    "F64": math.inf,
    "F32": 2.0**128 - 2.0**103,
    "F16": 65520.0,
    "BF16": 2.0**128 - 2.0**119,
}
_LARGEST_FINITE: Mapping[str, float] = {"F32": 2.0**128 - 2.0**104, "F16": 65504.0, "BF16": 2.0**128 - 2.0**120}
#: Allocated by a thread to round a tile of 512 KiB from float64 to 16 bits, or stochastically. Measured with 1 to 8.
_BETWEEN_BYTES = 1 << 20
_STOCHASTIC_BYTES = 3 << 19


class Float(Codec):
    """A dtype of floats, rounded to nearest."""

    holds_infinity = True
    on_device = True
    is_plain = True

    def __init__(self, dtype: str) -> None:
        self.name = self.values = dtype

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        return (Output("values", name, self.values, shape, tensor_nbytes(self.values, shape)),)

    def stochastic(self, encoding: Encoding, seed: int) -> Encoding | None:
        if self.values == "F64":  # no tile is wider
            return None
        return Encoding(f"stochastic-{self.values}", (("seed", seed),), encoding.row_dims)

    def keeps(self, tensor: TensorPlan) -> bool:
        return tensor.decoding is None and tensor.source.dtype == tensor.out.dtype

    def largest(self, tensor: TensorPlan) -> float:
        return OVERFLOW[self.values]

    def too_large(self, tensor: TensorPlan, value: float) -> tuple[str, str]:
        wider = [DTYPE_NAMES[dtype] for dtype in FLOAT_DTYPES if abs(value) < OVERFLOW[dtype]]
        hint = f"output.dtype: {' or '.join(wider)} holds it" if wider else "No output dtype holds it"
        return DTYPE_NAMES[self.values], hint

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        is_in_two_steps = tile_dtype == "F64" and self.values in ("F16", "BF16")
        return CodecMemory(between=_BETWEEN_BYTES if is_in_two_steps else 0)

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        tile.copy_(stored)

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        from shardmerge.codecs import rounding

        rounding.encode_into(target, tile)
        return rounding.is_finite(target)

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        from shardmerge.codecs import rounding

        return rounding.half_unit(values.abs(), self.values)


class StochasticFloat(Float):
    """A dtype of floats, rounded stochastically where it is narrower than the tile. Setting: ``seed``."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.name = f"stochastic-{dtype}"

    def largest(self, tensor: TensorPlan) -> float:
        """A value above the largest finite number may be rounded up to an infinity."""
        return math.nextafter(_LARGEST_FINITE[self.values], math.inf)

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        return CodecMemory(between=_STOCHASTIC_BYTES)

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        from shardmerge.codecs import rounding, stochastic

        if target.element_size() >= tile.element_size():
            return super().encode(slot, tile, target)
        assert slot.tensor.encoding is not None
        stochastic.encode_into(target, tile, slot.tensor.encoding.setting("seed"), slot.tensor.source.name, slot.rows)
        return rounding.is_finite(target)

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """A whole unit of the last place."""
        return super().rounding_bound(encoding, values, rows, part).mul_(2)


FLOATS: tuple[Codec, ...] = (
    *(Float(dtype) for dtype in OVERFLOW),
    *(StochasticFloat(dtype) for dtype in _LARGEST_FINITE),
)
