"""bitsandbytes: which tensors are a weight of it and which are refused, and what the library itself makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardmerge.codecs.bitsandbytes import BITSANDBYTES_INT8
from shardmerge.codecs.bitsandbytes_4bit import BITSANDBYTES_4BIT
from shardmerge.codecs.codec import StoredTensors
from shardmerge.file_formats.checkpoint import open_checkpoint
from shardmerge.sources.source import open_source
from shardmerge.spec.tensors import Encoding, TensorRef, Weight
from tests.support import quantised_bnb
from tests.support.peft_oracle import random, write_base

Q, E = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.gate_up_proj"
SHAPE = (48, 80)
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True}
Tensors = dict[str, Tensor]


def opened(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> tuple[Mapping[str, Weight], tuple[str, ...]]:
    base = write_base(folder / "base", [tensors], **{"quantization_config": CONFIG, **config})
    checkpoint = open_checkpoint(open_source(str(base)))
    return checkpoint.weights, checkpoint.problems


def four(shape: tuple[int, ...] = SHAPE, name: str = f"{Q}.weight", **how: Any) -> Tensors:
    return quantised_bnb.as_weight(name, quantised_bnb.four_bits(random(*shape, seed=1), **how))


def eight() -> Tensors:
    return {f"{Q}.{name}": part for name, part in quantised_bnb.eight_bits(random(*SHAPE, seed=1)).items()}


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_of_4_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    tensors = four(kind=kind, nested=nested)
    weights, problems = opened(tmp_path, {**tensors, "model.norm.weight": torch.ones(80)})
    assert not problems and set(weights) == {f"{Q}.weight", "model.norm.weight"}
    weight = weights[f"{Q}.weight"]
    assert (weight.tensor.shape, weight.shard) == (SHAPE, "model.safetensors")
    assert {ref.name for _, ref in weight.parts} == set(tensors)
    assert weight.stored_as is not None and weight.stored_as.codec == "bnb-4bit"
    assert (
        dict(weight.stored_as.settings).items()
        >= {
            "kind": kind,
            "block": 64,
            "nested": 256 if nested else 0,
            "dtype": "U8",
        }.items()
    )
    (codes,) = BITSANDBYTES_4BIT.outputs(weight.name, SHAPE, weight.stored_as)
    assert (codes.name, codes.dtype, codes.shape) == (f"{Q}.weight", "U8", (SHAPE[0] * SHAPE[1] // 2, 1))


def test_codes_may_be_stored_as_another_dtype(tmp_path: Path) -> None:
    weights, problems = opened(tmp_path, four(storage=torch.bfloat16))
    stored_as = weights[f"{Q}.weight"].stored_as
    assert not problems and stored_as is not None
    (codes,) = BITSANDBYTES_4BIT.outputs("w", SHAPE, stored_as)
    assert (codes.dtype, codes.shape, codes.nbytes) == ("BF16", (SHAPE[0] * SHAPE[1] // 4, 1), SHAPE[0] * SHAPE[1] // 2)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    weights, problems = opened(tmp_path, four((3, 16, 24), name=E))
    weight = weights[E]
    assert not problems and weight.tensor.shape == (3, 16, 24)
    assert weight.stored_as is not None and weight.stored_as.row_dims == 2


def test_tensors_alone_are_enough_where_config_json_says_nothing(tmp_path: Path) -> None:
    weights, problems = opened(
        tmp_path, {**four(), **{f"x.{k}": v for k, v in eight().items()}}, quantization_config={}
    )
    assert not problems
    assert {weight.stored_as.codec for weight in weights.values() if weight.stored_as} == {"bnb-4bit", "bnb-int8"}


def test_a_weight_of_8_bits(tmp_path: Path) -> None:
    tensors = eight()
    weights, problems = opened(tmp_path, tensors)
    weight = weights[f"{Q}.weight"]
    assert not problems and set(weights) == {f"{Q}.weight"}
    assert {ref.name for _, ref in weight.parts} == set(tensors)
    assert (weight.tensor.shape, weight.stored_as) == (SHAPE, Encoding("bnb-int8"))
    del tensors[f"{Q}.weight_format"]  # as versions before 0.40 have it
    weights, problems = opened(tmp_path / "old", tensors)
    assert not problems and set(weights) == {f"{Q}.weight"}


def test_other_checkpoints_are_not_asked_for_contents() -> None:
    def read(refs: Any) -> Mapping[str, bytes]:
        raise AssertionError(refs)

    tensors = StoredTensors({"m.weight": TensorRef("m.weight", "f", "BF16", (4, 4), 0, 32)}, read)
    for codec in (BITSANDBYTES_4BIT, BITSANDBYTES_INT8):
        assert list(codec.claims(tensors, {"quantization_config": CONFIG})) == []


# --- refusals ---------------------------------------------------------------------------------------------------------

STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def said(**changes: Any) -> Callable[[Tensors], None]:
    """Change the JSON; None removes a key."""

    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        kept = {key: value for key, value in state.items() if value is not None}
        tensors[STATE] = quantised_bnb.json_tensor(kept)

    return change


def text(content: bytes) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({STATE: torch.tensor(list(content), dtype=torch.uint8)})


def put(end: str, part: Tensor | None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = f"{Q}.{end}"
        if part is None:
            del tensors[name]
        else:
            tensors[name] = part

    return change


WRONG: list[tuple[Callable[[Tensors], None], str]] = [
    (said(quant_type="fp4"), "quant_type 'fp4'; expected is 'nf4'"),
    (said(shape=None), "the shape None"),
    (said(shape=[3840]), "the shape [3840]"),
    (said(shape=[48.0, 80]), "the shape [48.0, 80]"),
    (said(shape=[-48, -80]), "the shape [-48, -80]"),
    (said(shape=[1 << 40, 1 << 40]), "two or three sizes"),
    (said(shape=[48, 82]), "its codes are [1920, 1]; expected is [1968, 1], for [48, 82]"),
    (said(shape=[80, 48, 1]), "rows of 1 values do not begin with an element of U8"),
    (said(shape=[True, 3840]), "the shape [True, 3840]"),
    (said(blocksize=48), "the blocksize 48; expected is a power of two"),
    (said(blocksize=64.0), "the blocksize 64.0"),
    (said(blocksize=128), "weight.absmax is U8 [60]; expected is U8 [30]"),
    (said(nested_blocksize=None), "the nested_blocksize None"),
    (said(nested_dtype="float16"), "the nested_dtype 'float16'"),
    (said(nested_offset="0"), "the nested_offset '0'; expected is a number"),
    (said(nested_offset=float("nan")), "the nested_offset nan"),
    (said(nested_blocksize=None, nested_dtype=None, nested_offset=None), "absmax is U8 [60]; expected is F32 [60]"),
    (text(b"[" * 4000), "is not JSON"),
    (text(b'{"shape": [48, 80], "shape": [80, 48]}'), "has the key 'shape' twice"),
    (text(b"{}" + b" " * 5000), "is not U8 of at most 4,096 bytes"),
    (text(b"[]"), "is not a JSON object"),
    (put("weight.absmax", None), "weight.absmax is missing; expected is U8 [60]"),
    (put("weight.absmax", torch.ones(60)), "weight.absmax is F32 [60]; expected is U8 [60]"),
    (put("weight.quant_map", torch.ones(17)), "weight.quant_map is F32 [17]; expected is F32 [16]"),
    (put("weight.nested_absmax", torch.ones(2)), "weight.nested_absmax is F32 [2]; expected is F32 [1]"),
    (put("weight.nested_quant_map", None), "weight.nested_quant_map is missing"),
    (put("weight", None), "its codes are missing"),
    (put("weight", torch.ones(60, dtype=torch.int64)), "its codes are I64"),
    (put("weight.quant_state.bitsandbytes__fp4", torch.ones(9, dtype=torch.uint8)), "is not JSON"),
    (put("weight.quant_state.bitsandbytes__nf4x", torch.ones(9, dtype=torch.uint8)), "unknown type"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG, ids=[problem for _, problem in WRONG])
def test_contradictions_are_refused(tmp_path: Path, change: Callable[[Tensors], None], problem: str) -> None:
    tensors = four()
    change(tensors)
    _, problems = opened(tmp_path, tensors)
    assert len(problems) == 1 and problem in problems[0], problems
    assert problems[0].startswith(f"{Q}.weight is stored in 4 bits by bitsandbytes, but ")


def test_an_absmax_too_many_is_refused(tmp_path: Path) -> None:
    tensors = {**four(nested=False), f"{Q}.weight.nested_absmax": torch.ones(1)}
    assert "does not mention" in opened(tmp_path, tensors)[1][0]


def test_two_states_of_one_weight_are_refused(tmp_path: Path) -> None:
    both = {**four(kind="nf4"), **{name: part for name, part in four(kind="fp4").items() if "quant_state" in name}}
    assert "several quantised formats at once" in opened(tmp_path, both)[1][0]


@pytest.mark.parametrize("tensors", [four, eight], ids=["4bit", "8bit"])
def test_another_method_in_config_json_is_refused(tmp_path: Path, tensors: Callable[[], Tensors]) -> None:
    _, problems = opened(tmp_path, tensors(), quantization_config={"quant_method": "gptq"})
    assert len(problems) == 1 and "but config.json says 'gptq'" in problems[0]


@pytest.mark.parametrize("tensors", [four, eight], ids=["4bit", "8bit"])
def test_conv1d_layers_are_refused(tmp_path: Path, tensors: Callable[[], Tensors]) -> None:
    """transformers transposes them before it quantises, so the shape is not that of the dense weight."""
    _, problems = opened(tmp_path, tensors(), model_type="gpt2")
    assert len(problems) == 1 and "of gpt2 it stores the transposes" in problems[0]


@pytest.mark.parametrize(
    ("end", "part", "problem"),
    [
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "weight_format is not 0, the layout in rows"),
        ("weight_format", torch.zeros(2, dtype=torch.uint8), "weight_format is not 0"),
        ("SCB", torch.ones(80), "SCB is F32 [80]; expected is F32 [48]"),
        ("SCB", torch.ones(48, dtype=torch.float16), "SCB is F16 [48]; expected is F32 [48]"),
        ("weight", torch.ones(48, 80), "its codes are F32 [48, 80]; expected is a matrix of I8"),
    ],
)
def test_what_is_not_llm_int8_is_refused(tmp_path: Path, end: str, part: Tensor, problem: str) -> None:
    _, problems = opened(tmp_path, {**eight(), f"{Q}.{end}": part})
    assert len(problems) == 1 and problem in problems[0]
    assert problems[0].startswith(f"{Q}.weight is stored in 8 bits by bitsandbytes, but ")


# --- the library ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_library_makes_and_reads_the_same(kind: str, nested: bool) -> None:
    """Rows are whole blocks: where they are not, its decoder for AVX-512 is wrong."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = random(256, 320, seed=3)
    parts = quantised_bnb.four_bits(values, kind, nested)
    codes, state = functional.quantize_4bit(values, blocksize=64, compress_statistics=nested, quant_type=kind)
    made = {"": codes, **state.as_dict(packed=True)}
    assert made.keys() == parts.keys()
    assert {end: (part.dtype, part.shape) for end, part in made.items() if "state" not in end} == {
        end: (part.dtype, part.shape) for end, part in parts.items() if "state" not in end
    }
    assert torch.equal(made["quant_map"], parts["quant_map"])
    if nested:
        assert torch.equal(made["nested_quant_map"], parts["nested_quant_map"])
    elif kind == "nf4":
        assert torch.equal(codes, parts[""]) and torch.equal(made["absmax"], parts["absmax"])
    # What the definition reads of the library's parts is what the library reads.
    assert torch.equal(quantised_bnb.values_of(made), functional.dequantize_4bit(codes, state))


@pytest.mark.slow
def test_the_library_reads_llm_int8_the_same() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(random(64, 96, seed=4).half())
    found = quantised_bnb.values_of_eight({"weight": codes, "SCB": scale})
    assert torch.equal(found, functional.int8_vectorwise_dequant(codes, scale))
