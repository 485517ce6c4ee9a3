"""Which tensors a file has and what they are made of, and every reason to refuse."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from typing import Any

import pytest

from shardmerge.codecs.ggml import BLOCKS, nbytes
from shardmerge.gguf.formats import padded
from shardmerge.gguf.generated import RopeScaling
from shardmerge.gguf.layout import Layout, OutputTensor, Part, lay_out
from shardmerge.gguf.model import DEFAULTS, read_model
from shardmerge.spec.plans import jsonable
from shardmerge.spec.tensors import RowRange
from tests.support.builders import run_python
from tests.support.gguf_shapes import LLAMA, SHAPES, refs


def laid_out(
    config: dict[str, Any] | None = None, quantization: str = "Q8_0", dtype: str = "BF16", **changes: Any
) -> Layout:
    """``changes``: shapes by name with ``__`` for a dot; None takes one out."""
    model, problems = read_model(LLAMA if config is None else config)
    assert model, problems
    shapes = {**SHAPES, **{name.replace("__", "."): shape for name, shape in changes.items()}}
    return lay_out(
        model, [refs({name: shape for name, shape in shapes.items() if shape is not None}, dtype)], quantization
    )


def tensor(layout: Layout, name: str) -> OutputTensor:
    return next(tensor for tensor in layout.tensors if tensor.name == name)


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_tensors_come_in_the_order_of_their_stored_names() -> None:
    layout = laid_out()
    assert not layout.problems and not layout.dropped
    assert [part.tensor for tensor in layout.tensors for part in tensor.parts] == sorted(SHAPES)


def test_files_come_one_after_the_other() -> None:
    model, _ = read_model(LLAMA)
    assert model
    names = list(SHAPES)
    shards = [refs({name: SHAPES[name] for name in part}) for part in (names[6:], names[:6])]
    layout = lay_out(model, shards, "F16")
    assert [tensor.parts[0].tensor for tensor in layout.tensors] == [*sorted(names[6:]), *sorted(names[:6])]


def test_offsets_are_padded_and_sizes_add_up() -> None:
    layout = laid_out(quantization="Q5_1")
    at = 0
    for tensor_ in layout.tensors:
        assert tensor_.offset == at and at % 32 == 0
        assert tensor_.nbytes == nbytes(tensor_.kind, tensor_.shape) == tensor_.rows * tensor_.row_nbytes
        at += padded(tensor_.nbytes)
    assert layout.data_bytes == at


def test_heads_are_turned_by_a_group_of_rows() -> None:
    layout = laid_out()
    assert tensor(layout, "blk.0.attn_q.weight").shuffle == (4, 2, 8)
    assert tensor(layout, "blk.0.attn_k.weight").shuffle == (2, 2, 8)
    assert tensor(layout, "blk.0.attn_q.weight").group == 16
    assert tensor(layout, "blk.0.attn_v.weight").shuffle is None
    assert tensor(layout, "blk.0.attn_v.weight").group == 1


def test_a_bias_is_a_vector_of_float32_and_turned_whole() -> None:
    layout = laid_out(LLAMA | {"attention_bias": True}, model__layers__0__self_attn__q_proj__bias=(64,))
    bias = tensor(layout, "blk.0.attn_q.bias")
    assert (bias.kind, bias.shape, bias.rows, bias.columns, bias.group) == ("F32", (64,), 1, 64, 1)
    assert bias.shuffle == (4, 2, 8)


def test_experts_are_stacked_in_their_order_where_the_last_of_a_layer_was() -> None:
    config = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 12}
    model, _ = read_model(config)
    assert model
    moe = "model.layers.0.block_sparse_moe"
    shapes = {name: shape for name, shape in SHAPES.items() if ".mlp." not in name}
    shapes |= {f"{moe}.gate.weight": (12, 64)}
    for expert in range(12):
        for name, shape in (("w1", (80, 64)), ("w2", (64, 80)), ("w3", (80, 64))):
            shapes[f"{moe}.experts.{expert}.{name}.weight"] = shape
    layout = lay_out(model, [refs(shapes)], "Q4_0")
    assert not layout.problems
    names = [tensor.name for tensor in layout.tensors]
    assert names[1:5] == [f"blk.0.ffn_{name}.weight" for name in ("gate_exps", "down_exps", "up_exps", "gate_inp")]
    stack = tensor(layout, "blk.0.ffn_up_exps.weight")
    assert (stack.shape, stack.rows, stack.kind) == ((12, 80, 64), 960, "Q4_0")
    assert stack.parts == tuple(Part(f"{moe}.experts.{expert}.w3.weight", RowRange(0, 80)) for expert in range(12))
    assert tensor(layout, "blk.0.ffn_gate_inp.weight").kind == "F32"


def test_rope_scaling_of_llama_3_makes_a_tensor_of_its_own() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    layout = laid_out(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    first = layout.tensors[0]
    assert (first.name, first.kind, first.shape, first.parts) == ("rope_freqs.weight", "F32", (8,), ())
    assert first.values == RopeScaling(5e5, 16, 8.0, 1.0, 4.0, 64)


def test_the_head_of_few_bits_is_kept_finer() -> None:
    assert tensor(laid_out(quantization="Q4_0"), "token_embd.weight").kind == "Q8_0"
    untied = laid_out(quantization="Q4_0", lm_head__weight=(96, 64))
    assert [tensor(untied, name).kind for name in ("token_embd.weight", "output.weight")] == ["Q4_0", "Q8_0"]


@pytest.mark.parametrize("quantization", BLOCKS)
def test_rows_that_are_no_blocks_are_float16(quantization: str) -> None:
    kinds = {tensor.name: tensor.kind for tensor in laid_out(quantization=quantization).tensors}
    whole = BLOCKS[quantization][0] == 1
    assert kinds["blk.0.ffn_down.weight"] == (quantization if whole else "F16")
    assert kinds["blk.0.ffn_up.weight"] == quantization
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"


def test_frequencies_that_a_checkpoint_stores_are_dropped() -> None:
    layout = laid_out(model__layers__0__self_attn__rotary_emb__inv_freq=(8,))
    assert layout.dropped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert not layout.problems


def test_gemma_adds_one_to_norms_and_may_cut_rows_off() -> None:
    config = LLAMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 90}
    norms: dict[str, Any] = {
        f"model__layers__0__{name}__weight": (64,)
        for name in (
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "self_attn__q_norm",
            "self_attn__k_norm",
        )
    }
    layout = laid_out(config, dtype="F16", **norms)
    assert not layout.problems
    assert {tensor.addend for tensor in layout.tensors if tensor.name.endswith("norm.weight")} == {1.0}
    assert {tensor.addend for tensor in layout.tensors if not tensor.name.endswith("norm.weight")} == {0.0}
    assert tensor(layout, "blk.0.attn_norm.weight").dtype == "F16"  # in which 1 is then added
    embedding = tensor(layout, "token_embd.weight")
    assert (embedding.shape, embedding.parts[0].rows) == ((90, 64), RowRange(0, 90))


def test_a_layout_is_data() -> None:
    layout = laid_out(quantization="Q4_1")
    assert pickle.loads(pickle.dumps(layout)) == layout
    json.dumps(jsonable(layout))
    for cls in (Layout, OutputTensor, Part):
        assert "__slots__" in cls.__dict__
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.tensors[0].name = "x"  # type: ignore[misc]


def test_planning_needs_no_torch() -> None:
    code = "import shardmerge.gguf, sys; print({'torch', 'numpy', 'tokenizers', 'gguf'} & set(sys.modules))"
    assert run_python("-c", code).stdout.strip() == "set()"


# --- refused ----------------------------------------------------------------------------------------------------------

PREFIX = "model__layers__0__"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}self_attn__q_norm__weight": (16,)}, "q_norm.weight: LlamaForCausalLM has no such weight in GGUF"),
        ({"score__weight": (2, 64)}, "score.weight: LlamaForCausalLM has no such weight"),
        ({"lm_head__bias": (96,)}, "lm_head.bias: LlamaForCausalLM has no such weight"),
        ({"model__layers__1__mlp__up_proj__weight": (80, 64)}, "config.json says that there are 1 layers"),
        ({f"{PREFIX}mlp__up_proj__weight": None}, "lacks the weights of 1 tensors.*blk.0.ffn_up.weight"),
        ({f"{PREFIX}mlp__up_proj__weight": (80, 64, 1)}, "expected 2 dimensions"),
        ({f"{PREFIX}mlp__up_proj__weight": (0, 64)}, r"its shape is \[0, 64\]"),
        ({f"{PREFIX}self_attn__q_proj__weight": (60, 64)}, "60 rows are not pairs in 4 heads"),
        ({"model__embed_tokens__weight": (97, 64)}, "it has 97 rows; config.json's vocab_size is 96"),
    ],
)
def test_tensors_that_do_not_fit_are_told(changes: dict[str, Any], message: str) -> None:
    problems = laid_out(**changes).problems
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems


def test_all_problems_are_told_at_once() -> None:
    layout = laid_out(a__weight=(1, 2), b__weight=(1, 2), c__weight=(1, 2))
    assert len(layout.problems) == 3


@pytest.mark.parametrize("dtype", ["F64", "I64", "F8_E4M3", "U8"])
def test_other_dtypes_are_told(dtype: str) -> None:
    problems = laid_out(dtype=dtype).problems
    assert len(problems) == len(SHAPES)
    assert all(f"it is stored as {dtype}; expected one of F32, F16, BF16" in problem for problem in problems)


def test_a_head_of_its_own_where_llama_cpp_has_none() -> None:
    config = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    assert any(
        "no output head of its own" in problem for problem in laid_out(config, lm_head__weight=(96, 64)).problems
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM cannot be written as GGUF: supported are Gemma2"),
        ({"architectures": []}, "architectures does not name a class"),
        ({"architectures": "LlamaForCausalLM"}, "architectures does not name a class"),
        ({"architectures": None}, "architectures does not name a class"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; LlamaForCausalLM has 'llama'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the base is quantised"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a positive whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "rope settings by kind of layer"),
    ],
)
def test_configs_that_cannot_be_written_are_told(changes: dict[str, Any], message: str) -> None:
    model, problems = read_model(LLAMA | changes)
    assert model is None
    assert any(message in problem for problem in problems), problems


def test_qwen_moe_with_dense_layers_is_told() -> None:
    config = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": [0]}
    assert "dense layers" in read_model(config)[1][0]


def test_defaults_are_those_of_transformers() -> None:
    from transformers import AutoConfig

    for model_type, defaults in DEFAULTS.items():
        config = AutoConfig.for_model(model_type).to_dict()
        found = {
            key: config["rope_parameters"]["rope_theta"]
            if key == "rope_theta"
            else config.get(key, config.get("num_local_experts") if key == "num_experts" else None)
            for key in defaults
        }
        assert found == dict(defaults), model_type
