"""What weights of bitsandbytes have in common, and LLM.int8.

LLM.int8: ``weight`` I8 (rows, columns), ``SCB`` F32 (rows,). A value is (q · SCB) · float32(1 / 127), in this order and
in float32. Sources: bitsandbytes' ``int8_vectorwise_dequant``; Dettmers et al. 2022, arXiv:2208.07339.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shardmerge.codecs.codec import Output, ReadPart, StoredTensors, TileSlot
from shardmerge.codecs.grid_codec import GridCodec
from shardmerge.codecs.quantization import quantization, shard_of
from shardmerge.spec.tensors import Encoding, RowRange, TensorRef, Weight, tensor_nbytes

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "bitsandbytes"
#: Models whose layers are ``Conv1D``, which are transposed before they are quantised.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
#: float32(1 / 127).
_BY_127 = 0.007874015718698502
_LOWEST, _HIGHEST = -128, 127
#: How far float32 may put a code from a whole number.
_EXACT = 2.0**-15


class Int8(GridCodec):
    """LLM.int8: one scale a row. Its only setting is the ``seed`` of stochastic rounding."""

    name = "bnb-int8"
    title = "LLM.int8 of bitsandbytes"
    methods = (METHOD,)

    def claims(self, tensors: StoredTensors, config: Mapping[str, Any]) -> Iterator[Weight | str]:
        scales = [ref for name, ref in tensors.items() if name.endswith(".SCB")]
        if not scales:
            return
        if problem := refusal(config, scales[0].name):
            yield problem
            return
        formats = [tensors.get(ref.name.removesuffix("SCB") + "weight_format") for ref in scales]
        contents = tensors.contents(
            [ref for ref in formats if ref is not None and (ref.dtype, ref.nbytes) == ("U8", 1)]
        )
        for ref, layout in zip(scales, formats, strict=True):
            name = ref.name.removesuffix("SCB") + "weight"
            try:
                if layout is not None and contents.get(layout.name) != b"\0":
                    raise ValueError(f"{layout.name} is not 0, the layout in rows")
                yield self._claim(tensors, name, [] if layout is None else [("weight_format", layout)])
            except ValueError as error:
                yield f"{name} is stored in 8 bits by {METHOD}, but {error}"

    def _claim(self, tensors: Mapping[str, TensorRef], name: str, others: list[tuple[str, TensorRef]]) -> Weight:
        values = tensors.get(name)
        if values is None or values.dtype != "I8" or len(values.shape) != 2:
            found = f"{values.dtype} {list(values.shape)}" if values else "missing"
            raise ValueError(f"its codes are {found}; expected is a matrix of I8")
        scale = vector(tensors, name.removesuffix("weight") + "SCB", "F32", values.shape[0])
        parts = (("values", values), ("scale", scale), *others)
        return Weight(name, parts, shard_of(values), Encoding(self.name))

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The codes; scales stay as they are."""
        return (Output("values", name, "I8", shape, tensor_nbytes("I8", shape)),)

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        import torch

        from shardmerge.codecs import grids

        scale = slot.part("scale", slot.rows)[:, None]
        for here in grids.slabs(tile):
            values = grids.float32_like(tile[here]).copy_(stored[here].view(torch.int8)).mul_(scale[here]).mul_(_BY_127)
            if values.dtype != tile.dtype:
                tile[here] = values

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """The nearest code on the base's own grid, ties to even; or one of the two neighbours."""
        from shardmerge.codecs import grids, rounding

        if not slot.is_checked and not rounding.is_finite(tile):
            return False
        divide(tile, slot.part("scale", slot.rows)[:, None].to(tile.dtype)).mul_(_HIGHEST)
        for here, share in grids.shares(tile, slot):
            target[here] = grids.whole(tile[here], share, _EXACT).clamp_(_LOWEST, _HIGHEST)
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """Half a step, and all of what is beyond the last; stochastically a whole one."""
        from shardmerge.codecs import grids

        step = part("scale", rows).view(-1, 1).double().abs().mul_(_BY_127)
        size = values.abs()
        share = 0.5 if encoding.setting("seed") is None else 1.0
        within = (step * (share * (1 + 2.0**-20))).expand_as(size)
        return within + size * grids.ROUNDINGS + (size - _HIGHEST * step).clamp_(min=0)


def refusal(config: Mapping[str, Any], name: str) -> str:
    """Why weights of bitsandbytes, of which one has the tensor ``name``, cannot be read; empty where they can."""
    method = quantization(config).get("quant_method", "")
    if method not in ("", METHOD):
        return f"{name} belongs to a weight that {METHOD} has quantised, but config.json says {method!r:.100}"
    if config.get("model_type") in _TRANSPOSED:
        return (
            f"{name} belongs to a weight that {METHOD} has quantised: of {config['model_type']} it stores the "
            "transposes, which cannot be merged into; merge into the model as it was before it was quantised"
        )
    return ""


def vector(tensors: Mapping[str, TensorRef], name: str, dtype: str, size: int) -> TensorRef:
    """The vector ``name``; `ValueError` where it is not one of so many numbers."""
    ref = tensors.get(name)
    if ref is None or (ref.dtype, ref.shape) != (dtype, (size,)):
        found = f"{ref.dtype} {list(ref.shape)}" if ref else "missing"
        raise ValueError(f"{name} is {found}; expected is {dtype} [{size}]")
    return ref


def divide(values: Tensor, by: Tensor) -> Tensor:
    """values / by, in place; 0 where that is 0."""
    import torch

    return values.div_(torch.where(by == 0, math.inf, by))


BITSANDBYTES_INT8 = Int8()
