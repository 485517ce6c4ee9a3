"""FP8 weights with scales: one for a block of rows and columns, for a row, a column, or for all of a matrix.

A value is float32(q · scale), with q of E4M3 and the scale as stored, in float32: one rounding. The scale of rows and
columns (r, c) is that of the block (r // rows, c // columns); blocks count from 0, and the last may be short. What is
stored, by ``quant_method`` of config.json:

- ``fp8`` (DeepSeek, Qwen, GLM, MiniMax, Mistral) and ``mxfp8``: ``weight`` with ``weight_scale_inv`` (by which values
  are multiplied in spite of its name), or ``scale``, or ``qscale_weight``;
- ``compressed-tensors`` (``float-quantized``, ``naive-quantized``, ``mxfp8-quantized``), ``modelopt``, ``fbgemm_fp8``:
  ``weight`` with ``weight_scale``;
- ComfyUI: ``weight`` with ``weight_scale`` or ``scale_weight``, and no config, see `shardmerge.codecs.comfy`;
- MLX (``mxfp8``): ``weight`` U32 with ``scales``, see `shardmerge.codecs.mlx`;
- experts of a layer in one tensor: ``experts.gate_up_proj`` with ``…_scale`` or ``…_scale_inv``.

Scales are F32, BF16, F16 or E8M0, a power of two: stored as F8_E8M0, or as U8 by formats of 32 columns a block.
Sources: transformers' ``Fp8Dequantize``, compressed-tensors' ``FP8BlockDequantizer``, DeepSeek-V3's ``weight_dequant``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shardmerge.codecs import comfy, compressed_tensors
from shardmerge.codecs.codec import Codec, CodecMemory, Output, ReadPart, StoredTensors, TileSlot
from shardmerge.codecs.grid_codec import GridCodec
from shardmerge.codecs.quantization import ACTIVATION_SCALES, beside, groups, quantization, shard_of
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, Encoding, RowRange, TensorRef, Weight, tensor_nbytes

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = ("weight_scale_inv", "weight_scale", "scale", "scale_inv", "qscale_weight", "scale_weight")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
#: Columns that share an exponent, of which a U8 is the scale.
_MX_COLUMNS = 32
_MAX = 448.0
#: What the roundings of decoding and encoding in float32 may move a value, relative to it.
_ROUNDINGS = 2.0**-22
#: Elements that are looked at at a time, and what a thread allocates to round them stochastically.
_SLAB = 1 << 15
_STOCHASTIC_BYTES = 1 << 20
#: Rows or columns of a block.
Block = tuple[int, int]


class Fp8(GridCodec):
    """Settings: ``block`` (rows, columns), ``height``, the rows of one matrix of a stack, maybe ``codes``, the dtype
    that codes are stored as, and maybe ``seed``.
    """

    name = "fp8"
    title = "FP8 (E4M3) with a scale for each block, row, column or tensor"
    methods = ("fp8", "mxfp8", "compressed-tensors", "modelopt", "fbgemm_fp8", "mlx", "")

    def claims(self, tensors: StoredTensors, config: Mapping[str, Any]) -> Iterator[Weight | str]:
        yield from comfy.problems(tensors)
        settings = quantization(config)
        method, blocks = settings.get("quant_method"), _blocks(settings)
        problem = compressed_tensors.refusal(settings)
        for name, ref in tensors.items():
            if ref.dtype != "F8_E4M3" or len(ref.shape) not in (2, 3) or name.endswith(_SCALES):
                continue  # NVFP4 has scales of this dtype
            if problem:
                yield f"{name} is stored as F8_E4M3, and {problem}"
                return
            scales = beside(tensors, name, _SCALES)
            if scales and scales[0].dtype == "U8" and not settings:
                continue  # nothing says that these are exponents, or in which order they are
            scale = _as_grid(ref.shape, scales[0], blocks, method == "fbgemm_fp8") if len(scales) == 1 else None
            if scale is None and not settings:
                continue  # numbers as they are: nothing says that the checkpoint is quantised
            if len(scales) != 1:
                what = " and ".join(scale.name for scale in scales) or "no scale"
                yield f"{name} is stored as F8_E4M3, and has {what} beside it where one scale was expected"
                continue
            if scale is None:
                of = " or ".join(f"{rows} × {columns}" for rows, columns in blocks) or "a size that config.json gives"
                yield (
                    f"{name} is F8_E4M3 {list(ref.shape)}, but {scales[0].name} is {scales[0].dtype} "
                    f"{list(scales[0].shape)}; expected was one scale, one a row, or one a block of {of}"
                )
                continue
            block, height, grid = scale
            beside_it = beside(tensors, name, (*ACTIVATION_SCALES, comfy.FORMAT))
            others = [(part.name.rpartition(".")[2], part) for part in beside_it]
            encoding = Encoding(self.name, (("block", block), ("height", height)), len(ref.shape) - 1)
            yield Weight(name, (("values", ref), ("scale", grid), *others), shard_of(ref), encoding)

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The codes; scales stay as they are."""
        dtype = encoding.setting("codes", "F8_E4M3")
        stored = (*shape[:-1], shape[-1] * 8 // DTYPE_BITS[dtype])
        return (Output("values", name, dtype, stored, tensor_nbytes(dtype, stored)),)

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        is_stochastic = tensor.encoding is not None and tensor.encoding.setting("seed") is not None
        return CodecMemory(between=_STOCHASTIC_BYTES if is_stochastic else 0)

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        import torch

        from shardmerge.codecs import tables

        values = tile if tile.dtype == torch.float32 else torch.empty_like(tile, dtype=torch.float32)
        tables.look_up(stored.view(torch.uint8), tables.E4M3, values)
        assert slot.tensor.decoding is not None
        _scale(torch.Tensor.mul_, values, slot.rows, slot.tensor.decoding, slot.part)
        if values is not tile:
            tile.copy_(values)

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """The nearest code on the base's own grid, or one of the two neighbours."""
        import torch

        from shardmerge.codecs import grids, rounding, stochastic

        if not slot.is_checked and not rounding.is_finite(tile):
            return False
        encoding = slot.tensor.encoding
        assert encoding is not None
        _scale(torch.Tensor.div_, tile, slot.rows, encoding, slot.part)
        if not rounding.is_finite(tile):
            of_rows = _rows_of_grid(slot.rows, encoding)
            grids.check_divisors(slot, "scale", slot.part("scale", of_rows).float(), of_rows.start)
        tile.clamp_(-_MAX, _MAX)
        target = target.view(torch.float8_e4m3fn)
        if (seed := encoding.setting("seed")) is None:
            rounding.encode_into(target, tile)
        else:
            _snap(tile)
            stochastic.encode_into(target, tile, seed, slot.tensor.source.name, slot.rows)
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        import torch

        from shardmerge.codecs import rounding

        scaled = _scale(torch.Tensor.div_, values.abs(), rows, encoding, part)
        beyond = (scaled - _MAX).clamp_(min=0)
        bound = rounding.half_unit(scaled.clamp_(max=_MAX), "F8_E4M3")
        if encoding.setting("seed") is not None:
            bound.mul_(2)
        # The quotient of which this is the nearest code is rounded, too, and so is what is read.
        bound.add_(scaled, alpha=_ROUNDINGS).add_(beyond, alpha=1 + _ROUNDINGS)
        return _scale(torch.Tensor.mul_, bound, rows, encoding, part)


def _blocks(settings: Mapping[str, Any]) -> list[Block]:
    """The sizes of blocks that the settings name: (rows, columns)."""
    method = settings.get("quant_method")
    found = [settings.get("weight_block_size", (128, 128) if method == "fp8" else None)]
    for group in groups(settings):
        found.append(group.get("block_structure"))
        if group.get("num_bits") == 8 and group.get("strategy") == "group":
            found.append((1, group.get("group_size")))
    whole = [tuple(block) for block in found if isinstance(block, (list, tuple)) and len(block) == 2]
    return [block for block in whole if all(type(size) is int and size > 0 for size in block)]


def _as_grid(
    shape: tuple[int, ...], scale: TensorRef, blocks: list[Block], last_is_out: bool
) -> tuple[Block, int, TensorRef] | None:
    """The block of a scale, the height of a matrix, and the scale as a matrix: a row for each row of blocks.

    None where the scale does not fit the weight. ``last_is_out``: experts' matrices are stored (in, out), and their
    scales go with the last dimension, whatever their own shape is.
    """
    *experts, rows, columns = shape
    count = math.prod(experts)

    def grid(of_rows: int, of_columns: int) -> TensorRef:
        dtype = "F8_E8M0" if scale.dtype == "U8" else scale.dtype
        return dataclasses.replace(scale, dtype=dtype, shape=(of_rows, of_columns))

    plain = tuple(size for size in scale.shape if size != 1)
    if scale.dtype == "U8":
        blocks = [(1, _MX_COLUMNS)]
    elif scale.dtype not in _SCALE_DTYPES:
        return None
    else:
        if math.prod(scale.shape) == 1:
            return (count * rows, columns), count * rows, grid(1, 1)
        if last_is_out and experts and plain == tuple(size for size in (count, columns) if size != 1):
            return (rows, 1), rows, grid(count, columns)
        if scale.shape in ((*experts, 1, 1), (*experts,)):
            return (rows, columns), rows, grid(count, 1)
        if scale.shape in ((*experts, rows, 1), (*experts, rows)):
            return (1, columns), rows, grid(count * rows, 1)
    for of_rows, of_columns in blocks:
        high, wide = -(-rows // of_rows), -(-columns // of_columns)
        if scale.shape == (*experts, high, wide):
            return (of_rows, of_columns), rows, grid(count * high, wide)
    return None


def _row_of_grid(row: Any, encoding: Encoding) -> Any:
    """The row of the grid for a row of the weight, or for many."""
    (of_rows, _), height = encoding.setting("block"), encoding.setting("height")
    return row // height * -(-height // of_rows) + row % height // of_rows


def _rows_of_grid(rows: RowRange, encoding: Encoding) -> RowRange:
    return RowRange(_row_of_grid(rows.start, encoding), _row_of_grid(rows.stop - 1, encoding) + 1)


def _scale(
    by: Callable[[Tensor, Tensor], Tensor], values: Tensor, rows: RowRange, encoding: Encoding, part: ReadPart
) -> Tensor:
    """``values`` of these rows, multiplied or divided in place by their scales."""
    import torch

    of_grid, (_, of_columns) = _rows_of_grid(rows, encoding), encoding.setting("block")
    scales = part("scale", of_grid).to(values.dtype)
    lines = _row_of_grid(torch.arange(rows.start, rows.stop, device=values.device), encoding)
    scales = scales[lines - of_grid.start]
    whole = values.shape[1] // of_columns * of_columns
    if whole:
        by(values[:, :whole].view(len(values), -1, of_columns), scales[:, : whole // of_columns, None])
    if whole < values.shape[1]:
        by(values[:, whole:], scales[:, -1:])
    return values


def _snap(values: Tensor) -> None:
    """Make codes of what float32 has moved from one, so that a weight without a change keeps its codes."""
    import torch

    for part in torch.split(values, max(1, _SLAB // max(1, values.shape[1]))):
        code = part.to(torch.float8_e4m3fn).to(part.dtype)
        part.copy_(torch.where((part - code).abs_() <= part.abs().mul_(_ROUNDINGS), code, part))


FP8: tuple[Codec, ...] = (Fp8(),)
