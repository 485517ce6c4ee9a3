"""Settings of config.json: llama.cpp computes what transformers computes, or the file is refused by the key's name.

The oracle is the real llama.cpp: the probabilities that it gives for the next token, of a small random model in
float32, against transformers' own.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.gguf import model as gguf_model
from shardmerge.gguf.architectures import ARCHITECTURES
from shardmerge.gguf.inert import INERT, MULTIMODAL, OF_CLASS
from shardmerge.gguf.model import read_model
from shardmerge.gguf.settings import READS, losses
from tests.support.builders import run_cli
from tests.support.gguf_zoo import SPM_VOCAB, write_spm_tokenizer
from tests.support.llama_cpp import next_token
from tests.support.peft_oracle import make_config, random, write_adapter

PROMPT = torch.randint(3, SPM_VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
CONTEXT = 256
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 6,  # Gemma 3's sixth layer is the first that attends to everything
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "vocab_size": SPM_VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
#: By ``model_type``: transformers' classes, and what makes a model that llama.cpp can say.
CLASSES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "head_dim": 32}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"head_dim": 32, **_MOE}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"original_max_position_embeddings": 128}),
}


@dataclass(frozen=True)
class Case:
    """Settings of a model; ``refused`` by the name of a key, or else the same logits."""

    model: str
    settings: Mapping[str, Any]
    refused: str = ""
    quick: bool = False


def _rope(kind: str, theta: float = 1e4, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1 + 0.3 * at for at in range(16)],
    "short_factor": [1 + 0.1 * at for at in range(16)],
}
_EVERY = tuple(CLASSES)
_SILU = tuple(name for name in CLASSES if not name.startswith("gemma"))
_GEMMAS = ("gemma2", "gemma3_text")
_YARN_CLASSES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
_PERIODS = {"gemma2": 2, "gemma3_text": 6}


def _layers(period: int, count: int = 6) -> list[str]:
    return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(count)]


CASES: Mapping[str, Case] = {
    **{f"{name}-plain": Case(name, {}, quick=name in ("llama", "qwen3_moe", "gemma3_text", "phi3")) for name in _EVERY},
    **{f"{name}-rms_norm_eps": Case(name, {"rms_norm_eps": 1e-2}) for name in _EVERY},
    **{f"{name}-kv-heads": Case(name, {"num_key_value_heads": 2}) for name in _EVERY},
    **{f"{name}-tied": Case(name, {"tie_word_embeddings": True}) for name in _EVERY if name != "qwen3_moe"},
    "gemma3_text-untied": Case("gemma3_text", {"tie_word_embeddings": False}),
    # Activations are constants.
    **{f"{name}-{act}": Case(name, {"hidden_act": act}, "hidden_act") for name in _SILU for act in ("gelu", "relu")},
    **{f"{name}-swish": Case(name, {"hidden_act": "swish"}) for name in ("llama", "phi3")},
    **{f"{name}-gelu": Case(name, {"hidden_activation": "gelu"}, "hidden_activation") for name in _GEMMAS},
    # Sizes of heads.
    **{
        f"{name}-head_dim": Case(name, {"head_dim": 16})
        for name in ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe")
    },
    **{f"{name}-head_dim": Case(name, {"head_dim": 16}, "head_dim") for name in ("qwen2", "phi3")},
    **{f"{name}-head_dim": Case(name, {"head_dim": 16, "query_pre_attn_scalar": 16}) for name in _GEMMAS},
    # Attention's scale.
    **{f"{name}-scale": Case(name, {"query_pre_attn_scalar": 50}, "query_pre_attn_scalar") for name in _GEMMAS},
    "gemma2-largest": Case("gemma2", {"num_hidden_layers": 46, "head_dim": 16}),
    "gemma3_text-largest": Case("gemma3_text", {"num_hidden_layers": 62, "head_dim": 16}),
    "gemma2-largest-scale": Case(
        "gemma2", {"num_hidden_layers": 46, "head_dim": 16, "query_pre_attn_scalar": 16}, "query_pre_attn_scalar"
    ),
    "gemma3_text-largest-scale": Case(
        "gemma3_text", {"num_hidden_layers": 62, "head_dim": 16, "query_pre_attn_scalar": 16}, "query_pre_attn_scalar"
    ),
    # Caps.
    "gemma2-attention-cap": Case("gemma2", {"attn_logit_softcapping": 5.0}),
    "gemma2-final-cap": Case("gemma2", {"final_logit_softcapping": 3.0}),
    "gemma2-no-cap": Case("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    "gemma3_text-attention-cap": Case("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
    "gemma3_text-final-cap": Case("gemma3_text", {"final_logit_softcapping": 3.0}),
    # Biases.
    "llama-attention_bias": Case("llama", {"attention_bias": True}),
    "llama-mlp_bias": Case("llama", {"mlp_bias": True}),
    **{
        f"{name}-attention_bias": Case(name, {"attention_bias": True}, "attention_bias")
        for name in ("qwen3", "qwen3_moe", *_GEMMAS)
    },
    # Windows.
    **{
        f"{name}-window": Case(name, {"sliding_window": 8}, "sliding_window") for name in ("mistral", "mixtral", "phi3")
    },
    **{f"{name}-window-of-all": Case(name, {"sliding_window": CONTEXT}) for name in ("mistral", "mixtral", "phi3")},
    **{f"{name}-window": Case(name, {"sliding_window": 8}) for name in _GEMMAS},
    **{
        f"{name}-window": Case(
            name, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window"
        )
        for name in ("qwen2", "qwen3", "qwen3_moe")
    },
    **{
        f"{name}-window-not-used": Case(name, {"sliding_window": 8, "use_sliding_window": False})
        for name in ("qwen2", "qwen3", "qwen3_moe")
    },
    **{
        f"{name}-window-of-no-layer": Case(name, {"sliding_window": 8, "use_sliding_window": True})
        for name in ("qwen2", "qwen3")
    },
    **{
        f"{name}-layer_types": Case(
            name, {"layer_types": _layers(2), "sliding_window": 8, "use_sliding_window": True}, "use_sliding_window"
        )
        for name in ("qwen2", "qwen3")
    },
    **{f"{name}-layer_types": Case(name, {"layer_types": _layers(3)}, "layer_types") for name in _GEMMAS},
    **{f"{name}-usual-layer_types": Case(name, {"layer_types": _layers(_PERIODS[name])}) for name in _GEMMAS},
    "gemma3_text-pattern": Case("gemma3_text", {"sliding_window_pattern": 3}, "sliding_window_pattern"),
    # Who attends to whom.
    **{f"{name}-is_causal": Case(name, {"is_causal": False}) for name in _YARN_CLASSES},
    **{f"{name}-is_causal": Case(name, {"is_causal": False}, "is_causal") for name in ("phi3", *_GEMMAS)},
    **{
        f"{name}-bidirectional": Case(name, {"use_bidirectional_attention": True}, "use_bidirectional_attention")
        for name in _GEMMAS
    },
    # Experts.
    "qwen3_moe-norm_topk_prob": Case("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    "qwen3_moe-dense": Case("qwen3_moe", {"mlp_only_layers": [1]}, "dense layers"),
    "qwen3_moe-sparse": Case("qwen3_moe", {"decoder_sparse_step": 2}, "dense layers"),
    **{f"{name}-one-expert": Case(name, {"num_experts_per_tok": 1}) for name in ("mixtral", "qwen3_moe")},
    # Rotary embeddings.
    **{f"{name}-theta": Case(name, _rope("default", 500.0)) for name in (*_YARN_CLASSES, "phi3")},
    "gemma2-theta": Case("gemma2", _rope("default", 500.0), "rope_theta"),
    **{f"{name}-linear": Case(name, _rope("linear", factor=4.0)) for name in _YARN_CLASSES},
    "gemma2-linear": Case("gemma2", _rope("linear", factor=4.0), "rope type"),
    **{f"{name}-dynamic": Case(name, _rope("dynamic", factor=4.0), "rope type") for name in (*_YARN_CLASSES, "gemma2")},
    **{f"{name}-llama3": Case(name, _rope("llama3", **_LLAMA3)) for name in ("llama", "mistral", "mixtral")},
    **{
        f"{name}-llama3": Case(name, _rope("llama3", **_LLAMA3), "rope type")
        for name in ("qwen2", "qwen3", "qwen3_moe")
    },
    **{
        f"{name}-partial": Case(name, _rope("default", partial_rotary_factor=0.5), "partial_rotary_factor")
        for name in (*_YARN_CLASSES, "gemma2")
    },
    "phi3-partial": Case("phi3", _rope("default", partial_rotary_factor=0.5)),
    **{f"{name}-yarn": Case(name, _rope("yarn", **_YARN)) for name in _YARN_CLASSES},
    **{
        f"{name}-yarn-{key}": Case(name, _rope("yarn", **_YARN, **more), key)
        for name in _YARN_CLASSES
        for key, more in (
            ("attention_factor", {"attention_factor": 1.0}),
            ("mscale", {"mscale": 1.0, "mscale_all_dim": 0.5}),
            ("beta_fast", {"beta_fast": 8.0, "beta_slow": 2.0}),
            ("truncate", {"truncate": False}),
        )
    },
    "llama-yarn-usual": Case(
        "llama", _rope("yarn", **_YARN, attention_factor=1.1386294361119891, beta_fast=32, beta_slow=1, truncate=True)
    ),
    "llama-yarn-mscale-alone": Case("llama", _rope("yarn", **_YARN, mscale=2.0)),
    "llama-yarn-other-betas-same-range": Case("llama", _rope("yarn", **{**_YARN, "factor": 2.0}, beta_fast=30.0)),
    "phi3-long": Case("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 16}),
    "phi3-long-partial": Case(
        "phi3",
        {
            "rope_parameters": {
                **_LONG,
                "partial_rotary_factor": 0.5,
                "long_factor": [2.0] * 8,
                "short_factor": [1.5] * 8,
            },
            "original_max_position_embeddings": 16,
        },
    ),
    "phi3-long-factor": Case(
        "phi3",
        {"rope_parameters": {**_LONG, "factor": 2.0}, "original_max_position_embeddings": 64},
        "attention factor",
    ),
    "phi3-long-attention": Case(
        "phi3",
        {"rope_parameters": {**_LONG, "attention_factor": 1.5}, "original_max_position_embeddings": 64},
        "attention factor",
    ),
    "gemma3_text-linear": Case(
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "gemma3_text-thetas": Case(
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            }
        },
    ),
    "gemma3_text-local-linear": Case(
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            }
        },
        "layers with a window",
    ),
    "gemma3_text-yarn": Case(
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, **_YARN},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        "rope type",
    ),
}


@pytest.fixture(autouse=True)
def any_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-MoE may have a small SentencePiece model here, too: ids go in, and logits come out."""
    name = "Qwen3MoeForCausalLM"
    changed = dataclasses.replace(ARCHITECTURES[name], sentencepiece=True)
    monkeypatch.setattr(gguf_model, "ARCHITECTURES", {**ARCHITECTURES, name: changed})


def build(case: Case, folder: Path) -> Any:
    """Write a model with weights large enough that every setting shows, and give it back."""
    import transformers

    kind, config_class, settings = CLASSES[case.model]
    config = getattr(transformers, config_class)(**copy.deepcopy({**SIZES, **settings, **case.settings}))
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(values * (1.0 if "embed" in name else 0.2))
            else:
                weight.add_(0.3 * values)
    model.save_pretrained(folder)
    write_spm_tokenizer(folder)
    return model


def probabilities(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(PROMPT).logits[0, -1].double(), -1)


def written(base: Path, output: Path, **options: Any) -> Path:
    """Export a base as GGUF in float32; the file."""
    config = {"base": str(base), "output": {"path": str(output), "format": "gguf", "quantization": "f32", **options}}
    from shardmerge.config.schema import ExportConfig

    shardmerge.merge(shardmerge.plan(ExportConfig.from_dict(config, "test")))
    return next(output.glob("*.gguf"))


def _cases(refused: bool) -> list[Any]:
    return [
        pytest.param(name, marks=[] if case.quick or refused else [pytest.mark.slow])
        for name, case in CASES.items()
        if bool(case.refused) == refused
    ]


@pytest.mark.parametrize("name", _cases(refused=False))
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wanted = probabilities(build(case, tmp_path / "base"))
    found = next_token(written(tmp_path / "base", tmp_path / "out"), PROMPT[0].tolist(), CONTEXT)
    spread = float(wanted.max() - wanted.min())
    # Of GELU llama.cpp keeps a table in float16.
    assert float((found - wanted).abs().max()) < (5e-4 if case.model in _GEMMAS else 2e-5) * spread


@pytest.mark.parametrize("name", _cases(refused=True))
def test_what_llama_cpp_would_not_compute_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """From the config alone, as transformers writes it."""
    import transformers

    case = CASES[name]
    kind, config_class, settings = CLASSES[case.model]
    config = getattr(transformers, config_class)(**copy.deepcopy({**SIZES, **settings, **case.settings}))
    asked = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [kind]}
    if "sliding_window_pattern" in case.settings:
        del asked["layer_types"]  # which transformers has made of it
    model, problems = read_model(asked)
    told = (*problems, *(losses(model) if model else ()))
    assert told and all(case.refused in one for one in told), told


#: Refused cases in which this prompt shows no difference, by how their names end.
NOT_SHOWN = {
    "-dynamic": "it counts beyond the context alone",
    "-partial": "transformers' class reads it with some rope types only",
    "gemma3_text-attention-cap": "transformers' class reads it with some kinds of attention only",
    "gemma2-bidirectional": "transformers' class reads it with some kinds of attention only",
    "gemma2-gelu": "both kinds of GELU are closer than llama.cpp's table of them",
    "gemma3_text-gelu": "both kinds of GELU are closer than llama.cpp's table of them",
    "gemma3_text-yarn": "llama.cpp may do it; no published model asks for it",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [of.values[0] for of in _cases(refused=True)])
def test_what_is_refused_would_be_computed_otherwise(name: str, tmp_path: Path) -> None:
    """Or not loaded at all; so that nothing is refused for nothing."""
    case = CASES[name]
    for ending, reason in NOT_SHOWN.items():
        if name.endswith(ending):
            pytest.skip(reason)
    wanted = probabilities(build(case, tmp_path / "base"))
    try:
        file = written(tmp_path / "base", tmp_path / "out", allow_config_loss=True)
    except PlanError:
        return  # there is no such file
    found = next_token(file, PROMPT[0].tolist(), CONTEXT)
    assert float((found - wanted).abs().max()) > 1e-2


# --- keys -------------------------------------------------------------------------------------------------------------

#: Keys of published models' config.json, as they are on the Hub; a few values where they matter.
_COMMON: Mapping[str, Any] = {
    "_name_or_path": "a/model",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama-2": ("llama", {**_COMMON, "pretraining_tp": 1, "rope_scaling": None, "hidden_act": "silu"}),
    "Llama-1-as-converted": ("llama", {"max_sequence_length": 2048, "pad_token_id": -1}),
    "Llama-3.2": (
        "llama",
        {
            **_COMMON,
            "attention_bias": False,
            "mlp_bias": False,
            "head_dim": 32,
            "pretraining_tp": 1,
            "rope_theta": 500000.0,
            "rope_scaling": {**_LLAMA3, "rope_type": "llama3"},
            "unsloth_fixed": True,
        },
    ),
    "SmolLM2": ("llama", {**_COMMON, "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}}),
    "Mistral-7B-v0.3": ("mistral", {**_COMMON, "sliding_window": None, "rope_theta": 1e6}),
    "Ministral-8B": ("mistral", {**_COMMON, "head_dim": 32, "sliding_window": CONTEXT}),
    "Mixtral-8x7B": (
        "mixtral",
        {**_COMMON, "output_router_logits": False, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0}
        | {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Qwen2.5": (
        "qwen2",
        {**_COMMON, "max_window_layers": 28, "sliding_window": 64, "use_sliding_window": False, "use_mrope": False},
    ),
    "Qwen2.5-by-transformers-5": (
        "qwen2",
        {"layer_types": ["full_attention"] * 6, "sliding_window": None, "rope_parameters": {"rope_theta": 1e6}},
    ),
    "Qwen3": (
        "qwen3",
        {**_COMMON, "attention_bias": False, "head_dim": 32, "max_window_layers": 36, "rope_scaling": None}
        | {"sliding_window": None, "use_sliding_window": False},
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {**_COMMON, **_MOE, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "head_dim": 32}
        | {"max_window_layers": 48, "output_router_logits": False, "router_aux_loss_coef": 0.001, "rope_scaling": None}
        | {"sliding_window": None, "use_sliding_window": False},
    ),
    "Gemma-2": (
        "gemma2",
        {**_COMMON, **_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_bias": False}
        | {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0}
        | {"hidden_activation": "gelu_pytorch_tanh", "sliding_window_size": 4096, "pad_token_id": 0},
    ),
    "Gemma-3-1b": (
        "gemma3_text",
        {**_COMMON, **_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": False}
        | {"cache_implementation": "hybrid", "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
        | {"sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "Gemma-3-270m": (
        "gemma3_text",
        {**_COMMON, **_GEMMA, "_sliding_window_pattern": 6, "layer_types": _layers(6)}
        | {"use_bidirectional_attention": False},
    ),
    "Phi-3-mini-128k": (
        "phi3",
        {**_COMMON, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        | {"attention_bias": False, "original_max_position_embeddings": 64, "sliding_window": 2 * CONTEXT}
        | {"rope_scaling": {key: value for key, value in _LONG.items() if "factor" in key} | {"type": "longrope"}},
    ),
    "Phi-4-mini": (
        "phi3",
        {**_COMMON, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
        | {"sliding_window": 2 * CONTEXT, "partial_rotary_factor": 0.75},
    ),
}


def _read(model_type: str, **settings: Any) -> tuple[str, ...]:
    """Everything that is said of a config of these keys."""
    config: dict[str, Any] = {**SIZES, **settings}
    config |= {"architectures": [CLASSES[model_type][0]], "model_type": model_type}
    model, problems = read_model(config)
    return (*problems, *(losses(model) if model else ()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_written(name: str) -> None:
    model_type, settings = PUBLISHED[name]
    assert _read(model_type, **settings) == ()


@pytest.mark.parametrize(
    ("name", "model_type", "settings", "said"),
    [
        ("Mistral-7B-v0.1", "mistral", {"sliding_window": 64}, "sliding_window is 64"),
        ("a Mistral that leaves it out", "mistral", {"max_position_embeddings": 32768}, "sliding_window is 4096"),
        (
            "Phi-3-mini-4k",
            "phi3",
            {"sliding_window": 127, "original_max_position_embeddings": 256},
            "sliding_window is",
        ),
        ("a Qwen3-MoE that leaves it out", "qwen3_moe", {**_MOE, "norm_topk_prob": False}, "norm_topk_prob is False"),
        ("Qwen2.5-1M", "qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        ("Granite's", "llama", {"logits_scaling": 8.0}, "logits_scaling is 8.0: its meaning for LlamaForCausalLM"),
        ("falsy is no safer", "llama", {"attention_sinks": None}, "attention_sinks is None"),
        ("by layer", "llama", {"per_layer_config": {"1": {"rms_norm_eps": 1.0}}}, "per_layer_config"),
        ("unknown rope", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "ntk": True}}, "ntk is True"),
        (
            "unfinished llama3",
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor is None",
        ),
        ("longrope", "llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
        ("old partial", "llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            "old yarn",
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 2.0}},
            "attn_factor is 2.0",
        ),
    ],
)
def test_what_is_not_understood_is_told_by_name(name: str, model_type: str, settings: Any, said: str) -> None:
    assert any(said in one for one in _read(model_type, **settings)), name


def test_a_bias_that_transformers_leaves_out(tmp_path: Path) -> None:
    """llama.cpp would add it; the config says that there is none."""
    from safetensors.torch import load_file, save_file

    build(CASES["mistral-plain"], tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, file)
    with pytest.raises(PlanError, match=r"q_proj\.bias: by its config\.json MistralForCausalLM has no such bias"):
        written(tmp_path / "base", tmp_path / "out")


#: What modeling code does with a config beside reading a key of it.
_METHODS = frozenset({"get_text_config", "to_dict", "text_config", "vision_config"})
_KEY = re.compile(r"\bconfig(?:\.text_config)?\.([a-z_0-9]+)|getattr\((?:self\.)?config, *\"([a-z_0-9]+)\"")


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_key_that_the_modeling_code_reads_is_known(model_type: str) -> None:
    """Written, checked, or listed as one that says nothing of logits; and so is every field of the config's class."""
    import transformers

    kind, config_class, _ = CLASSES[model_type]
    source = Path(inspect.getfile(getattr(transformers, kind))).read_text()
    read = {one or other for one, other in _KEY.findall(source)} - _METHODS
    known = READS[model_type].written | READS[model_type].checked.keys() | INERT | MULTIMODAL
    known |= OF_CLASS.get(model_type, frozenset())
    assert read <= known, read - known
    fields = {field.name for field in dataclasses.fields(getattr(transformers, config_class))}
    assert fields <= known, fields - known


# --- the switch -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_allowed_is_a_note(tmp_path: Path) -> None:
    """In the config and on the command line of all three commands; and `verify` knows of it."""
    base = tmp_path / "base"
    build(Case("mistral", {"sliding_window": 8, "hidden_act": "gelu"}), base)
    adapter = write_adapter(
        tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (random(2, 64, seed=1), random(64, 2, seed=2))}
    )
    config = make_config(tmp_path / "out", base, [adapter])
    config["output"] |= {"format": "gguf", "quantization": "f32"}
    with pytest.raises(PlanError) as caught:
        shardmerge.plan(config)
    refused = [one for one in caught.value.problems if "allow_config_loss: true" in one]
    assert len(refused) == len(caught.value.problems) == 2
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    commands: list[list[str | Path]] = [["plan", file], ["run", file]]
    commands.append(["export", base, "-o", tmp_path / "exported", "--format", "gguf"])
    for command in commands:
        done = run_cli(*command, "--allow-config-loss")
        assert done.returncode == 0, done.stderr
        for named in ("sliding_window is 8", "hidden_act is 'gelu'"):
            assert named in done.stderr + done.stdout
    shardmerge.verify(str(tmp_path / "out")).raise_for_status()
    asked = run_cli("export", base, "-o", tmp_path / "plain", "--allow-config-loss")
    assert asked.returncode == 2 and "--format gguf" in asked.stderr
