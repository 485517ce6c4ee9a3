"""A stored format that only tests have: it proves that one file is all that a format takes.

``X.weight_q`` I8 (R, C) and ``X.weight_scale`` F32 (⌈R / 32⌉,); config.json says ``{"quant_method": "toy"}``. A value
is float32(q · scale[r // 32]), with scale = amax / 127 of 32 rows, which is known when they are encoded. `OneScale` has
one scale (1,) of all rows, for which it must see them all before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shardmerge.codecs.codec import Codec, CodecMemory, Output, ReadPart, TileSlot
from shardmerge.codecs.registry import CODECS
from shardmerge.codecs.rounding import is_below
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Encoding, RowRange, TensorRef, Weight, tensor_nbytes
from shardmerge.verification.decoders import DECODERS
from shardmerge.verification.reading import Files, StoredWeight

ROWS = 32
VALUES, SCALE = "_q", "_scale"


class Toy(Codec):
    name = "toy"

    def claims(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Iterator[Weight | str]:
        if config.get("quantization_config", {}).get("quant_method") != self.name:
            return
        for name, ref in tensors.items():
            weight = name.removesuffix(VALUES)
            if weight == name or ref.dtype != "I8" or len(ref.shape) != 2:
                continue
            scale = tensors.get(weight + SCALE)
            if scale is None or (scale.dtype, scale.shape) != ("F32", self._scales(ref.shape)):
                yield f"{name} has no {weight + SCALE} of F32 {list(self._scales(ref.shape))}"
                continue
            values = dataclasses.replace(ref, name=weight)
            shard = ref.uri.rpartition("/")[2]
            yield Weight(weight, (("values", values), ("scale", scale)), shard, Encoding(self.name))

    def _scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-(-shape[0] // ROWS),)

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        scales = self._scales(shape)
        return (
            Output("values", name + VALUES, "I8", shape, tensor_nbytes("I8", shape)),
            Output("scale", name + SCALE, "F32", scales, tensor_nbytes("F32", scales)),
        )

    def row_unit(self, encoding: Encoding) -> int:
        return ROWS

    def largest(self, tensor: TensorPlan) -> float:
        return 2.0**100

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        return CodecMemory(element=4)

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        tile.copy_(stored.float() * self._scale_of_rows(slot))

    def _scale_of_rows(self, slot: TileSlot) -> Tensor:
        first, last = slot.rows.start // ROWS, -(-slot.rows.stop // ROWS)
        scale = slot.part("scale", RowRange(first, last)).repeat_interleave(ROWS)
        return scale[slot.rows.start - first * ROWS :][: len(slot.rows), None]

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        if not slot.is_checked and not is_below(tile, self.largest(slot.tensor)):
            return False
        made = slot.made("scale")
        for at in range(0, len(tile), ROWS):
            scale = _scale(tile[at : at + ROWS])
            made[(slot.rows.start + at) // ROWS] = scale
            target[at : at + ROWS] = (tile[at : at + ROWS].float() / scale).round().to(torch.int8)
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        blocks = torch.split(values, ROWS)
        return torch.cat([torch.full_like(block, float(block.abs().max()) / 127) for block in blocks]) * (0.5 + 2e-5)


class OneScale(Toy):
    name = "toy-one-scale"

    def _scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,)

    def row_unit(self, encoding: Encoding) -> int:
        return 1

    def has_prepass(self, encoding: Encoding) -> bool:
        return True

    def _scale_of_rows(self, slot: TileSlot) -> Tensor:
        return slot.part("scale", RowRange(0, 1))

    def prepass(self, slot: TileSlot, tile: Tensor) -> None:
        made = slot.made("scale")
        made[0] = torch.maximum(made[0], _scale(tile))

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        if not slot.is_checked and not is_below(tile, self.largest(slot.tensor)):
            return False
        target.copy_((tile.float() / slot.made("scale")[0]).round())
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        return torch.full_like(values, float(part("scale", RowRange(0, 1))) * (0.5 + 2e-5))


def _scale(values: Tensor) -> Tensor:
    return (values.abs().max().float() / 127).clamp(min=2.0**-120)


def second_decoder(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """The same from the definition, with other means."""
    scale_ref, width = stored.parts["scale"], stored.columns
    codes = files.read(stored.values.uri, stored.values.offset + rows.start * width, len(rows) * width)
    scales = memoryview(files.read(scale_ref.uri, scale_ref.offset, scale_ref.nbytes)).cast("f").tolist()
    each = [scales[row // ROWS if len(scales) > 1 else 0] for row in range(rows.start, rows.stop)]
    exact = torch.frombuffer(codes, dtype=torch.int8).view(-1, width).double() * torch.tensor(each).double()[:, None]
    return exact.float().double()


TOYS: tuple[Codec, ...] = (Toy(), OneScale())


def register() -> None:
    """For a process that has nothing else to do."""
    for codec in TOYS:
        CODECS[codec.name] = codec
        DECODERS[codec.name] = second_decoder
