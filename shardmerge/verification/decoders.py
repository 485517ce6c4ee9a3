"""Second decoders, stored bytes → numbers in float64, and a second rounding, without the code that merges.

``verify`` must not trust a codec to judge its own output. So every codec of `shardmerge.codecs` that decodes has a
second decoder here, written from the format's definition. Floats need none: torch reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shardmerge.adapters.work import tile_dtype
from shardmerge.codecs.registry import CODECS
from shardmerge.codecs.rounding import half_unit
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, RowRange, SourceFile, TensorInfo, TensorRef
from shardmerge.verification.quantised import QUANTISED
from shardmerge.verification.quantised_bnb import BITSANDBYTES
from shardmerge.verification.quantised_packs import PACKS
from shardmerge.verification.reading import Decoder, Files, StoredWeight, wide

#: By the codec's name.
DECODERS: dict[str, Decoder] = {**QUANTISED, **BITSANDBYTES, **PACKS}


def numbers(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """Rows of a weight, in float64."""
    if stored.encoding is None or stored.encoding.codec not in DECODERS:
        return wide(files.rows(stored.values, rows, stored.columns))
    return DECODERS[stored.encoding.codec](files, stored, rows)


def bound_of(files: Files, stored: StoredWeight, values: Tensor, rows: RowRange) -> Tensor:
    """The most that the weight's codec may move exact ``values`` of ``rows`` when it encodes them."""
    assert stored.encoding is not None

    def part(role: str, of: RowRange) -> Tensor:
        ref = stored.parts[role]
        return files.rows(ref, of, math.prod(ref.shape[1:])).view(len(of), *ref.shape[1:])

    return CODECS[stored.encoding.codec].rounding_bound(stored.encoding, values, rows, part)


def source_of(tensor: TensorPlan) -> StoredWeight:
    """The stored weight that a tensor of the plan is made from."""
    return StoredWeight(tensor.source, tensor.row_elements, tensor.decoding, dict(tensor.parts))


def output_of(
    tensor: TensorPlan, file: SourceFile, data_start: int, found: Mapping[str, TensorInfo]
) -> StoredWeight | None:
    """The weight in an output file whose tensors are ``found``; None where a part is missing or not as planned."""
    refs = []
    for name, planned in tensor.outputs():
        info = found.get(name)
        if info is None or (info.dtype, info.shape) != (planned.dtype, planned.shape):
            return None
        refs.append(TensorRef(name, file.uri, info.dtype, info.shape, data_start + info.data_offsets[0], info.nbytes))
    made = {part.role: ref for part, ref in zip(tensor.made, refs[1:], strict=True)}
    parts = made
    if tensor.encoding is not None and tensor.decoding is not None and tensor.encoding.codec == tensor.decoding.codec:
        parts = {**dict(tensor.parts), **made}  # those that are not made anew stay, with their bytes
    return StoredWeight(refs[0], tensor.row_elements, tensor.encoding, parts)


def rounded(value: Tensor, dtype: str, direction: int = 0) -> Tensor:
    """The nearest number of a dtype, ties to even; with a direction of -1 or 1 the next one below or above."""
    unit = half_unit(value.abs(), dtype).mul_(2)
    towards = {0: torch.round, -1: torch.floor, 1: torch.ceil}[direction]
    return torch.where(torch.isfinite(value), towards(value / unit) * unit, value)


def is_stochastic(tensor: TensorPlan, compute_dtype: str, dtype: str) -> bool:
    """Whether a tensor is rounded to ``dtype`` stochastically: the plan asks for it, and its tiles are wider."""
    asked = tensor.encoding is not None and tensor.encoding.setting("seed") is not None
    return asked and DTYPE_BITS[dtype] < DTYPE_BITS[tile_dtype(tensor, compute_dtype)]
