"""Weights that bitsandbytes stores in 4 bits: NF4 and FP4, with absmax as it is or quantised once more.

``weight`` has the codes of the matrix, row by row, two in a byte, the first in the upper half; it is stored as a column
of uint8, or of another dtype of the same bytes. A value is float32(quant_map[code] · absmax), with one absmax for every
64 values: where a row is not a multiple of that, a block reaches into the next row. absmax is stored in float32, or as
``nested_quant_map[code] · nested_absmax + nested_offset``, in float32, with one nested_absmax for every 256. Shape,
block sizes and offset are in JSON, in the tensor ``weight.quant_state.bitsandbytes__nf4``.

Sources: bitsandbytes' ``functional.py`` (``QuantState``, ``dequantize_4bit``); Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shardmerge.codecs.bitsandbytes import METHOD, divide, refusal, vector
from shardmerge.codecs.codec import Output, ReadPart, StoredTensors, TileSlot
from shardmerge.codecs.grid_codec import GridCodec
from shardmerge.codecs.quantization import shard_of
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import DTYPE_BITS, Encoding, RowRange, TensorRef, Weight
from shardmerge.system import json_text

if TYPE_CHECKING:
    from torch import Tensor

#: The name of the tensor with the JSON is the weight's, this, and the type.
_STATE = ".quant_state.bitsandbytes__"
#: Bytes of that JSON, at most; real ones have some 200.
_STATE_BYTES = 4096
#: Values by code. A file has its own table, which must be this: bitsandbytes' kernels do not read the file's.
TABLES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
#: How much a file's value may be off from the table's, which is not a float32 itself.
_TABLE_TOLERANCE = 1e-6
_BLOCKS = tuple(1 << power for power in range(5, 13))
_NESTED_CODES = 256
#: What the codes of 4 bits may be stored as.
_STORAGE = ("U8", "I8", "F16", "BF16", "F32")

#: Multiplies or divides values by others, in place.
Scale = Callable[["Tensor", "Tensor"], object]


class Bnb4(GridCodec):
    """Settings: the ``kind`` of 4 bits, the values in a ``block``, the ``dtype`` that codes are stored as.

    ``nested`` are how many absmax share a nested_absmax, 0 where they are float32; ``state`` the bytes of quant_state;
    ``seed`` is that of stochastic rounding.
    """

    name = "bnb-4bit"
    title = "NF4 and FP4 of bitsandbytes, with double quantization or without"
    methods = (METHOD,)

    # --- planning -----------------------------------------------------------------------------------------------------

    def claims(self, tensors: StoredTensors, config: Mapping[str, Any]) -> Iterator[Weight | str]:
        states = [ref for name, ref in tensors.items() if _STATE in name]
        if not states:
            return
        if problem := refusal(config, states[0].name):
            yield problem
            return
        contents = tensors.contents([ref for ref in states if ref.dtype == "U8" and ref.nbytes <= _STATE_BYTES])
        for ref in states:
            name, _, kind = ref.name.partition(_STATE)
            try:
                yield self._claim(tensors, name, ref, _state(kind, contents.get(ref.name)))
            except ValueError as error:
                yield f"{name} is stored in 4 bits by {METHOD}, but {error}"

    def _claim(self, tensors: Mapping[str, TensorRef], name: str, state: TensorRef, said: Mapping[str, Any]) -> Weight:
        """The weight ``name``; `ValueError` where its tensors are not what its JSON says."""
        shape, block, nested = said["shape"], said["blocksize"], said.get("nested_blocksize", 0)
        values = tensors.get(name)
        if values is None or values.dtype not in _STORAGE:
            raise ValueError(f"its codes are {values.dtype if values else 'missing'}; expected is U8")
        if shape[-1] % 2 or shape[-1] // 2 % (DTYPE_BITS[values.dtype] // 8):
            raise ValueError(f"rows of {shape[-1]} values do not begin with an element of {values.dtype}")
        if values.shape != (expected := _stored_shape(values.dtype, shape)):
            raise ValueError(f"its codes are {list(values.shape)}; expected is {list(expected)}, for {list(shape)}")
        blocks = -(-math.prod(shape) // block)
        parts = [
            ("values", dataclasses.replace(values, dtype="U8", shape=shape)),
            ("absmax", vector(tensors, f"{name}.absmax", "U8" if nested else "F32", blocks)),
            ("quant_map", vector(tensors, f"{name}.quant_map", "F32", len(TABLES[said["quant_type"]]))),
            ("quant_state", state),
        ]
        if nested:
            parts += [
                ("nested_absmax", vector(tensors, f"{name}.nested_absmax", "F32", -(-blocks // nested))),
                ("nested_quant_map", vector(tensors, f"{name}.nested_quant_map", "F32", _NESTED_CODES)),
            ]
        elif f"{name}.nested_absmax" in tensors:
            raise ValueError(f"{state.name} does not mention {name}.nested_absmax")
        settings = {"kind": said["quant_type"], "block": block, "nested": nested, "dtype": values.dtype}
        if nested:
            settings["state"] = state.nbytes
        encoding = Encoding(self.name, tuple(settings.items()), len(shape) - 1)
        return Weight(name, tuple(parts), shard_of(values), encoding)

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The codes; all else stays as it is."""
        dtype = encoding.setting("dtype")
        return (Output("values", name, dtype, _stored_shape(dtype, shape), math.prod(shape) // 2),)

    # --- computing ----------------------------------------------------------------------------------------------------

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        import torch

        from shardmerge.codecs import grids, tables

        encoding = slot.tensor.decoding
        assert encoding is not None
        table, blocks = self._table(slot, encoding), _Blocks.of(encoding, slot.rows, tile.shape[1], slot.part)
        codes = stored.view(torch.uint8)
        for here in grids.slabs(tile):
            values = grids.float32_like(tile[here])
            tables.look_up_halves(codes[here], table, values, high_first=True)
            blocks.scale(torch.Tensor.mul_, values, slot.rows.start + here.start)
            if values.dtype != tile.dtype:
                tile[here] = values

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """The nearest code on the base's own grid, of two as near the lower; or one of the two neighbours."""
        import torch

        from shardmerge.codecs import grids, nearest, rounding

        if not slot.is_checked and not rounding.is_finite(tile):
            return False
        encoding = slot.tensor.encoding
        assert encoding is not None
        if slot.is_checked:
            tile.nan_to_num_()
        values, codes = _in_order(self._table(slot, encoding))
        bounds, blocks = nearest.middles(values, tile.dtype), _Blocks.of(encoding, slot.rows, tile.shape[1], slot.part)
        out = target.view(torch.uint8)
        for here, share in grids.shares(tile, slot):
            blocks.scale(divide, tile[here], slot.rows.start + here.start)
            places = nearest.count_below(bounds, tile[here])
            if share is not None:
                places = _neighbours(values, tile[here], share, places)
            _pack(places, codes, out[here])
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """Half of what the two neighbours are apart, stochastically all of it; and all of what is beyond the last."""
        import torch

        from shardmerge.codecs import grids

        table = part("quant_map", RowRange(0, len(TABLES[encoding.setting("kind")]))).tolist()
        grid = torch.tensor(_in_order(tuple(table))[0], dtype=torch.float64, device=values.device)
        blocks, scaled = _Blocks.of(encoding, rows, values.shape[1], part), values.clone()
        blocks.scale(divide, scaled, rows.start)
        above = torch.bucketize(scaled, grid).clamp_(1, len(grid) - 1)
        share = 0.5 if encoding.setting("seed") is None else 1.0
        bound = (grid[above] - grid[above - 1]).mul_(share * (1 + 2.0**-20)).add_(grids.ROUNDINGS)
        bound.add_((scaled - grid[-1]).clamp_(min=0)).add_((grid[0] - scaled).clamp_(min=0))
        dataclasses.replace(blocks, absmax=blocks.absmax.abs()).scale(torch.Tensor.mul_, bound, rows.start)
        # Where absmax is 0, so is every code.
        return bound.add_(torch.where(scaled == 0, values.abs(), 0.0))

    def _table(self, slot: TileSlot, encoding: Encoding) -> tuple[float, ...]:
        """The values of the codes, as the file has them."""
        known = TABLES[encoding.setting("kind")]
        table = tuple(slot.part("quant_map", RowRange(0, len(known))).tolist())
        if not all(math.isclose(*pair, rel_tol=_TABLE_TOLERANCE) for pair in zip(table, known, strict=True)):
            ref = next(ref for role, ref in slot.tensor.parts if role == "quant_map")
            raise FormatError(f"{ref.uri}: {ref.name} holds {table}, which is not {encoding.setting('kind')}'s table")
        return table


# --- what a checkpoint says -------------------------------------------------------------------------------------------


def _state(kind: str, content: bytes | None) -> Mapping[str, Any]:
    """A quant_state, in which shape and block sizes are what they can be; `ValueError` says what is wrong with it."""
    what = f"its quant_state ({kind!r:.100})"
    if content is None:
        raise ValueError(f"{what} is not U8 of at most {_STATE_BYTES:,} bytes")
    if kind not in TABLES:
        raise ValueError(f"{what} is of an unknown type; expected is {' or '.join(TABLES)}")
    try:
        said = json_text.parse_object(content, _STATE_BYTES)
    except json_text.JsonError as error:
        raise ValueError(f"{what} {error}") from None
    shape = said.get("shape")
    sizes = shape if isinstance(shape, list) and len(shape) in (2, 3) else [0]
    is_shape = all(type(size) is int and 0 < size < 1 << 32 for size in sizes)
    has_offset = isinstance(said.get("nested_offset"), float) and math.isfinite(said["nested_offset"])
    expected = [
        ("quant_type", said.get("quant_type") == kind, repr(kind)),
        ("shape", is_shape, "a list of two or three sizes"),
        ("blocksize", _is_block(said.get("blocksize")), "a power of two from 32 to 4096"),
    ]
    if any(key.startswith("nested_") for key in said):
        expected += [
            ("nested_blocksize", _is_block(said.get("nested_blocksize")), "a power of two from 32 to 4096"),
            ("nested_dtype", said.get("nested_dtype") == "float32", "'float32'"),
            ("nested_offset", has_offset, "a number"),
        ]
    for key, is_right, wanted in expected:
        if not is_right:
            raise ValueError(f"{what} has the {key} {said.get(key)!r:.100}; expected is {wanted}")
    return {**said, "shape": tuple(said["shape"])}


def _is_block(size: Any) -> bool:
    return type(size) is int and size in _BLOCKS


def _stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the codes of 4 bits in the file."""
    return math.prod(shape) // 2 // (DTYPE_BITS[dtype] // 8), 1


# --- arithmetic -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Blocks:
    """absmax of the blocks that some rows of a matrix reach into, in float32. ``first`` is the number of the first."""

    absmax: Tensor
    first: int
    block: int

    @classmethod
    def of(cls, encoding: Encoding, rows: RowRange, columns: int, part: ReadPart) -> _Blocks:
        import torch

        block, nested = encoding.setting("block"), encoding.setting("nested")
        blocks = RowRange(rows.start * columns // block, -(-rows.stop * columns // block))
        absmax = part("absmax", blocks)
        if nested:
            groups = RowRange(blocks.start // nested, (blocks.stop - 1) // nested + 1)
            of_group = part("nested_absmax", groups)
            group = torch.arange(blocks.start, blocks.stop, device=absmax.device) // nested - groups.start
            offset = _offset(bytes(part("quant_state", RowRange(0, encoding.setting("state"))).tolist()))
            values = part("nested_quant_map", RowRange(0, _NESTED_CODES))
            absmax = values[absmax.long()].mul_(of_group[group]).add_(offset)
        return cls(absmax, blocks.start, block)

    def scale(self, by: Scale, values: Tensor, first_row: int) -> None:
        """Multiply or divide the values of rows from the first on by their absmax, in place."""
        flat, start = values.view(-1), first_row * values.shape[1]
        absmax = self.absmax[start // self.block - self.first :].to(values.dtype)
        head = min(len(flat), -start % self.block)  # of a block that begins in a row before
        if head:
            by(flat[:head], absmax[0])
            flat, absmax = flat[head:], absmax[1:]
        whole = len(flat) // self.block
        if whole:
            by(flat[: whole * self.block].view(-1, self.block), absmax[:whole, None])
        if len(flat) % self.block:
            by(flat[whole * self.block :], absmax[whole])


@lru_cache(maxsize=64)
def _offset(state: bytes) -> float:
    return float(json_text.parse_object(state)["nested_offset"])


@lru_cache(maxsize=64)
def _in_order(table: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The values of a table in order, each once, and their codes."""
    code_of = {value: code for code, value in reversed(list(enumerate(table)))}  # 0 and -0 are the same key
    values = tuple(sorted(code_of))
    return values, tuple(code_of[value] for value in values)


def _neighbours(values: tuple[float, ...], scaled: Tensor, share: Tensor, places: Tensor) -> Tensor:
    """Of the two values around each number the upper one where its share is below how far the number is up.

    ``places`` are those of the nearest, which a number that is one of the values, but for what float32 has rounded,
    keeps: a weight without a change keeps its codes.
    """
    import torch

    from shardmerge.codecs import grids, nearest

    grid = torch.tensor(values, dtype=scaled.dtype, device=scaled.device)
    above = nearest.count_below(values, scaled).clamp_(1, len(values) - 1)
    low, high = (torch.index_select(grid, 0, at.view(-1).to(torch.int32)).view(at.shape) for at in (above - 1, above))
    chosen = above - ((scaled - low) / (high - low) <= share).to(torch.uint8)
    at_nearest = torch.index_select(grid, 0, places.view(-1).to(torch.int32)).view(places.shape)
    return torch.where((scaled - at_nearest).abs_() <= grids.ROUNDINGS, places, chosen)


def _pack(places: Tensor, codes: tuple[int, ...], out: Tensor) -> None:
    """Places in a table's order (uint8: rows, columns) → bytes of two codes, the first in the upper half."""
    import torch

    if codes != tuple(range(len(codes))):
        of_place = torch.tensor(codes, dtype=torch.uint8, device=places.device)
        places = torch.index_select(of_place, 0, places.view(-1).to(torch.int32)).view(places.shape)
    two = places.view(torch.int16)  # the first is in the lower byte
    out.copy_(two.bitwise_and(15).bitwise_left_shift_(4).bitwise_or_(two.bitwise_right_shift_(8)))


BITSANDBYTES_4BIT = Bnb4()
