"""An adapter whose target the base stores quantised: the message says as what, and by which method. All else merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge
from tests.support.builders import (
    DOWN1,
    GATE0,
    Q0,
    V0,
    Tensors,
    llama_tensors,
    make_place,
    model_config,
    peft_tensors,
    read_tensors,
    write_peft,
)

BYTES = torch.arange(64, dtype=torch.uint8)
SCALE = torch.ones(8, 1)
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
}
#: Method → (what stands in place of ``weight``, quantization_config, what is said), as the libraries store a Linear.
METHODS: Mapping[str, tuple[Tensors, dict[str, Any], str]] = {
    "a method that is unknown": (
        {"weight_packed": BYTES.int(), "weight_scale": SCALE, "weight_shape": torch.tensor([48, 32])},
        {"quant_method": "quark", "bits": 4},
        "stored as INT4 by quark (weight_packed, weight_scale, weight_shape)",
    ),
    "compressed-tensors fp8": (
        {"weight": torch.ones(48, 32).to(torch.float8_e5m2), "weight_scale": SCALE},
        {**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}},
        "stored as FP8 by compressed-tensors (weight of F8_E5M2, weight_scale)",
    ),
    "gptq": (
        {"qweight": BYTES.int(), "qzeros": BYTES.int(), "scales": SCALE.half(), "g_idx": BYTES.int()},
        {"quant_method": "gptq", "bits": 4},
        "stored as INT4 by gptq (g_idx, qweight, qzeros, scales)",
    ),
    "awq": (
        {"qweight": BYTES.int(), "qzeros": BYTES.int(), "scales": SCALE.half()},
        {"quant_method": "awq", "bits": 4},
        "stored as INT4 by awq",
    ),
    "bitsandbytes 4 bits": (
        {"weight": BYTES[:, None], "weight.absmax": BYTES, "weight.quant_map": torch.ones(16)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "stored as NF4 by bitsandbytes (weight of U8, weight.absmax)",
    ),
    "fp8 in blocks": (
        {"weight": torch.ones(48, 32).to(torch.float8_e5m2), "weight_scale_inv": torch.ones(1, 1)},
        {"quant_method": "fp8"},
        "stored as FP8 by fp8 (weight of F8_E5M2, weight_scale_inv)",
    ),
    "hqq": ({"W_q": BYTES, "scale": SCALE}, {"quant_method": "hqq"}, "stored as packed numbers by hqq (W_q, scale)"),
    "without a word in config.json": (
        {"weight_packed": BYTES.int(), "weight_scale": SCALE},
        {},
        "stored as packed numbers by a method that config.json does not name",
    ),
}


def base_of(folder: Path, parts: Tensors, quantization: dict[str, Any], module: str = GATE0, prefix: str = "") -> Any:
    tensors = {prefix + name: tensor for name, tensor in llama_tensors().items() if name != f"{module}.weight"}
    tensors |= {f"{prefix}{module}.{name}": tensor.clone() for name, tensor in parts.items()}
    config = model_config(quantization_config=quantization) if quantization else model_config()
    return make_place(folder, tensors=tensors, shards=1, config=config, aux={})


@pytest.mark.parametrize(("parts", "quantization", "said"), METHODS.values(), ids=METHODS)
def test_a_quantised_target_is_named_as_one(
    tmp_path: Path, parts: Tensors, quantization: dict[str, Any], said: str
) -> None:
    place = base_of(tmp_path, parts, quantization)
    write_peft(place.adapter, peft_tensors([Q0, GATE0]))
    with pytest.raises(shardmerge.PlanError) as raised:
        shardmerge.plan(place.config())
    (problem,) = raised.value.problems
    assert f"{GATE0}: its weight is quantised, {said}" in problem
    assert "not in the base" not in problem


@pytest.mark.parametrize(("parts", "quantization", "said"), METHODS.values(), ids=METHODS)
def test_what_is_not_quantised_merges(tmp_path: Path, parts: Tensors, quantization: dict[str, Any], said: str) -> None:
    place = base_of(tmp_path, parts, quantization)
    write_peft(place.adapter, peft_tensors([Q0, V0, DOWN1]))
    shardmerge.merge(place.config())
    merged = read_tensors(place.output)
    for name, tensor in parts.items():
        assert torch.equal(merged[f"{GATE0}.{name}"].view(torch.uint8), tensor.contiguous().view(torch.uint8))
    assert not torch.equal(merged[f"{Q0}.weight"], llama_tensors()[f"{Q0}.weight"])
    config = json.loads((place.output / "config.json").read_text())
    assert config.get("quantization_config", {}) == quantization


def test_by_another_prefix(tmp_path: Path) -> None:
    parts, quantization, _ = METHODS["a method that is unknown"]
    place = base_of(tmp_path, parts, quantization, prefix="language_model.")
    write_peft(place.adapter, peft_tensors([GATE0]))
    with pytest.raises(shardmerge.PlanError, match="stored as INT4 by quark"):
        shardmerge.plan(place.config())


def test_packed_experts(tmp_path: Path) -> None:
    """gpt-oss in MXFP4: experts are one parameter, packed under two names."""
    experts = "model.layers.0.mlp.experts"
    packed = {
        f"{experts}.gate_up_proj_{what}": torch.zeros(2, 8, 4, dtype=torch.uint8) for what in ("blocks", "scales")
    }
    place = make_place(
        tmp_path, tensors={**llama_tensors(), **packed}, shards=1, aux={},
        config=model_config(model_type="x", quantization_config={"quant_method": "mxfp4"}),
    )  # fmt: skip
    factors = {"A": torch.ones(8, 32), "B": torch.ones(16, 8)}
    tensors = {f"base_model.model.{experts}.gate_up_proj.lora_{role}.weight": t for role, t in factors.items()}
    write_peft(place.adapter, tensors)
    with pytest.raises(shardmerge.PlanError, match="MXFP4 by mxfp4"):
        shardmerge.plan(place.config())


def test_floats_with_a_scale_are_no_weight(tmp_path: Path) -> None:
    """The matrix is the product of both, so an update of the one alone would be scaled, too."""
    parts = {"weight": llama_tensors()[f"{GATE0}.weight"], "weight_scale": torch.ones(48, 1)}
    place = base_of(tmp_path, parts, COMPRESSED)
    write_peft(place.adapter, peft_tensors([GATE0]))
    with pytest.raises(shardmerge.PlanError, match="weight of F32, weight_scale"):
        shardmerge.plan(place.config())


def test_a_counter_beside_a_weight_is_not_a_quantisation(tmp_path: Path) -> None:
    parts = {"weight": llama_tensors()[f"{GATE0}.weight"], "num_batches_tracked": torch.tensor(3)}
    place = base_of(tmp_path, parts, {})
    write_peft(place.adapter, peft_tensors([GATE0]))
    shardmerge.plan(place.config())


def test_a_module_that_is_not_there_is_not_quantised(tmp_path: Path) -> None:
    """The same name in another layer says nothing."""
    parts, quantization, _ = METHODS["gptq"]
    place = base_of(tmp_path, parts, quantization)
    tensors = {name.replace("layers.0", "layers.7"): tensor for name, tensor in peft_tensors([GATE0]).items()}
    write_peft(place.adapter, tensors)
    with pytest.raises(shardmerge.PlanError, match="not in the base"):
        shardmerge.plan(place.config())
