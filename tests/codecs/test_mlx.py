"""MLX's formats: which tensors are a weight of them, which are refused, and what MLX itself reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardmerge.codecs.mlx import MLX_AFFINE
from shardmerge.codecs.quantization import quantization
from shardmerge.codecs.registry import CODECS
from shardmerge.spec.tensors import Weight
from tests.support.peft_oracle import random
from tests.support.quantised_mlx import MODES, mlx_config, mlx_parts, mlx_values
from tests.support.quantised_packs import as_stored, encoded

Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.switch_mlp.down_proj"
SHAPE = (48, 96)
Tensors = dict[str, Tensor]


def tensors(name: str = Q, shape: tuple[int, ...] = SHAPE, **how: Any) -> Tensors:
    return {f"{name}.{end}": part for end, part in mlx_parts(random(*shape, seed=1), **how).items()}


def claims(stored: Tensors, config: dict[str, Any]) -> list[Weight | str]:
    return list(MLX_AFFINE.claims(as_stored(stored), config))


def one(stored: Tensors, config: dict[str, Any]) -> Weight:
    (found,) = claims(stored, config)
    assert isinstance(found, Weight), found
    return found


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_affine(bits: int) -> None:
    stored = {**tensors(bits=bits), "model.norm.weight": torch.ones(96), f"{Q}.bias": torch.ones(48)}
    weight = one(stored, mlx_config(bits=bits))
    assert (weight.name, weight.tensor.dtype, weight.tensor.shape) == (f"{Q}.weight", "U32", SHAPE)
    assert [(role, ref.shape) for role, ref in weight.parts[1:]] == [("scales", (48, 3)), ("biases", (48, 3))]
    assert weight.stored_as is not None and dict(weight.stored_as.settings) == {"bits": bits}
    (output,) = MLX_AFFINE.outputs(weight.name, SHAPE, weight.stored_as)
    assert (output.name, output.dtype, output.shape) == (f"{Q}.weight", "U32", (48, 3 * bits))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [SHAPE, (3, *SHAPE)])
def test_other_modes_are_of_the_codecs_of_their_numbers(mode: str, shape: tuple[int, ...]) -> None:
    bits, group = MODES[mode]
    weight = one(tensors(EXPERTS, shape, mode=mode), mlx_config(mode, bits, group))
    assert weight.stored_as is not None and weight.stored_as.codec == ("fp8" if bits == 8 else "fp4")
    assert (weight.tensor.shape, weight.stored_as.row_dims) == (shape, len(shape) - 1)
    ((role, scale),) = weight.parts[1:]
    assert (role, scale.shape) == ("scale", (math.prod(shape[:-1]), 96 // group))
    assert scale.dtype == ("F8_E4M3" if mode == "nvfp4" else "F8_E8M0")
    (output,) = CODECS[weight.stored_as.codec].outputs(weight.name, shape, weight.stored_as)
    assert (output.dtype, output.shape) == ("U32", (*shape[:-1], 96 * bits // 32))


def test_experts_of_a_layer_are_one_weight() -> None:
    weight = one(tensors(EXPERTS, (3, *SHAPE)), mlx_config())
    assert weight.tensor.shape == (3, *SHAPE) and dict(weight.parts)["biases"].shape == (144, 3)


def test_what_config_json_gives_a_module_holds_for_it() -> None:
    stored = {**tensors(bits=8), **tensors(EXPERTS, group=32, mode="mxfp4"), **tensors("lm_head", bits=4)}
    said = mlx_config(of_modules={Q: {"group_size": 32, "bits": 8}, EXPERTS: {"mode": "mxfp4"}, "lm_head": True})
    found = claims(stored, said)
    kinds = {weight.name: weight.stored_as for weight in found if isinstance(weight, Weight)}
    assert [kind.codec for kind in kinds.values() if kind] == ["mlx-affine", "fp4", "mlx-affine"]
    assert [kind.setting("bits") for kind in kinds.values() if kind] == [8, None, 4]


@pytest.mark.parametrize("keys", [("quantization",), ("quantization", "quantization_config")])
def test_the_settings_are_those_of_the_key_that_mlx_reads(keys: tuple[str, ...]) -> None:
    config = {key: {"group_size": 32, "bits": 4} for key in keys}
    assert quantization(config) == {"quant_method": "mlx", "group_size": 32, "bits": 4}
    assert one(tensors(), config).tensor.shape == SHAPE


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}])
def test_of_another_method_nothing_is_claimed(config: dict[str, Any]) -> None:
    assert claims(tensors(), config) == []


def changed(**parts: Tensor | None) -> Tensors:
    stored: dict[str, Tensor | None] = {**tensors(), **{f"{Q}.{name}": part for name, part in parts.items()}}
    return {name: part for name, part in stored.items() if part is not None}


@pytest.mark.parametrize(
    ("stored", "config", "expected"),
    [
        (changed(scales=torch.ones(48, 4)), mlx_config(), "scales is F32 [48, 4], and config.json says 4 bits in gro"),
        (changed(scales=torch.ones(47, 3)), mlx_config(), "scales is F32 [47, 3]"),
        (changed(), mlx_config(bits=8), "scales is BF16 [48, 3], and config.json says 8 bits in groups of 32"),
        (changed(), mlx_config(bits=3), "config.json says 3 bits in groups of 32"),
        (changed(), mlx_config(group=64), "config.json says 4 bits in groups of 64"),
        (changed(biases=None), mlx_config(), "its biases are missing; expected are floats, of each as many"),
        (changed(biases=torch.ones(48, 2)), mlx_config(), "its biases are F32 [48, 2]"),
        (changed(biases=torch.ones(48, 3).int()), mlx_config(), "its biases are I32 [48, 3]; expected are floats"),
        (changed(scales=torch.ones(48, 3).byte()), mlx_config(), "its scales are U8 [48, 3]"),
        (changed(weight=torch.ones(48, 96)), mlx_config(), "scales is beside it; expected is a matrix of U32"),
        (changed(weight=torch.ones(48, 12).int()), mlx_config(), "expected is a matrix of U32"),
        (
            changed(),
            mlx_config(of_modules={Q: False}),
            f"config.json's quantization has False for {Q}, and its scales are",
        ),
        (changed(), mlx_config(of_modules={Q: "4bit"}), f"config.json's quantization has '4bit' for {Q}"),
        (changed(), mlx_config("hqq"), "the mode 'hqq'; expected is affine, mxfp4, mxfp8, nvfp4"),
        (changed(), mlx_config(["affine"]), "the mode ['affine']; expected"),  # type: ignore[arg-type]
        (changed(), mlx_config(bits=7), "bits 7; expected of affine is 1, 2, 3, 4, 5, 6, 8"),
        (changed(), mlx_config(bits=True), "bits True; expected of affine"),
        (changed(), mlx_config(group=48), "group_size 48; expected of affine is 32, 64, 128"),
        (changed(), mlx_config("mxfp4"), "its scales are BF16 and has"),
        (
            tensors(mode="mxfp4") | {f"{Q}.biases": torch.ones(48, 3)},
            mlx_config("mxfp4"),
            "expected are U8 and no bias",
        ),
        (changed(), mlx_config("nvfp4", group=16), "config.json says 4 bits in groups of 16"),
        (
            tensors(mode="nvfp4") | {f"{Q}.global_scale": torch.ones(1)},
            mlx_config("nvfp4", group=16),
            "global_scale is beside it, which cannot be read",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(stored: Tensors, config: dict[str, Any], expected: str) -> None:
    (found,) = claims(stored, config)
    assert isinstance(found, str) and found.startswith(f"{Q}.weight is stored by MLX as ") and expected in found


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_scale_may_be_negative_and_ties_go_to_the_even_code() -> None:
    stored = tensors(bits=2)
    stored[f"{Q}.scales"], stored[f"{Q}.biases"] = torch.full((48, 3), -0.5), torch.full((48, 3), 1.0)
    weight = one(stored, mlx_config(bits=2))
    values = torch.tensor([1.0, 0.75, 0.25, -0.25, -9.0, 9.0, 0.5, 0.0] * 12).repeat(48, 1)
    codes = encoded(MLX_AFFINE, weight, stored, values)
    read = mlx_values({**{end: stored[f"{Q}.{end}"] for end in ("scales", "biases")}, "weight": codes}, 96)
    assert read[0, :8].tolist() == [1.0, 1.0, 0.0, 0.0, -0.5, 1.0, 0.5, 0.0]


# --- what MLX reads ---------------------------------------------------------------------------------------------------


def of_mlx(tensor: Any, mx: Any) -> Tensor:
    """An array of MLX as a tensor."""
    if tensor.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(tensor.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor))


def to_mlx(tensor: Tensor, mx: Any) -> Any:
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.int16).numpy().view(np.uint16)).view(mx.bfloat16)
    return mx.array(tensor.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_affine_weights_of_mlx_are_what_mlx_reads_in_float32(bits: int, group: int, dtype: str) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = to_mlx(random(40, 256, seed=3, scale=0.05), mx).astype(getattr(mx, dtype))
    parts = mx.quantize(weight, group_size=group, bits=bits)
    wide = mx.dequantize(parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32), group, bits)
    stored = {f"{Q}.{end}": of_mlx(part, mx) for end, part in zip(("weight", "scales", "biases"), parts, strict=True)}
    claimed = one(stored, mlx_config(bits=bits, group=group))
    assert torch.equal(decoded(claimed, stored), of_mlx(wide, mx))
    # Encoding what was read gives MLX's codes.
    again = encoded(MLX_AFFINE, claimed, stored, of_mlx(wide, mx).clone())
    assert torch.equal(again.view(torch.int32), stored[f"{Q}.weight"].view(torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_floats_of_mlx_are_what_mlx_reads(mode: str) -> None:
    mx = pytest.importorskip("mlx.core")
    bits, group = MODES[mode]
    parts = mx.quantize(to_mlx(random(40, 256, seed=3, scale=0.05), mx), mode=mode)
    read = of_mlx(mx.dequantize(*parts, mode=mode, dtype=mx.float32), mx)
    stored = {f"{Q}.{end}": of_mlx(part, mx) for end, part in zip(("weight", "scales"), parts, strict=True)}
    claimed = one(stored, mlx_config(mode, bits, group))
    assert torch.equal(decoded(claimed, stored), read)
    assert claimed.stored_as is not None
    again = encoded(CODECS[claimed.stored_as.codec], claimed, stored, read.clone())
    assert torch.equal(again.view(torch.int32), stored[f"{Q}.weight"].view(torch.int32))


def decoded(weight: Weight, stored: Tensors) -> Tensor:
    """What our codec reads."""
    from types import SimpleNamespace

    from shardmerge.codecs.rounding import NUMBER_DTYPES
    from shardmerge.spec.tensors import RowRange

    assert weight.stored_as is not None
    parts = {role: stored[ref.name].view(NUMBER_DTYPES[ref.dtype]).view(ref.shape) for role, ref in weight.parts[1:]}
    tile = torch.empty(weight.tensor.shape)
    slot: Any = SimpleNamespace(
        tensor=SimpleNamespace(decoding=weight.stored_as),
        rows=RowRange(0, len(tile)),
        part=lambda role, rows: parts[role][rows.start : rows.stop],
    )
    CODECS[weight.stored_as.codec].decode(slot, stored[weight.name], tile)
    return tile
