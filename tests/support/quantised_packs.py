"""Integers and FP4 as compressed-tensors, modelopt and DeepSeek store them, made by the definitions, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardmerge.codecs.codec import Codec, StoredTensors
from shardmerge.codecs.rounding import NUMBER_DTYPES
from shardmerge.spec.tensors import RowRange, TensorRef, Weight

Tensors = dict[str, Tensor]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
#: The mean of two neighbours; a tie goes to the code that is even.
_MIDDLES = (E2M1[1:] + E2M1[:-1]) / 2


# --- bits -------------------------------------------------------------------------------------------------------------


def packed(codes: np.ndarray, bits: int) -> Tensor:
    """Codes (rows, columns) → int32 words: each row is one large number, whose lowest bits are the first code."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes.tolist():
        number = sum(code << (at * bits) for at, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(words * 4, "little"), dtype="<i4"))
    return torch.from_numpy(np.stack(rows).astype(np.int32))


def unpacked(words: Tensor, bits: int, count: int) -> np.ndarray:
    rows = []
    for row in words.numpy():
        number = int.from_bytes(row.astype("<i4").tobytes(), "little")
        rows.append([number >> (at * bits) & ((1 << bits) - 1) for at in range(count)])
    return np.array(rows)


# --- integers ---------------------------------------------------------------------------------------------------------


def group_of(shape: tuple[int, int], scale: Tensor, order: Tensor | None = None) -> np.ndarray:
    """The group of each column."""
    return np.arange(shape[1]) // (shape[1] // scale.shape[-1]) if order is None else order.numpy()


def integer_parts(
    weight: Tensor,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    order: Tensor | None = None,
    is_packed: bool = True,
) -> Tensors:
    """The parts of a weight by the ends of their names; no ``group`` is one scale a row, and -1 is one of all."""
    rows, columns = weight.shape
    values = weight.double().numpy()
    of = np.zeros(columns, dtype=int) if not group or group < 0 else np.arange(columns) // group
    of = of if order is None else order.numpy()
    count = int(of.max()) + 1
    half = 1 << (bits - 1)
    low = np.stack([values[:, of == at].min(1) for at in range(count)], 1)
    high = np.stack([values[:, of == at].max(1) for at in range(count)], 1)
    if group == -1:
        low, high = low.min(keepdims=True), high.max(keepdims=True)
    scale = np.maximum(-low, high) / (half - 0.5) if symmetric else (high - low) / (2 * half - 1)
    scales = torch.from_numpy(np.maximum(scale, 1e-6)).to(dtype)
    exact = scales.double().numpy()
    zeros = np.zeros_like(exact) if symmetric else np.clip(np.round(-half - low / exact), -half, half - 1)
    codes = np.clip(np.round(values / exact[:, of]) + zeros[:, of], -half, half - 1).astype(np.int64)
    parts = {"weight_scale": scales if group != -1 else scales.view(1)}
    if is_packed:
        parts["weight_packed"] = packed(codes + half, bits)
        parts["weight_shape"] = torch.tensor([rows, columns])
    else:
        parts["weight"] = torch.from_numpy(codes.astype(np.int8))
    if not symmetric and is_packed:
        parts["weight_zero_point"] = packed((zeros + half).astype(np.int64).T, bits).T.contiguous()
    elif not symmetric:
        parts["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8)).view(parts["weight_scale"].shape)
    if order is not None:
        parts["weight_g_idx"] = order.to(torch.int32)
    return parts


def integer_values(parts: Mapping[str, Tensor], shape: tuple[int, int], bits: int = 4) -> Tensor:
    """float32((q − z) · scale)."""
    rows, columns = shape
    half = 1 << (bits - 1)
    scale = (
        parts["weight_scale"]
        .double()
        .numpy()
        .reshape(-1, 1 if parts["weight_scale"].ndim < 2 else parts["weight_scale"].shape[1])
    )
    zeros = np.zeros_like(scale)
    if "weight_packed" in parts:
        codes = unpacked(parts["weight_packed"].view(rows, -1), bits, columns) - half
        if "weight_zero_point" in parts:
            zeros = unpacked(parts["weight_zero_point"].T, bits, rows).T - half
    else:
        codes = parts["weight"].view(shape).numpy().astype(np.int64)
        if "weight_zero_point" in parts:
            zeros = parts["weight_zero_point"].numpy().astype(np.int64).reshape(scale.shape)
    of = group_of(shape, torch.from_numpy(scale), parts.get("weight_g_idx"))
    return torch.from_numpy(((codes - zeros[:, of]) * scale[:, of]).astype(np.float32))


# --- FP4 --------------------------------------------------------------------------------------------------------------


def e2m1(values: np.ndarray) -> np.ndarray:
    """The nearest codes."""
    size = np.abs(values)
    below = np.searchsorted(_MIDDLES, size, side="left")
    is_tie = (below < 7) & (_MIDDLES[np.minimum(below, 6)] == size)
    code: np.ndarray = np.where(is_tie & (below % 2 == 1), below + 1, below) + 8 * np.signbit(values)
    return code


def fp4_parts(weight: Tensor, kind: str) -> Tensors:
    """The parts of a weight (…, rows, columns) by the ends of their names."""
    values = weight.double().numpy()
    group = 16 if kind.startswith("nvfp4") else 32
    blocks = values.reshape(*values.shape[:-1], -1, group)
    largest = np.maximum(np.abs(blocks).max(-1), 1e-9)
    parts: Tensors = {}
    if group == 16:
        of_all = largest.max((-1, -2)) / (6 * 448)
        scale = torch.from_numpy(largest / 6 / of_all[..., None, None]).to(torch.float8_e4m3fn)
        if kind == "nvfp4-modelopt":
            parts["weight_scale_2"] = torch.from_numpy(np.asarray(of_all)).float()
            exact = scale.float().numpy() * parts["weight_scale_2"].numpy()[..., None, None]
        else:
            parts["weight_global_scale"] = torch.from_numpy(np.asarray(1 / of_all)).float().view(-1)
            exact = scale.float().numpy() / parts["weight_global_scale"].numpy()
        parts["weight_scale"] = scale
    else:
        power = np.ceil(np.log2(largest / 6))
        exact = np.exp2(power).astype(np.float32)
        byte = torch.from_numpy((power + 127).astype(np.uint8))
        if kind == "fp4-deepseek":
            parts["scale"] = byte.view(torch.float8_e8m0fnu)
        else:
            parts["weight_scale"] = byte
    codes = e2m1(np.clip(blocks / exact[..., None], -6, 6)).reshape(*values.shape[:-1], -1, 2)
    data = torch.from_numpy((codes[..., 0] + 16 * codes[..., 1]).astype(np.uint8))
    parts[FP4_CODES[kind]] = data.view(torch.int8) if kind == "fp4-deepseek" else data
    return parts


#: What the codes are called.
FP4_CODES = {
    "nvfp4": "weight_packed",
    "nvfp4-modelopt": "weight",
    "mxfp4": "weight_packed",
    "mxfp4-modelopt": "weight",
    "fp4-deepseek": "weight",
}


def fp4_values(parts: Mapping[str, Tensor], kind: str) -> Tensor:
    """float32(q · scale)."""
    data = parts[FP4_CODES[kind]].view(torch.uint8).numpy()
    codes = np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)
    values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
    if "weight_scale_2" in parts:
        scale = parts["weight_scale"].float().numpy() * parts["weight_scale_2"].numpy()[..., None, None]
    elif "weight_global_scale" in parts:
        scale = parts["weight_scale"].float().numpy() / parts["weight_global_scale"].numpy()
    else:
        byte = (parts["scale"] if "scale" in parts else parts["weight_scale"]).view(torch.uint8).numpy()
        scale = np.exp2(byte.astype(np.float64) - 127)
    each = np.repeat(scale.astype(np.float64), values.shape[-1] // scale.shape[-1], -1)
    return torch.from_numpy((values * each).astype(np.float32))


# --- as a checkpoint has them -----------------------------------------------------------------------------------------

_CODES = {dtype: code for code, dtype in NUMBER_DTYPES.items()}


def as_stored(tensors: Mapping[str, Tensor]) -> StoredTensors:
    """Tensors as the headers of one file say where they are."""
    refs, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        refs[name] = TensorRef(name, "/base/model.safetensors", _CODES[tensor.dtype], tuple(tensor.shape), at, size)
        at += size
    contents = {name: tensor.contiguous().view(-1).view(torch.uint8) for name, tensor in tensors.items()}
    return StoredTensors(refs, lambda asked: {ref.name: contents[ref.name].numpy().tobytes() for ref in asked})


def encoded(codec: Codec, weight: Weight, tensors: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """What a codec makes of values: the codes as they are stored, beside the other tensors of a claimed weight."""
    assert weight.stored_as is not None
    (output,) = codec.outputs(weight.name, weight.tensor.shape, weight.stored_as)
    parts = {role: tensors[ref.name].view(NUMBER_DTYPES[ref.dtype]).view(ref.shape) for role, ref in weight.parts[1:]}
    slot: Any = SimpleNamespace(
        tensor=SimpleNamespace(encoding=weight.stored_as, source=weight.tensor, parts=weight.parts[1:]),
        rows=RowRange(0, math.prod(weight.tensor.shape[:-1])),
        is_checked=False,
        part=lambda role, rows: parts[role][rows.start : rows.stop],
    )
    target = torch.zeros(output.shape, dtype=NUMBER_DTYPES[output.dtype])
    assert codec.encode(slot, values.reshape(len(slot.rows), -1).clone(), target.view(len(slot.rows), -1))
    return target
