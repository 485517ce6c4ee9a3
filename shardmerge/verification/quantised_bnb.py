"""Second decoders of bitsandbytes' weights: from the formats' definitions, by table, without the codecs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shardmerge.spec.tensors import RowRange, TensorRef
from shardmerge.verification.reading import Decoder, Files, StoredWeight


def _numbers(files: Files, ref: TensorRef, at: Tensor) -> Tensor:
    """The numbers of a vector at these places, in float64."""
    first, last = int(at.min()), int(at.max())
    return files.rows(ref, RowRange(first, last + 1), 1).flatten().double()[at - first]


def _float32(exact: Tensor) -> Tensor:
    """float64 rounded once to float32: so are a product and a sum of two float32, as float64 is over twice as wide."""
    return exact.float().double()


def _all(files: Files, ref: TensorRef) -> Tensor:
    return _numbers(files, ref, torch.arange(math.prod(ref.shape)))


def four_bits(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """float32(table[code] · absmax), of elements counted from the beginning of the matrix."""
    parts, width = stored.parts, stored.columns // 2
    state = json.loads(files.read(parts["quant_state"].uri, parts["quant_state"].offset, parts["quant_state"].nbytes))
    data = files.read(stored.values.uri, stored.values.offset + rows.start * width, len(rows) * width)
    both = torch.frombuffer(data, dtype=torch.uint8).long()
    codes = torch.stack([both // 16, both % 16], dim=1).flatten()
    block = (torch.arange(len(codes)) + rows.start * stored.columns) // state["blocksize"]
    absmax = _numbers(files, parts["absmax"], block)
    if "nested_absmax" in parts:
        of_code = _all(files, parts["nested_quant_map"])[absmax.long()]
        scale = _numbers(files, parts["nested_absmax"], block // state["nested_blocksize"])
        offset = float(torch.tensor(state["nested_offset"], dtype=torch.float32))
        absmax = _float32(_float32(of_code * scale) + offset)
    return _float32(_all(files, parts["quant_map"])[codes] * absmax).view(len(rows), stored.columns)


def int8(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """float32(float32(q · SCB) · float32(1 / 127))."""
    data = files.read(stored.values.uri, stored.values.offset + rows.start * stored.columns, len(rows) * stored.columns)
    codes = torch.frombuffer(data, dtype=torch.int8).double()
    scale = _numbers(files, stored.parts["scale"], torch.arange(rows.start, rows.stop))
    by = float(torch.tensor(1 / 127, dtype=torch.float32))
    return _float32(_float32(codes.view(len(rows), -1) * scale.view(-1, 1)) * by)


BITSANDBYTES: Mapping[str, Decoder] = {"bnb-4bit": four_bits, "bnb-int8": int8}
