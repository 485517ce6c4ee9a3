"""FP4: codes of E2M1, two in a byte, the first in the lower half, with a scale for 16 or 32 columns of a row.

A value is float32(q · scale), where the scale is a power of two (E8M0), or E4M3 with another scale for all of the
matrix. Codes are (rows, columns / 2), or (experts, rows, columns / 2). Stored are:

| name | codes | for some columns | for all |
|---|---|---|---|
| NVFP4 of compressed-tensors | ``weight_packed`` U8 | ``weight_scale`` F8_E4M3, 16 | ``weight_global_scale``, divides |
| NVFP4 of modelopt | ``weight`` U8 | ``weight_scale`` F8_E4M3, 16 | ``weight_scale_2``, multiplies |
| MXFP4 of compressed-tensors | ``weight_packed`` U8 | ``weight_scale`` U8 (E8M0), 32 | |
| MXFP4 of modelopt | ``weight`` U8 | ``weight_scale`` U8 (E8M0), 32 | |
| experts of DeepSeek-V4 | ``weight`` I8 | ``scale`` F8_E8M0, 32 | |
| ``mxfp4`` and ``nvfp4`` of MLX, see `shardmerge.codecs.mlx` | ``weight`` U32 | ``scales`` U8, 32 or 16 | |

Sources: compressed-tensors' ``NVFP4PackedCompressor`` and ``MXFP4PackedCompressor``, modelopt's ``NVFP4QTensor`` and
``MXFP4QTensor``, DeepSeek-V4's ``inference/convert.py``; OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shardmerge.codecs import compressed_tensors
from shardmerge.codecs.codec import Output, ReadPart, StoredTensors, TileSlot
from shardmerge.codecs.grid_codec import GridCodec
from shardmerge.codecs.quantization import ACTIVATION_SCALES, beside, quantization, shard_of
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import DTYPE_BITS, Encoding, RowRange, TensorRef, Weight, tensor_nbytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PACKED = "_packed"
#: The largest magnitude of E2M1.
_MAX = 6.0
#: What says that a stored weight is not the model's: it is divided by another vector, or is a part of a sum.
_OTHER_PARTS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One way to store FP4, of a method of config.json."""

    name: str
    method: str
    codes: str
    suffix: str
    scale: str
    scale_dtype: str
    group: int
    #: The scale for all, and whether it divides.
    of_all: str = ""
    divides: bool = False


_KINDS = (
    _Kind("NVFP4", "compressed-tensors", "U8", _PACKED, "weight_scale", "F8_E4M3", 16, "weight_global_scale", True),
    _Kind("NVFP4", "modelopt", "U8", "", "weight_scale", "F8_E4M3", 16, "weight_scale_2"),
    _Kind("MXFP4", "compressed-tensors", "U8", _PACKED, "weight_scale", "U8", 32),
    _Kind("MXFP4", "modelopt", "U8", "", "weight_scale", "U8", 32),
    _Kind("FP4 of DeepSeek-V4", "fp8", "I8", "", "scale", "F8_E8M0", 32),
)


class Fp4(GridCodec):
    """Settings: ``group`` (columns of a scale), ``codes`` (their dtype) and ``suffix`` (after the weight's name), and
    maybe ``of_all`` (what the scale of the matrix does: divides or multiplies), ``height`` (rows of one matrix of a
    stack, where each has such a scale), and ``seed``.
    """

    name = "fp4"
    title = "FP4 (E2M1): NVFP4 and MXFP4, experts of DeepSeek-V4"
    methods = ("compressed-tensors", "modelopt", "fp8", "mlx")

    def claims(self, tensors: StoredTensors, config: Mapping[str, Any]) -> Iterator[Weight | str]:
        settings = quantization(config)
        method = str(settings.get("quant_method", ""))
        if not settings:
            return
        problem = compressed_tensors.refusal(settings)
        for ref in tensors.values():
            if ref.dtype not in ("U8", "I8") or not (found := _kinds(tensors, ref)):
                continue
            if problem:
                yield f"{ref.name} is stored as {found[0].name}, and {problem}"
                return
            try:
                kind = next((kind for kind in found if method.startswith(kind.method)), None)
                if kind is None:
                    raise ValueError(f"config.json's quant_method is {method!r:.100}, not {found[0].method}")
                if kind.codes == "I8" and config.get("expert_dtype", "fp4") != "fp4":
                    raise ValueError(f"config.json's expert_dtype is {config['expert_dtype']!r:.100}")
                yield self._claim(tensors, ref, kind)
            except ValueError as error:
                yield f"{ref.name} is stored as {found[0].name}, {ref.dtype} {list(ref.shape)}, but {error}"

    def _claim(self, tensors: Mapping[str, TensorRef], codes: TensorRef, kind: _Kind) -> Weight:
        """The weight with these codes; `ValueError` says what does not fit."""
        *experts, rows, half = codes.shape
        name, shape = codes.name.removesuffix(kind.suffix), (*experts, rows, 2 * half)
        if len(experts) > 1 or not all(codes.shape) or shape[-1] % kind.group:
            raise ValueError(f"expected are one or more matrices, of a multiple of {kind.group} columns")
        scale = beside(tensors, name, [kind.scale])[0]
        expected = (*experts, rows, shape[-1] // kind.group)
        if scale.shape != expected:
            raise ValueError(f"{scale.name} is {scale.dtype} {list(scale.shape)}; expected is {list(expected)}")
        if other := beside(tensors, name, _OTHER_PARTS):
            raise ValueError(f"{other[0].name} is beside it, so what is stored is not the model's weight")
        dtype = "F8_E8M0" if scale.dtype == "U8" else scale.dtype
        grid = dataclasses.replace(scale, dtype=dtype, shape=(math.prod(expected[:-1]), expected[-1]))
        parts = [("values", dataclasses.replace(codes, name=name, shape=shape)), ("scale", grid)]
        said: dict[str, Any] = {"group": kind.group, "codes": kind.codes, "suffix": kind.suffix}
        if kind.of_all:
            of_all = _of_all(tensors, name, kind, math.prod(experts))
            parts.append(("of_all", of_all))
            said["of_all"] = "divides" if kind.divides else "multiplies"
            if of_all.shape[0] > 1:
                said["height"] = rows
        others = beside(tensors, name, ACTIVATION_SCALES)
        parts += [(part.name.rpartition(".")[2], part) for part in others]
        encoding = Encoding(self.name, tuple(said.items()), len(shape) - 1)
        return Weight(name, tuple(parts), shard_of(codes), encoding)

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The codes; scales stay as they are."""
        dtype = encoding.setting("codes")
        stored = (*shape[:-1], shape[-1] * 4 // DTYPE_BITS[dtype])
        return (Output("values", name + encoding.setting("suffix"), dtype, stored, tensor_nbytes(dtype, stored)),)

    # --- computing ----------------------------------------------------------------------------------------------------

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        import torch

        from shardmerge.codecs import grids, tables

        assert slot.tensor.decoding is not None
        scales = self._scales_of(slot, slot.tensor.decoding)
        codes = stored.view(torch.uint8)
        for here in grids.slabs(tile):
            values = grids.float32_like(tile[here])
            tables.look_up_halves(codes[here], tables.E2M1, values)
            grids.by_groups(torch.Tensor.mul_, values, scales[here])
            if values.dtype != tile.dtype:
                tile[here] = values

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """The nearest code on the base's own grid, ties to even, or one of the two neighbours."""
        import torch

        from shardmerge.codecs import grids, packing, rounding, tables

        if not slot.is_checked and not rounding.is_finite(tile):
            return False
        assert slot.tensor.encoding is not None
        scales = self._scales_of(slot, slot.tensor.encoding)
        grids.check_divisors(slot, "scale", scales, slot.rows.start)
        out = target.view(torch.uint8)
        for here, share in grids.shares(tile, slot):
            values = grids.by_groups(torch.Tensor.div_, tile[here], scales[here].to(tile.dtype))
            if share is None and values.dtype == torch.float32:
                codes = tables.nearest(values, _codes_by_upper_half(values.device))
            else:
                codes = _codes(values, share)
            packing.pack_halves(codes, out[here])
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """Half of what the two neighbours are apart, or all of it, and all of what is beyond the last."""
        import torch

        from shardmerge.codecs import grids

        scales = _scales(encoding, rows, part).to(values.dtype).abs()
        size = grids.by_groups(torch.Tensor.div_, values.abs(), scales)
        step = 0.5 * (1.0 + (size >= 2) + 2.0 * (size >= 4))
        bound = step.mul_(0.5 if encoding.setting("seed") is None else 1.0).add_((size - _MAX).clamp_(min=0))
        # The quotient of which this is the nearest code is rounded, too, and so is what is read.
        return grids.by_groups(torch.Tensor.mul_, bound.add_(size, alpha=grids.ROUNDINGS), scales)

    def _scales_of(self, slot: TileSlot, encoding: Encoding) -> Tensor:
        from shardmerge.codecs import grids

        scales = _scales(encoding, slot.rows, slot.part)
        if not bool(scales.sum().isfinite()):
            ref = grids.part_of(slot, "of_all")
            raise FormatError(f"{ref.uri}: {ref.name} makes scales infinite; the merge was stopped")
        return scales


# --- what a checkpoint says -------------------------------------------------------------------------------------------


def _kinds(tensors: Mapping[str, TensorRef], ref: TensorRef) -> list[_Kind]:
    """The ways to store FP4 that a tensor and the scale beside it are of, by names and dtypes."""
    found = []
    for kind in _KINDS:
        if ref.dtype != kind.codes or not ref.name.endswith(kind.suffix):
            continue
        name = ref.name.removesuffix(kind.suffix)
        scales = beside(tensors, name, [kind.scale])
        if len(ref.shape) > 1 and scales and scales[0].dtype == kind.scale_dtype:
            found.append(kind)
    return found


def _of_all(tensors: Mapping[str, TensorRef], name: str, kind: _Kind, experts: int) -> TensorRef:
    """The scale of a matrix, or of each of a stack, as a column."""
    refs = beside(tensors, name, [kind.of_all])
    if not refs or refs[0].dtype != "F32" or math.prod(refs[0].shape) not in (1, experts):
        found = f"{refs[0].dtype} {list(refs[0].shape)}" if refs else "missing"
        raise ValueError(f"its {kind.of_all} is {found}; expected is one F32{' an expert' if experts > 1 else ''}")
    return dataclasses.replace(refs[0], shape=(math.prod(refs[0].shape), 1))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _scales(encoding: Encoding, rows: RowRange, part: ReadPart) -> Tensor:
    """The scales of some rows in float32: (rows, groups)."""
    import torch

    scales = part("scale", rows).to(torch.float32)
    if (does := encoding.setting("of_all")) is None:
        return scales
    height = encoding.setting("height")
    first = rows.start // height if height else 0
    of_all = part("of_all", RowRange(first, (rows.stop - 1) // height + 1 if height else 1))
    if height:
        of_all = of_all[torch.arange(rows.start, rows.stop, device=of_all.device) // height - first]
    return scales.div_(of_all) if does == "divides" else scales.mul_(of_all)


def _codes(values: Tensor, share: Tensor | None) -> Tensor:
    """Values in units of their scale → codes, of which the sign is the fourth bit.

    Codes 0 to 4 are half a unit apart, 4 to 6 a whole one, and 6 and 7 two.
    """
    import torch

    from shardmerge.codecs import grids

    size = values.abs().clamp_(max=_MAX)
    is_middle, is_upper = size >= 2, size >= 4
    position = torch.where(is_upper, size * 0.5, torch.where(is_middle, size, size * 2))
    codes = grids.whole(position, share, 8 * grids.ROUNDINGS).add_(is_middle, alpha=2).add_(is_upper, alpha=2)
    return codes.add_(values.signbit(), alpha=8).to(torch.uint8)


@lru_cache(maxsize=4)
def _codes_by_upper_half(device: torch.device) -> Tensor:
    from shardmerge.codecs import tables

    return _codes(tables.upper_halves().nan_to_num(), None).to(device)


FP4 = Fp4()
