"""Weights as bitsandbytes stores them, made by the formats' definitions in numpy, one number after the other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4, np.float32(0) - _FP4])
TABLES = {"nf4": NF4, "fp4": FP4}
NESTED = 256


def dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' dynamic type of 8 bits, in order.

    ``torch.linspace`` fills float32 from both ends, with fused multiplications.
    """
    first, last = float(np.float32(0.1)), 1.0
    values: list[float] = [0.0, 1.0]
    for power in range(7):
        count = 2**power
        step = float(np.float32((last - first) / count))
        places = range(count + 1)
        edges = [first + step * at if at < (count + 1) // 2 else last - step * (count - at) for at in places]
        rounded = np.array(edges, dtype=np.float32)
        middles = (rounded[:-1] + rounded[1:]) / np.float32(2)
        values += [float(sign * (np.float32(10.0 ** (power - 6)) * middle)) for middle in middles for sign in (1, -1)]
    return np.array(sorted(values), dtype=np.float32)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The code of the nearest of a table's values, of two as near the lower; zero is the first of zeros."""
    order = np.argsort(table, kind="stable")
    order = order[np.concatenate([[True], np.diff(table[order]) != 0])]
    middles = (table[order][1:] + table[order][:-1]) / np.float32(2)
    found: np.ndarray = order[np.searchsorted(middles, values, side="left")]
    return found


def _in_blocks(flat: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """absmax of each block, and the values divided by it, in float32."""
    count = -(-len(flat) // size)
    padded = np.zeros(count * size, dtype=np.float32)
    padded[: len(flat)] = flat
    blocks = padded.reshape(count, size)
    absmax = np.abs(blocks).max(1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    return absmax, scaled.reshape(-1)[: len(flat)]


def four_bits(
    values: Tensor, kind: str = "nf4", nested: bool = True, block: int = 64, storage: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """The parts of a weight of 4 bits by the ends of their names; the codes' is empty."""
    flat = values.float().numpy().reshape(-1)
    absmax, scaled = _in_blocks(flat, block)
    codes = nearest(scaled, TABLES[kind]).astype(np.uint8)
    codes = np.concatenate([codes, np.zeros(len(codes) % 2, dtype=np.uint8)])
    packed = torch.from_numpy(codes[::2] << 4 | codes[1::2])
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(values.shape),
    }
    parts = {"": packed.view(storage).view(-1, 1), "absmax": torch.from_numpy(absmax)}
    if nested:
        offset = np.float32(absmax.astype(np.float64).mean())
        of_groups, in_group = _in_blocks(absmax - offset, NESTED)
        parts["absmax"] = torch.from_numpy(nearest(in_group, dynamic_map()).astype(np.uint8))
        parts |= {"nested_absmax": torch.from_numpy(of_groups), "nested_quant_map": torch.from_numpy(dynamic_map())}
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(offset)}
    parts["quant_map"] = torch.from_numpy(TABLES[kind].copy())
    parts[f"quant_state.bitsandbytes__{kind}"] = json_tensor(state)
    return parts


def json_tensor(value: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def eight_bits(values: Tensor) -> dict[str, Tensor]:
    """The parts of a module of 8 bits by their names in it."""
    scale = values.float().abs().amax(1)
    codes = torch.round(values.float() * (127 / scale)[:, None]).to(torch.int8)
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def as_weight(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of 4 bits under the names that they have in a checkpoint."""
    return {f"{name}.{end}" if end else name: part for end, part in parts.items()}


def absmax_of(parts: Mapping[str, Tensor]) -> np.ndarray:
    """absmax of each block, in float32."""
    if "nested_absmax" not in parts:
        single: np.ndarray = parts["absmax"].numpy()
        return single
    state = state_of(parts)
    of_code = parts["nested_quant_map"].numpy()[parts["absmax"].numpy()]
    scale = parts["nested_absmax"].numpy().repeat(state["nested_blocksize"])[: len(of_code)]
    absmax: np.ndarray = of_code * scale + np.float32(state["nested_offset"])
    return absmax


def state_of(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    (found,) = (part for end, part in parts.items() if end.startswith("quant_state"))
    return dict(json.loads(bytes(found.tolist())))


def values_of(parts: Mapping[str, Tensor]) -> Tensor:
    """What a weight of 4 bits is, in float32."""
    state = state_of(parts)
    packed = parts[""].contiguous().view(torch.uint8).numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    count = math.prod(state["shape"])
    absmax = absmax_of(parts).repeat(state["blocksize"])[:count]
    return torch.from_numpy(parts["quant_map"].numpy()[codes[:count]] * absmax).view(state["shape"])


def values_of_eight(parts: Mapping[str, Tensor]) -> Tensor:
    """What a weight of 8 bits is, in float32."""
    scaled = parts["weight"].numpy().astype(np.float32) * parts["SCB"].numpy()[:, None]
    return torch.from_numpy(scaled * np.float32(0.007874015718698502))
