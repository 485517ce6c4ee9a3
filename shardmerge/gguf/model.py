"""Reads the settings of a model from config.json, with transformers' defaults, without transformers.

The official converter reads a config with transformers, which adds defaults and moves rope settings into one
dictionary. This module does the same for the supported architectures.
"""

from __future__ import annotations

import copy
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from shardmerge.gguf.architectures import ARCHITECTURES, Architecture

#: Largest values of settings. A larger one is wrong, and would take unbounded memory.
_MOST = (1 << 31) - 1
_LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 1 << 13,
    "vocab_size": 1 << 24,
    "head_dim": 1 << 16,
    "hidden_size": 1 << 24,
    "num_local_experts": 1 << 13,
    "num_experts": 1 << 13,
}
#: ``model_type`` → transformers' defaults. Source: configuration_*.py; a test compares.
DEFAULTS: Mapping[str, Mapping[str, Any]] = json.loads(
    resources.files("shardmerge.gguf").joinpath("defaults.json").read_text(encoding="utf-8")
)
_ROPE_THETA = 10_000.0
_GEMMA3_THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embeddings: ``settings`` are transformers 5's ``rope_parameters``, ``kind`` is their type."""

    kind: str
    theta: float
    settings: Mapping[str, Any]

    def number(self, name: str, default: float) -> float:
        value = self.settings.get(name, default)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else default

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers; empty if there is none."""
        value = self.settings.get(name)
        if not isinstance(value, list) or not all(isinstance(item, (int, float)) for item in value):
            return ()
        return tuple(float(item) for item in value)


@dataclass(frozen=True, slots=True)
class Model:
    """The settings that are written to the file or determine the layout of tensors."""

    architecture: Architecture
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    #: None if neither the config nor transformers has it; see `rope_dimensions`.
    head_dim: int | None
    context: int
    rms_eps: float
    rope: Rope
    #: Theta of Gemma 3's layers with a sliding window.
    local_theta: float | None
    original_context: int | None
    experts: int | None
    experts_used: int | None
    expert_intermediate: int | None
    sliding_window: int | None
    attention_softcap: float | None
    final_softcap: float | None
    causal: bool
    #: Tensors of a layer with a bias: transformers' names.
    biases: frozenset[str]
    #: All settings, with those of the text part and transformers' defaults.
    settings: Mapping[str, Any]

    @property
    def rope_dimensions(self) -> int:
        """Elements of a head that are rotated."""
        if self.architecture.name == "phi3":
            return int(self.rope.number("partial_rotary_factor", 1.0) * self.hidden) // self.heads
        return self.hidden // self.heads if self.head_dim is None else self.head_dim


def read_model(config: Mapping[str, Any]) -> tuple[Model | None, tuple[str, ...]]:
    """The model of config.json, or None and every reason why it cannot be written."""
    architecture, problem = _architecture(config)
    if architecture is None:
        return None, (problem,)
    settings = dict(config)
    if isinstance(text := config.get("text_config"), dict):
        settings |= text
    problems: list[str] = []
    if (model_type := settings.get("model_type")) != architecture.model_type:
        problems.append(
            f"config.json: model_type is {model_type!r}; {architecture.hf_class} has {architecture.model_type!r}"
        )
    if config.get("quantization_config"):
        problems.append("config.json: the base is quantised (quantization_config); a GGUF file is made of full weights")
    settings = {**DEFAULTS[architecture.model_type], **settings}
    model = _read(architecture, settings, _Reader(settings, problems))
    if model is not None and not problems:
        problems += _unsupported(model, settings)
    return (None if problems else model), tuple(problems)


def _architecture(config: Mapping[str, Any]) -> tuple[Architecture | None, str]:
    text = config.get("text_config")
    declared = text.get("architectures") if isinstance(text, dict) else None
    declared = declared or config.get("architectures")
    name = declared[0] if isinstance(declared, list) and declared else None
    if not isinstance(name, str):
        return None, "config.json: architectures does not name a class, so the meaning of the tensors is unknown"
    if name in ARCHITECTURES:
        return ARCHITECTURES[name], ""
    return None, (
        f"{name} cannot be written as GGUF: supported are {', '.join(sorted(ARCHITECTURES))}. Write safetensors and "
        "convert them with llama.cpp's convert_hf_to_gguf.py"
    )


class _Reader:
    """Reads numbers of a config and collects problems."""

    def __init__(self, settings: Mapping[str, Any], problems: list[str]) -> None:
        self._settings = settings
        self.problems = problems

    def whole(self, *names: str, required: bool = True) -> int | None:
        """The first of ``names`` that is set, as a positive whole number."""
        for name in names:
            value = self._settings.get(name)
            if value is None:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LIMITS.get(name, _MOST):
                return value
            self.problems.append(f"config.json: {name} is {reprlib.repr(value)}; expected a positive whole number")
            return None
        if required:
            self.problems.append(f"config.json: {names[0]} is missing")
        return None

    def real(self, name: str, required: bool = True) -> float | None:
        value = self._settings.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        if value is not None or required:
            self.problems.append(f"config.json: {name} is {reprlib.repr(value)}; expected a number")
        return None


def _read(architecture: Architecture, settings: Mapping[str, Any], reader: _Reader) -> Model | None:
    vocab_size, hidden = reader.whole("vocab_size"), reader.whole("hidden_size")
    intermediate, layers = reader.whole("intermediate_size"), reader.whole("num_hidden_layers")
    heads, context = reader.whole("num_attention_heads"), reader.whole("max_position_embeddings")
    kv_heads = reader.whole("num_key_value_heads", required=False)
    head_dim = reader.whole("head_dim", required=False)
    rms_eps = reader.real("rms_norm_eps")
    experts = used = expert_intermediate = None
    if architecture.experts:
        experts, used = reader.whole("num_local_experts", "num_experts"), reader.whole("num_experts_per_tok")
        if architecture.model_type == "qwen3_moe":
            expert_intermediate = reader.whole("moe_intermediate_size")
    gemma2 = architecture.model_type == "gemma2"
    attention_softcap = reader.real("attn_logit_softcapping", required=gemma2)
    final_softcap = reader.real("final_logit_softcapping", required=gemma2)
    window = reader.whole("sliding_window", required=gemma2)
    rope, local_theta = _rope(architecture.model_type, settings, context or 0)
    if rope is None or (local_theta is None and architecture.model_type == "gemma3_text"):
        reader.problems.append("config.json: rope_theta is not a number, or rope_type not a name")
        return None
    numbers = (vocab_size, hidden, intermediate, layers, heads, context, rms_eps)
    if None in numbers:
        return None
    assert vocab_size and hidden and intermediate and layers and heads and context and rms_eps is not None
    if head_dim is None and architecture.model_type in ("llama", "mistral"):
        head_dim = hidden // heads
    original = rope.settings.get("original_max_position_embeddings", settings.get("original_max_position_embeddings"))
    return Model(
        architecture,
        vocab_size,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads or heads,
        head_dim,
        context,
        rms_eps,
        rope,
        local_theta,
        original if isinstance(original, int) else None,
        experts,
        used,
        expert_intermediate,
        window,
        attention_softcap,
        final_softcap,
        settings.get("is_causal") is not False,
        _biases(architecture.model_type, settings),
        settings,
    )


_ATTENTION = frozenset({f"self_attn.{name}_proj" for name in "qkvo"})
_MLP = frozenset({f"mlp.{name}_proj" for name in ("gate", "up", "down")})


def _biases(model_type: str, settings: Mapping[str, Any]) -> frozenset[str]:
    """The biases of a layer that both transformers and llama.cpp have."""
    if model_type == "qwen2":
        return _ATTENTION - {"self_attn.o_proj"}
    if model_type != "llama":
        return frozenset()
    attention, mlp = (bool(settings.get(key)) for key in ("attention_bias", "mlp_bias"))
    return (_ATTENTION if attention else frozenset()) | (_MLP if mlp else frozenset())


def _rope(model_type: str, settings: Mapping[str, Any], context: int) -> tuple[Rope | None, float | None]:
    """Rope settings in transformers 5's form, from that or an older form; and Gemma 3's local theta."""
    old, new, theta = (settings.get(key) for key in ("rope_scaling", "rope_parameters", "rope_theta"))
    if model_type == "gemma3_text":
        nested: dict[str, Any] = copy.deepcopy(new) if isinstance(new, dict) else {}
        full, local = nested.get("full_attention"), nested.get("sliding_attention")
        full = full if isinstance(full, dict) and full else {"rope_type": "default"}
        local = local if isinstance(local, dict) else {}
        full |= old if isinstance(old, dict) else {}
        full.setdefault("rope_theta", _GEMMA3_THETA["full_attention"] if theta is None else theta)
        default = settings.get("rope_local_base_freq", _GEMMA3_THETA["sliding_attention"])
        local_theta = local.get("rope_theta", default)
        return _made(full), float(local_theta) if isinstance(local_theta, (int, float)) else None
    flat: dict[str, Any] = copy.deepcopy(old if isinstance(old, dict) and old else new if isinstance(new, dict) else {})
    flat.setdefault("rope_theta", _ROPE_THETA if theta is None else theta)
    if (partial := settings.get("partial_rotary_factor")) is not None:
        flat.setdefault("partial_rotary_factor", partial)
    rope = _made(flat)
    if rope is None:
        return None, None
    if model_type == "phi3":
        # transformers' longrope was called su, and yarn, before. Its original context is beside the rope settings.
        kind = "longrope" if rope.kind in ("su", "yarn") else rope.kind
        trained = settings.get("original_max_position_embeddings")
        if kind == "longrope" or "original_max_position_embeddings" not in flat:
            flat["original_max_position_embeddings"] = trained
        return Rope(kind, rope.theta, flat), None
    if rope.kind in ("llama3", "yarn"):
        flat.setdefault("original_max_position_embeddings", context)
    return rope, None


def _made(settings: dict[str, Any]) -> Rope | None:
    kind = settings.setdefault("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta")
    if not isinstance(kind, str) or not isinstance(theta, (int, float)):
        return None
    return Rope(kind, float(theta), settings)


#: Model types whose heads fill the hidden size in llama.cpp; and those with attention biases only in transformers.
_OF_WHOLE_WIDTH = frozenset({"qwen2", "phi3"})
_WITHOUT_BIASES = frozenset({"qwen3", "qwen3_moe", "gemma2", "gemma3_text"})


def _unsupported(model: Model, settings: Mapping[str, Any]) -> list[str]:
    """Reasons why llama.cpp would not load a file of this model, or why a file cannot express it."""
    architecture, rope, problems = model.architecture, model.rope, []
    if any(key in rope.settings for key in ("full_attention", "sliding_attention")):
        problems.append(f"config.json: rope settings by kind of layer are not supported for {architecture.hf_class}")
    elif rope.kind in ("linear", "yarn") and not isinstance(rope.settings.get("factor"), (int, float)):
        problems.append(f"config.json: rope type {rope.kind!r} needs a factor, a number")
    if architecture.name == "phi3":
        problems += _phi3_problems(model)
    if model.hidden % model.heads and model.head_dim is None:
        problems.append(
            f"config.json: hidden_size {model.hidden} is not a multiple of the {model.heads} attention heads"
        )
    if architecture.model_type in _OF_WHOLE_WIDTH and model.head_dim not in (None, model.hidden // model.heads):
        problems.append(
            f"config.json: head_dim is {model.head_dim}, but llama.cpp's {architecture.hf_class} has heads of "
            f"hidden_size / num_attention_heads = {model.hidden // model.heads}, and would not load the file"
        )
    if architecture.model_type in _WITHOUT_BIASES and settings.get("attention_bias"):
        problems.append(
            f"config.json: attention_bias is true; llama.cpp's {architecture.hf_class} has no biases, and would not "
            "load the file"
        )
    is_dense = settings.get("decoder_sparse_step", 1) != 1 or settings.get("mlp_only_layers")
    if architecture.model_type == "qwen3_moe" and is_dense:
        problems.append("config.json: dense layers among those with experts; llama.cpp's Qwen3-MoE has none")
    return problems


def _phi3_problems(model: Model) -> list[str]:
    problems = []
    if model.original_context is None or model.original_context < 2:
        problems.append("config.json: original_max_position_embeddings is not an integer above 1")
    long, short = model.rope.numbers("long_factor"), model.rope.numbers("short_factor")
    expected = model.rope_dimensions // 2
    if model.rope.kind == "longrope" and (len(long), len(short)) != (expected, expected):
        problems.append(
            f"config.json: long_factor and short_factor have {len(long)} and {len(short)} numbers; expected {expected}"
        )
    return problems
