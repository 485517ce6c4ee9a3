"""Weights as MLX quantises them, and small bases of them, made by the definitions, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.pack_bases import Packed
from tests.support.peft_oracle import random
from tests.support.quantised_bases import Tensors, linears, llama_config, others
from tests.support.quantised_packs import E2M1, e2m1, packed, unpacked

#: Of the modes but affine: bits, and columns of a group.
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def mlx_parts(
    weight: Tensor, mode: str = "affine", bits: int = 4, group: int = 32, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """The parts of a weight (…, rows, columns) by the ends of their names."""
    flat = weight.double().numpy().reshape(-1, weight.shape[-1])
    parts = _affine(flat, bits, group, dtype) if mode == "affine" else _floats(flat, mode)
    return {end: part.reshape(*weight.shape[:-1], part.shape[-1]) for end, part in parts.items()}


def _affine(values: np.ndarray, bits: int, group: int, dtype: torch.dtype) -> Tensors:
    """The end of a group with the larger magnitude is a multiple of the step, and the bias."""
    blocks, top = values.reshape(len(values), -1, group), (1 << bits) - 1
    low, high = blocks.min(-1), blocks.max(-1)
    step = np.maximum((high - low) / top, 1e-7)
    step = np.where(np.abs(low) > np.abs(high), step, -step)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    count = np.round(edge / step)
    scale = torch.from_numpy(np.where(count == 0, step, edge / np.where(count == 0, 1, count))).to(dtype)
    bias = torch.from_numpy(np.where(count == 0, 0, edge)).to(dtype)
    exact, of = scale.double().numpy()[..., None], bias.double().numpy()[..., None]
    codes = np.clip(np.round((blocks - of) / exact), 0, top).astype(np.int64).reshape(values.shape)
    return {"weight": packed(codes, bits).view(torch.uint32), "scales": scale, "biases": bias}


def _floats(values: np.ndarray, mode: str) -> Tensors:
    group = MODES[mode][1]
    blocks = values.reshape(len(values), -1, group)
    largest = np.maximum(np.abs(blocks).max(-1), 1e-9)
    if mode == "nvfp4":
        # There is no scale for all, so those of small weights are the least that E4M3 has, or 0 in MLX.
        scale = torch.from_numpy(np.maximum(largest / 6, 2.0**-9)).to(torch.float8_e4m3fn)
        exact, byte = scale.double().numpy()[..., None], scale.view(torch.uint8)
    else:
        power = np.ceil(np.log2(largest / (6 if mode == "mxfp4" else 448)))
        exact, byte = np.exp2(power)[..., None], torch.from_numpy((power + 127).astype(np.uint8))
    scaled = blocks / exact
    if mode == "mxfp8":
        data = torch.from_numpy(scaled).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).view(len(values), -1)
    else:
        codes = e2m1(np.clip(scaled, -6, 6)).reshape(len(values), -1, 2)
        data = torch.from_numpy((codes[..., 0] + 16 * codes[..., 1]).astype(np.uint8))
    return {"weight": data.view(torch.uint32), "scales": byte}


def mlx_values(parts: Mapping[str, Tensor], columns: int, mode: str = "affine") -> Tensor:
    """float32(float32(q · scale) + bias), or float32(q · scale)."""
    words = parts["weight"].reshape(-1, parts["weight"].shape[-1]).view(torch.int32)
    bits, scales = words.shape[1] * 32 // columns, parts["scales"].reshape(len(words), -1)
    codes = unpacked(words, bits, columns)
    if mode == "affine":
        numbers, grid = codes.astype(np.float64), scales.double().numpy()
    elif mode == "mxfp8":
        of_code = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        numbers, grid = of_code[codes], np.exp2(scales.double().numpy() - 127)
    else:
        numbers = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
        is_power = mode == "mxfp4"
        grid = (
            np.exp2(scales.double().numpy() - 127)
            if is_power
            else scales.contiguous().view(torch.float8_e4m3fn).double().numpy()
        )
    group = columns // scales.shape[1]
    values = (numbers * np.repeat(grid, group, 1)).astype(np.float32)
    if "biases" in parts:
        biases = parts["biases"].reshape(len(words), -1).double().numpy()
        values = (values.astype(np.float64) + np.repeat(biases, group, 1)).astype(np.float32)
    return torch.from_numpy(values).view(*parts["weight"].shape[:-1], columns)


# --- bases ------------------------------------------------------------------------------------------------------------


def mlx_config(
    mode: str = "affine", bits: int = 4, group: int = 32, of_modules: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The key twice, as mlx-lm writes it."""
    settings = {"group_size": group, "bits": bits, "mode": mode, **(of_modules or {})}
    return {"quantization": settings, "quantization_config": dict(settings)}


def mlx_base(
    mode: str = "affine",
    bits: int = 4,
    group: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    of_modules: Mapping[str, Any] | None = None,
    **config: Any,
) -> Packed:
    """A small Llama with everything quantised that has columns, as MLX does it; head and embedding, too.

    ``of_modules`` are the settings of single modules: False, or bits and group_size.
    """
    said = {"group_size": group, "bits": bits, "mode": mode, **(of_modules or {})}
    plain = others()
    embedding, head = plain.pop("model.embed_tokens.weight"), plain.pop("lm_head.weight")
    weights = {"model.embed_tokens": embedding.float(), "lm_head": head.float()}
    for seed, (module, shape) in enumerate(linears().items()):
        weights[module] = random(*shape, seed=seed, scale=0.05)
    if config.get("tie_word_embeddings"):
        del weights["lm_head"]
    tensors, values = plain, {}
    for module, weight in weights.items():
        how = said.get(module, {})
        if how is False:
            tensors[f"{module}.weight"] = weight.bfloat16()
            continue
        parts = mlx_parts(weight, mode, how.get("bits", bits), how.get("group_size", group), dtype)
        tensors |= {f"{module}.{end}": part for end, part in parts.items()}
        values[f"{module}.weight"] = mlx_values(parts, weight.shape[1], mode)
    of_config = llama_config(**config, quantization=said, quantization_config=dict(said))
    return Packed(
        of_config,
        tensors,
        values,
        lambda name: ".layers.1." in name or name.endswith("q_proj.scales"),
        read=lambda parts, shape: mlx_values(parts, shape[1], mode),
        codes="weight",
        count=1 << bits,
        constant=lambda code, shape: packed(np.full(shape, code), bits).view(torch.uint32),
    )


#: By name.
MLX_BASES: Mapping[str, Callable[[], Packed]] = {
    "affine-4": mlx_base,
    "affine-3": lambda: mlx_base(bits=3),
    "affine-8-f32": lambda: mlx_base(bits=8, dtype=torch.float32),
    "affine-6-f16": lambda: mlx_base(bits=6, dtype=torch.float16),
    **{mode: lambda mode=mode, how=how: mlx_base(mode, *how) for mode, how in MODES.items()},  # type: ignore[misc]
}
