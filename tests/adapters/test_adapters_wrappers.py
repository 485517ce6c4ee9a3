"""Layers below wrapped modules, and parameters that are wrapped themselves: each is what PEFT makes of it.

PEFT wraps a module for two reasons that leave the same ``.base_layer`` in names: a parameter of its own is a target, or
it is an nn.MultiheadAttention.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shardmerge
from shardmerge.spec.tensors import Orientation
from tests.support.family_oracle import (
    Case,
    assert_equals_peft,
    assert_same_outputs,
    change_tensors,
    merged_by_us,
    refusal,
    relative_errors,
    write_case,
)
from tests.support.peft_oracle import assert_same_bits, make_config, merge_to, stored
from tests.support.zoo import transformers


class Block(nn.Module):
    """An attention, a layer and two matrices of its own; ``names`` are registered in their order."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(24, 24) / 5))
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.linear = nn.Linear(24, 24)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.linear(self.attention(hidden, hidden, hidden)[0])
        for name in self.names:
            hidden = torch.tanh(hidden @ getattr(self, name))
        return hidden


class Blocks(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.layers = nn.ModuleList([Block(*names), Block(*names)])

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return torch.as_tensor(hidden)


def lora(*targets: str, **settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 5, "lora_alpha": 13, "target_modules": list(targets), **settings})


def merged_in_place(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """PEFT's merge without its unloading, which misses what is below a wrapped module."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(case.net).to(dtype), case.adapter).to(dtype)
    model.merge_adapter()
    state = model.base_model.model.state_dict()
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}


def assert_as_peft(case: Case, output: Path) -> None:
    """As PEFT's merge, but for out_proj, which PEFT adds to twice and so rounds twice."""
    ours, theirs = merged_by_us(case, output), merged_in_place(case)
    assert_same_outputs(case, ours)
    errors = relative_errors(case, ours, theirs, merged_in_place(case, torch.float64))
    assert any(".out_proj." in name for name in errors)
    assert max(max(both) for name, both in errors.items() if ".out_proj." in name) < 1e-6
    plain = [name for name in ours if ".out_proj." not in name]
    assert_same_bits({name: ours[name] for name in plain}, {name: theirs[name] for name in plain})
    assert shardmerge.verify(output).raise_for_status().ok


SETTINGS: dict[str, Any] = {
    "attention": partial(lora, "attention"),
    "attention below a parameter": partial(lora, "attention", target_parameters=["gain"]),
    "layer and attention below a parameter": partial(lora, "attention", "linear", target_parameters=["gain"]),
    "a parameter by its whole name": partial(lora, "attention", target_parameters=["layers.0.gain", "1.gain"]),
    "targets as a regex": partial(lora, target_modules=r".*\.(attention|linear)", target_parameters=["gain"]),
    # PEFT asks rank_pattern and alpha_pattern for out_proj by the attention's name.
    "rank of the attention": partial(lora, "attention", rank_pattern={"attention": 3}, alpha_pattern={"attention": 7}),
    "rank of out_proj": partial(lora, "attention", rank_pattern={"out_proj": 3}, alpha_pattern={"out_proj": 7}),
    "rank of one attention": partial(
        lora, "attention", target_parameters=["gain"], rank_pattern={"0.attention": 2}, alpha_pattern={"gain": 3}
    ),
    "rsLoRA": partial(lora, "attention", use_rslora=True, rank_pattern={"attention": 3}),
}


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_attention_and_layers_below_wrapped_modules(tmp_path: Path, config: Callable[[], Any]) -> None:
    assert_as_peft(write_case(tmp_path, config(), make=lambda: Blocks("gain")), tmp_path / "out")


def test_out_proj_below_a_wrapped_attention_is_added_once(tmp_path: Path) -> None:
    """``in_proj_weight`` is a target itself here, so what is around out_proj is no wrapper of the attention's."""
    config = lora("linear", target_parameters=["attention.in_proj_weight"], rank_pattern={"out_proj": 3})
    case = write_case(tmp_path, config, make=Blocks)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    config = lora("out_proj", target_parameters=["attention.in_proj_weight"], rank_pattern={"out_proj": 3})
    case = write_case(tmp_path / "below", config, make=Blocks)
    # nn.MultiheadAttention reads out_proj's weight, so that PEFT's forward pass misses the layer; its merge does not.
    assert_same_bits(merged_by_us(case, tmp_path / "below" / "out"), merged_in_place(case))
    assert shardmerge.verify(tmp_path / "below" / "out").raise_for_status().ok


def test_what_no_wrapper_explains_is_refused(tmp_path: Path) -> None:
    case = write_case(tmp_path, lora("linear"), make=Blocks)

    def below(name: str) -> Callable[[dict[str, Tensor]], None]:
        def change(tensors: dict[str, Tensor]) -> None:
            for key in list(tensors):
                tensors[key.replace("layers.0.linear", name)] = tensors.pop(key)

        return change

    # No parameter of the layer is a target, and an nn.MultiheadAttention has no `linear`.
    change_tensors(case, below("layers.0.base_layer.linear"))
    told = refusal(case)
    assert "layers.0 is wrapped 1 times" in told and "name 0 of its parameters" in told
    # The base has nothing of an attention there.
    change_tensors(case, lambda tensors: below("x")({}))
    case = write_case(tmp_path / "other", lora("linear"), make=Blocks)
    change_tensors(case, below("layers.0.linear.base_layer.out_proj"))
    assert "layers.0.linear is wrapped 1 times" in refusal(case)
    # It is no target.
    case = write_case(tmp_path / "untargeted", lora("linear"), make=Blocks)
    change_tensors(case, below("layers.0.attention.base_layer.out_proj"))
    assert "layers.0.attention is wrapped 1 times" in refusal(case)


def test_other_methods_have_nothing_below_wrappers(tmp_path: Path) -> None:
    from peft import LoHaConfig

    case = write_case(tmp_path, LoHaConfig(r=3, target_modules=["linear"]), make=Blocks)

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".linear", ".base_layer.linear")] = tensors.pop(key)

    change_tensors(case, change)
    assert "LOHA has no layers below wrapped ones" in refusal(case)


def test_two_parameters_of_a_module_of_unknown_order_are_refused(tmp_path: Path) -> None:
    config = lora("linear", target_parameters=["gain", "turn"])
    told = refusal(write_case(tmp_path, config, make=lambda: Blocks("gain", "turn")))
    assert "belongs to one of gain, turn" in told and "the order in which the model registers them is not known" in told


# --- parameters of two dimensions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A class of transformers, and which of its parameters are targets."""

    kind: str
    config: str
    settings: Mapping[str, Any]
    parameters: tuple[str, ...]
    inside: str = ""


_GPT: dict[str, Any] = {"vocab_size": 61, "n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 16}
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MOE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 2,
}
#: Every class of transformers that has a Conv1D, whose weight is (in, out) in memory, and every one whose experts are.
MODELS = {
    "gpt2": Model(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_GPT, "add_cross_attention": True},
        (*_CONV1D, "crossattention.q_attn.weight", "crossattention.c_attn.weight", "wpe.weight"),
    ),
    "openai-gpt": Model("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT, _CONV1D),
    "imagegpt": Model("ImageGPTForCausalImageModeling", "ImageGPTConfig", _GPT, (*_CONV1D, "lm_head.weight")),
    "decision-transformer": Model(
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        {"hidden_size": 24, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 61},
        (*_CONV1D, "embed_state.weight"),
    ),
    "clvp": Model(
        "ClvpForCausalLM",
        "ClvpDecoderConfig",
        {"vocab_size": 61, "hidden_size": 24, "n_inner": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"max_position_embeddings": 16, "max_text_tokens": 16, "num_mel_attn_blocks": 1, "feature_size": 8},
        ("mlp.c_fc.weight", "mlp.c_proj.weight", "attn.q_proj.weight"),
    ),
    "gpt-oss": Model(
        "GptOssForCausalLM",
        "GptOssConfig",
        _MOE,
        ("router.weight", "experts.gate_up_proj_bias", "self_attn.k_proj.weight"),
    ),
    "privacy-filter": Model(
        "OpenAIPrivacyFilterForTokenClassification",
        "OpenAIPrivacyFilterConfig",
        _MOE,
        ("router.weight", "experts.down_proj_bias", "self_attn.k_proj.weight"),
    ),
    "aria": Model(
        "AriaTextForCausalLM",
        "AriaTextConfig",
        {**_MOE, "moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1},
        ("router.weight", "shared_experts.up_proj.weight", "self_attn.k_proj.weight"),
    ),
}


QUICK = ("gpt2", "gpt-oss")


def trained(model: Model, folder: Path) -> tuple[Path, Path, Any]:
    """A base, an adapter on its parameters, and the base in memory."""
    from peft import get_peft_model

    library = transformers()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        base = getattr(library, model.kind)(getattr(library, model.config)(**model.settings)).eval()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        base.save_pretrained(folder / "base")
        config = lora(target_parameters=list(model.parameters), lora_dropout=0.0)
        wrapped = get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter", base


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_parameters_of_two_dimensions_are_as_they_are_in_memory(tmp_path: Path, name: str) -> None:
    """All that are not square would not fit transposed; the square ones would."""
    from peft import PeftModel

    base, adapter, model = trained(MODELS[name], tmp_path)
    merge_to(tmp_path / "out", base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "peft")
    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "peft")
    assert_same_bits({key: ours[key] for key in theirs}, theirs)
    before = stored(base)
    for parameter in MODELS[name].parameters:
        changed = [key for key in before if not torch.equal(before[key], ours[key])]
        assert any(parameter.rpartition(".")[0] in key or parameter in key for key in changed), parameter
    assert shardmerge.verify(tmp_path / "out").raise_for_status().ok


def test_one_adapter_takes_biases_for_a_matrix_and_another_for_experts(tmp_path: Path) -> None:
    base, adapter, _ = trained(MODELS["gpt-oss"], tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({f"base_model.model.{name}": torch.ones(3, 40)}, whole / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 5, "lora_alpha": 13, "modules_to_save": ["experts"]}
    (whole / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(shardmerge.PlanError, match="as one matrix and another adapter as experts'"):
        shardmerge.plan(make_config(tmp_path / "out", base, [whole, adapter]))


def test_every_class_with_a_conv1d_is_here() -> None:
    from shardmerge.key_mapping.table import table

    kinds = {
        of.model_type
        for of in table().architectures.values()
        if of.conv1d or of.experts_in_memory is Orientation.TRANSPOSED
    }
    assert {kind.replace("_", "-") for kind in kinds} == {
        *("clvp-decoder", "decision-transformer", "gpt2", "imagegpt", "openai-gpt", "gpt-oss", "aria-text"),
        "openai-privacy-filter",
    }


def test_without_a_config_an_attention_is_told_by_the_base(tmp_path: Path) -> None:
    case = write_case(tmp_path, lora("attention"), make=Blocks)
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    merge_to(tmp_path / "out", case.base, {"path": str(tmp_path / "bare.safetensors"), "alpha": 13})
    assert_same_outputs(case, stored(tmp_path / "out"))
    moved = {name.replace(".attention.", ".linear."): tensor for name, tensor in tensors.items()}
    save_file(moved, tmp_path / "moved.safetensors")
    with pytest.raises(shardmerge.PlanError, match=r"layers\.0\.linear is wrapped 1 times"):
        merge_to(tmp_path / "no", case.base, {"path": str(tmp_path / "moved.safetensors"), "alpha": 13})
