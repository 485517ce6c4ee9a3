"""Integers of compressed-tensors: which tensors are a weight of them, which are refused, and what the library reads."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardmerge.codecs import packing
from shardmerge.codecs.codec import Codec
from shardmerge.codecs.integers import PLAIN_INTEGERS
from shardmerge.codecs.packed_integers import PACKED_INTEGERS
from shardmerge.spec.tensors import TensorRef, Weight
from tests.support.peft_oracle import random
from tests.support.quantised_packs import as_stored, encoded, integer_parts, integer_values, packed, unpacked

Q, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.61.mlp.experts.7.down_proj"
SHAPE = (48, 96)
Tensors = dict[str, Tensor]


def config(*groups: dict[str, Any], **settings: Any) -> dict[str, Any]:
    named = {f"group_{at}": {"targets": ["Linear"], "weights": weights} for at, weights in enumerate(groups)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": named, **settings}}


def scheme(bits: int = 4, group: Any = 32, **changes: Any) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group, **changes}


def tensors(name: str = Q, shape: tuple[int, int] = SHAPE, **how: Any) -> Tensors:
    return {f"{name}.{end}": part for end, part in integer_parts(random(*shape, seed=1), **how).items()}


def claims(stored: Tensors, said: dict[str, Any], codec: Codec = PACKED_INTEGERS) -> list[Weight | str]:
    return list(codec.claims(as_stored(stored), said))


def one(stored: Tensors, said: dict[str, Any], codec: Codec = PACKED_INTEGERS) -> Weight:
    (found,) = claims(stored, said, codec)
    assert isinstance(found, Weight), found
    return found


# --- claims -----------------------------------------------------------------------------------------------------------


def test_kimis_experts() -> None:
    stored = {**tensors(EXPERT), "model.norm.weight": torch.ones(96), **tensors(Q)}
    found = claims(stored, config(scheme()))
    assert [weight.name for weight in found if isinstance(weight, Weight)] == [f"{EXPERT}.weight", f"{Q}.weight"]
    weight = found[0]
    assert isinstance(weight, Weight) and weight.stored_as is not None
    assert (weight.tensor.dtype, weight.tensor.shape, weight.shard) == ("I32", SHAPE, "model.safetensors")
    assert [role for role, _ in weight.parts] == ["values", "scale", "weight_shape"]
    (output,) = PACKED_INTEGERS.outputs(weight.name, SHAPE, weight.stored_as)
    assert (output.name, output.dtype, output.shape) == (f"{EXPERT}.weight_packed", "I32", (48, 12))
    assert dict(weight.stored_as.settings) == {"bits": 4, "scales": "group"}


@pytest.mark.parametrize("columns", [96, 97, 100, 103])
def test_without_groups_weight_shape_says_how_many_columns_there_are(columns: int) -> None:
    """Of 4 bits, 97 to 104 columns take as many words."""
    weight = one(tensors(shape=(48, columns), group=None), config(scheme(group=None)))
    assert weight.tensor.shape == (48, columns)


def test_two_schemes_of_which_either_fits_are_told_apart_by_weight_shape() -> None:
    """32 columns of 4 bits take as many words as 16 of 8."""
    said = config(scheme(), scheme(8, 16))
    assert one(tensors(), said).tensor.shape == SHAPE
    eight = one(tensors(bits=8, group=16), said)
    assert eight.tensor.shape == SHAPE and eight.stored_as is not None
    assert eight.stored_as.setting("bits") == 8


def test_weight_shape_is_read_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, asked = as_stored(tensors()), []

    def contents(refs: list[TensorRef]) -> dict[str, bytes]:
        asked.extend(refs)
        return {}

    monkeypatch.setattr(stored, "contents", contents)
    list(PACKED_INTEGERS.claims(stored, config(scheme())))
    assert not asked


def test_zero_points_and_the_order_of_columns_are_parts() -> None:
    order = (torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32).int()
    weight = one(tensors(symmetric=False, order=order), config(scheme(symmetric=False)))
    parts = dict(weight.parts)
    assert parts["zeros"].shape == (6, 3) and parts["order"].shape == (96,)
    assert weight.stored_as is not None
    assert weight.stored_as.setting("zeros") and weight.stored_as.setting("order")


@pytest.mark.parametrize("group", [None, -1])
def test_plain_integers(group: int | None) -> None:
    stored = tensors(bits=8, group=group, is_packed=False) | {f"{Q}.input_scale": torch.ones(1)}
    said = config(scheme(8, None, strategy="tensor" if group else "channel"))
    weight = one(stored, said, PLAIN_INTEGERS)
    assert (weight.tensor.dtype, weight.tensor.shape) == ("I8", SHAPE)
    assert dict(weight.parts)["scale"].shape == ((1, 1) if group else (48, 1))
    assert dict(weight.parts)["input_scale"].name == f"{Q}.input_scale"


def changed(**parts: Any) -> Tensors:
    return {**tensors(), **{f"{Q}.{name}": part for name, part in parts.items()}}


@pytest.mark.parametrize(
    ("stored", "said", "expected"),
    [
        (changed(weight_scale=torch.ones(48, 4)), config(scheme()), r"its scale is F32 \[48, 4\].*none of these fits"),
        (changed(weight_scale=torch.ones(47, 3)), config(scheme()), r"its scale is F32 \[47, 3\]"),
        (changed(weight_scale=torch.ones(48, 3).int()), config(scheme()), r"its scale is I32 .*expected is F32"),
        (changed(weight_packed=torch.ones(48, 13).int()), config(scheme()), r"I32 \[48, 13\], but .*none of these"),
        (changed(weight_packed=torch.ones(2, 48, 12).int()), config(scheme()), r"\[2, 48, 12\], but expected is a mat"),
        (
            changed(weight_scale=torch.tensor(1.0), weight_shape=torch.tensor(1)),
            config(scheme(group=None, strategy="tensor")),
            r"its scale is F32 \[\].*none of these fits",
        ),
        (
            changed(weight_scale=torch.tensor(1.0), weight_zero_point=torch.tensor(1).int()),
            config(scheme(group=None, strategy="tensor", symmetric=False)),
            r"its zero points are I32 \[\]",
        ),
        (changed(), config(scheme(8)), r"says int of 8 bits with a scale for 32 columns: none of these fits"),
        (changed(), config(), r"config\.json says no integers"),
        (changed(), config(scheme(group="32")), r"config\.json says no integers"),
        (changed(), config(scheme(bits=99)), r"config\.json says no integers"),
        (changed(), config(scheme(symmetric=False)), r"its zero points are missing.*and zero points: none of these"),
        (changed(weight_zero_point=torch.ones(6, 3).int()), config(scheme()), r"zero points are I32 \[6, 3\].*none of"),
        (
            tensors(symmetric=False) | {f"{Q}.weight_zero_point": torch.ones(5, 3).int()},
            config(scheme(symmetric=False)),
            r"its zero points are I32 \[5, 3\]",
        ),
        (changed(weight_g_idx=torch.zeros(95).int()), config(scheme()), r"weight_g_idx is I32 \[95\]; expected is I32"),
        (
            tensors(group=None) | {f"{Q}.weight_shape": torch.tensor([48, 200])},
            config(scheme(group=None)),
            r"its weight_shape is \[48, 200\]",
        ),
        (
            {name: part for name, part in tensors(group=None).items() if not name.endswith("_shape")},
            config(scheme(group=None)),
            r"its weight_shape is not needed or missing.*none of these fits",
        ),
        (changed(), config(scheme(), format="marlin-24"), r"config\.json says the format marlin-24"),
        (changed(), config(scheme(), sparsity_config={"format": "sparse-24-bitmask"}), r"sparse-24-bitmask"),
        (changed(), config(scheme(), transform_config={"config_groups": {"u": {}}}), r"weights are stored rotated"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(stored: Tensors, said: dict[str, Any], expected: str) -> None:
    (found,) = claims(stored, said)
    assert isinstance(found, str) and found.startswith(f"{Q}.weight_packed is stored by compressed-tensors")
    assert re.search(expected, found), found


def test_other_methods_are_not_ours() -> None:
    assert not claims(tensors(), {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert not claims(tensors(), {})
    assert not claims(tensors(bits=8, group=None, is_packed=False), {}, PLAIN_INTEGERS)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_a_stream_of_bits(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, count))
    words = packed(codes, bits)
    assert np.array_equal(unpacked(words, bits, count), codes)
    assert np.array_equal(packing.unpack(words, bits, count).numpy(), codes)
    into = torch.full_like(words, -1)
    packing.pack(torch.from_numpy(codes).to(torch.uint8), bits, into)
    assert torch.equal(into, words)
    if count > 3:
        assert np.array_equal(packing.unpack(words, bits, count - 3, 3 * bits).numpy(), codes[:, 3:])


# --- the library ------------------------------------------------------------------------------------------------------


def library_args(bits: int, group: int | None, symmetric: bool) -> Any:
    scheme_of = pytest.importorskip("compressed_tensors.quantization")
    strategy = "tensor" if group == -1 else "group" if group else "channel"
    weights = scheme_of.QuantizationArgs(
        num_bits=bits,
        type="int",
        strategy=strategy,
        group_size=group if group and group > 0 else None,
        symmetric=symmetric,
    )
    return scheme_of.QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_reads_and_packs_the_same(bits: int, group: int | None, symmetric: bool) -> None:
    """It reads what the definition reads, with which the codec is compared bit for bit, and rounds as the codec."""
    scheme_of = library_args(bits, group, symmetric)
    compressor = pytest.importorskip("compressed_tensors.compressors.pack_quantized").PackedQuantizationCompressor
    stored = tensors(bits=bits, group=group, symmetric=symmetric, dtype=torch.float32)
    parts = {name.removeprefix(f"{Q}."): part for name, part in stored.items()}
    assert torch.equal(compressor.decompress(parts, scheme_of)["weight"], integer_values(parts, SHAPE, bits))
    values = random(*SHAPE, seed=3)
    state = {"weight": values, "weight_scale": parts["weight_scale"]}
    if not symmetric:
        zeros = torch.from_numpy(unpacked(parts["weight_zero_point"].T, bits, 48).T - (1 << (bits - 1)))
        state["weight_zero_point"] = zeros.to(torch.int8)
    made = compressor.compress(state, scheme_of)
    weight = one(stored, config(scheme(bits, group, symmetric=symmetric)))
    assert torch.equal(encoded(PACKED_INTEGERS, weight, stored, values), made["weight_packed"])
    if not symmetric:
        assert torch.equal(made["weight_zero_point"], parts["weight_zero_point"])


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, -1])
def test_compressed_tensors_reads_and_rounds_plain_integers_the_same(group: int | None, symmetric: bool) -> None:
    scheme_of = library_args(8, group, symmetric)
    compressor = pytest.importorskip("compressed_tensors.compressors.naive_quantized").IntQuantizationCompressor
    stored = tensors(bits=8, group=group, symmetric=symmetric, dtype=torch.float32, is_packed=False)
    parts = {name.removeprefix(f"{Q}."): part for name, part in stored.items()}
    assert torch.equal(compressor.decompress(parts, scheme_of)["weight"], integer_values(parts, SHAPE, 8))
    values = random(*SHAPE, seed=3)
    made = compressor.compress({**parts, "weight": values}, scheme_of)
    said = scheme(8, None, strategy="tensor" if group else "channel", symmetric=symmetric)
    weight = one(stored, config(said), PLAIN_INTEGERS)
    assert torch.equal(encoded(PLAIN_INTEGERS, weight, stored, values), made["weight"])
