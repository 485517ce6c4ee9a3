"""FP4: which tensors are a weight of it, which are refused, and what the libraries make of them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardmerge.codecs.fp4 import FP4
from shardmerge.spec.tensors import Weight
from tests.support.peft_oracle import random
from tests.support.quantised_packs import FP4_CODES, as_stored, e2m1, encoded, fp4_parts, fp4_values

Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.experts.gate_up_proj"
SHAPE = (48, 96)
METHODS = {
    "nvfp4": "compressed-tensors",
    "nvfp4-modelopt": "modelopt",
    "mxfp4": "compressed-tensors",
    "mxfp4-modelopt": "modelopt",
    "fp4-deepseek": "fp8",
}
Tensors = dict[str, Tensor]
every_kind = pytest.mark.parametrize("kind", FP4_CODES)


def config(kind: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": METHODS[kind], **settings}}


def tensors(kind: str, shape: tuple[int, ...] = SHAPE, name: str = Q) -> Tensors:
    return {f"{name}.{end}": part for end, part in fp4_parts(random(*shape, seed=1), kind).items()}


def claims(stored: Tensors, said: dict[str, Any]) -> list[Weight | str]:
    return list(FP4.claims(as_stored(stored), said))


def one(stored: Tensors, said: dict[str, Any]) -> Weight:
    (found,) = claims(stored, said)
    assert isinstance(found, Weight), found
    return found


# --- claims -----------------------------------------------------------------------------------------------------------


@every_kind
def test_a_weight(kind: str) -> None:
    stored = {**tensors(kind), f"{Q}.input_scale": torch.ones(1), "model.norm.weight": torch.ones(96)}
    weight = one(stored, config(kind))
    assert weight.stored_as is not None
    assert (weight.name, weight.tensor.shape, weight.shard) == (f"{Q}.weight", SHAPE, "model.safetensors")
    assert {ref.offset for _, ref in weight.parts} == {
        ref.offset for name, ref in as_stored(stored).items() if name != "model.norm.weight"
    }
    (output,) = FP4.outputs(weight.name, SHAPE, weight.stored_as)
    codes = stored[f"{Q}.{FP4_CODES[kind]}"]
    assert (output.name, output.shape, output.nbytes) == (f"{Q}.{FP4_CODES[kind]}", codes.shape, codes.numel())


def test_experts_of_a_layer_in_one_tensor() -> None:
    """axolotl's and torchao's: a global scale an expert."""
    parts = fp4_parts(random(3 * 48, 96, seed=1).view(3, 48, 96), "nvfp4-modelopt")
    ends = {"weight": "", "weight_scale": "_weight_scale", "weight_scale_2": "_weight_scale_2"}
    stored = {f"{EXPERTS}{ends[name]}": part for name, part in parts.items()}
    weight = one(stored, config("nvfp4-modelopt"))
    assert weight.stored_as is not None
    assert (weight.name, weight.tensor.shape, weight.stored_as.row_dims) == (EXPERTS, (3, 48, 96), 2)
    assert dict(weight.parts)["of_all"].shape == (3, 1) and weight.stored_as.setting("height") == 48
    again = encoded(FP4, weight, stored, fp4_values(parts, "nvfp4-modelopt"))
    assert torch.equal(again, parts["weight"])


def changed(kind: str, **parts: Any) -> Tensors:
    return {**tensors(kind), **{f"{Q}.{name}": part for name, part in parts.items()}}


SCALE = torch.ones(48, 6).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("stored", "said", "expected"),
    [
        (tensors("nvfp4"), config("nvfp4-modelopt"), r"quant_method is 'modelopt', not compressed-tensors"),
        (tensors("nvfp4-modelopt"), config("nvfp4"), r"quant_method is 'compressed-tensors', not modelopt"),
        (tensors("fp4-deepseek"), config("nvfp4"), r"quant_method is 'compressed-tensors', not fp8"),
        (
            tensors("fp4-deepseek"),
            {**config("fp4-deepseek"), "expert_dtype": "fp8"},
            r"FP4 of DeepSeek-V4, I8 \[48, 48\], but config\.json's expert_dtype is 'fp8'",
        ),
        (changed("nvfp4", weight_scale=SCALE[:, :5]), config("nvfp4"), r"weight_scale is F8_E4M3 \[48, 5\]; expected"),
        (changed("nvfp4", weight_scale=SCALE[:47]), config("nvfp4"), r"weight_scale is F8_E4M3 \[47, 6\]; expected"),
        (changed("nvfp4", weight_global_scale=torch.ones(2)), config("nvfp4"), r"weight_global_scale is F32 \[2\]"),
        (changed("nvfp4", weight_global_scale=torch.ones(1).half()), config("nvfp4"), r"global_scale is F16 \[1\]"),
        (
            {name: part for name, part in tensors("nvfp4").items() if "global" not in name},
            config("nvfp4"),
            r"its weight_global_scale is missing",
        ),
        (
            changed("nvfp4-modelopt", pre_quant_scale=torch.ones(96)),
            config("nvfp4-modelopt"),
            r"pre_quant_scale is beside it, so what is stored is not the model's weight",
        ),
        (changed("mxfp4", weight_packed=torch.ones(48, 40).byte()), config("mxfp4"), r"a multiple of 32 columns"),
        (
            tensors("nvfp4"),
            config("nvfp4", transform_config={"config_groups": {"u": {}}}),
            r"weights are stored rotated, which cannot be merged into",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(stored: Tensors, said: dict[str, Any], expected: str) -> None:
    (found,) = claims(stored, said)
    assert isinstance(found, str) and found.startswith(Q) and re.search(expected, found), found


def test_what_is_no_fp4_is_left_alone() -> None:
    assert not claims(tensors("nvfp4"), {})
    bitsandbytes = {f"{Q}.weight": torch.ones(2304, 1).byte(), f"{Q}.weight.absmax": torch.ones(72)}
    assert not claims(bitsandbytes, {"quantization_config": {"quant_method": "bitsandbytes"}})
    assert not claims({f"{Q}.weight": torch.ones(48, 96).byte()}, config("mxfp4"))


# --- codes ------------------------------------------------------------------------------------------------------------


def test_the_nearest_code_and_ties_to_the_even_one() -> None:
    """Of every number next to half way between two codes, and of many others."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat(
        [middles, torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(9.0))]
    )
    others = torch.cat([random(1, 2000, seed=1).flatten() * 4, torch.tensor([0.0, 1e-45, 1e30, 6.0, 7.0])])
    values = torch.cat([near, others])
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % 32)).view(1, -1)
    stored = tensors("mxfp4", (1, values.shape[1]))
    stored[f"{Q}.weight_scale"].fill_(127)  # 1
    weight = one(stored, config("mxfp4"))
    wanted = e2m1(values.double().numpy())
    for tile in (values, values.double()):
        codes = encoded(FP4, weight, stored, tile).numpy()
        assert np.array_equal(np.stack([codes & 15, codes >> 4], -1).reshape(1, -1), wanted)


# --- the libraries ----------------------------------------------------------------------------------------------------


def scheme_of(kind: str) -> Any:
    of = pytest.importorskip("compressed_tensors.quantization")
    strategy, size = ("tensor_group", 16) if kind == "nvfp4" else ("group", 32)
    weights = of.QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=size, symmetric=True)
    return of.QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_compressed_tensors_reads_and_rounds_the_same(kind: str) -> None:
    name = f"{kind.upper()}PackedCompressor"
    compressor = getattr(pytest.importorskip(f"compressed_tensors.compressors.{kind}"), name)
    stored = tensors(kind)
    parts = {name.removeprefix(f"{Q}."): part for name, part in stored.items()}
    values = compressor.decompress(parts, scheme_of(kind))["weight"]
    assert torch.equal(values, fp4_values(parts, kind).bfloat16())  # it computes in float32, and rounds once
    update = random(*SHAPE, seed=3)
    scale = parts["weight_scale"].float()
    if kind == "mxfp4":
        scale = torch.exp2(parts["weight_scale"].float() - 127)
    state = {**parts, "weight": update, "weight_scale": scale}
    made = compressor.compress(state, scheme_of(kind))["weight_packed"]
    assert torch.equal(encoded(FP4, one(stored, config(kind)), stored, update), made)


@pytest.mark.slow
def test_modelopt_reads_and_rounds_the_same() -> None:
    tensor_of = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    stored = tensors("nvfp4-modelopt")
    parts = {name.removeprefix(f"{Q}."): part for name, part in stored.items()}
    made = tensor_of(torch.Size(SHAPE), torch.float32, parts["weight"])
    values = made.dequantize(
        scale=parts["weight_scale"], double_scale=parts["weight_scale_2"], block_sizes={-1: 16}, dtype=torch.float32
    )
    assert torch.equal(values, fp4_values(parts, "nvfp4-modelopt"))
