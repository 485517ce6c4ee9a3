"""Finds the settings of a config.json with which llama.cpp would compute something else than transformers.

In llama.cpp's code of an architecture many settings are constants. So every key of a config.json is classified by
architecture, and an unclassified key is refused by name:

- *written*: the file expresses it, and llama.cpp follows it;
- *checked*: llama.cpp supports some values; all others are a loss;
- *inert*: transformers' code of the class does not read it, or not when it computes logits.

A *loss* is a setting without which the file computes something else. It is reported with key and value;
``output.allow_config_loss`` writes the file without it.

Sources: transformers' modeling_*.py and configuration_*.py of each class, 5.23; llama.cpp's src/llama-model.cpp and
src/models/. The tests compare logits of both, setting by setting.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.gguf.inert import INERT, MULTIMODAL, OF_CLASS
from shardmerge.gguf.model import Model
from shardmerge.spec.notices import Warned

#: Returns how llama.cpp differs from a value; "" if it does not.
Check = Callable[[Any, Model, Mapping[str, Any]], str]

_short = reprlib.repr


def losses(model: Model) -> tuple[str, ...]:
    """The settings of a model's config that a GGUF file cannot express, each with the reason."""
    reads, settings, found = READS[model.architecture.model_type], model.settings, []
    allowed = INERT | OF_CLASS.get(model.architecture.model_type, frozenset())
    if model.architecture.multimodal:
        allowed |= MULTIMODAL
    for key, value in settings.items():
        if key in reads.checked:
            if reason := reads.checked[key](value, model, settings):
                found.append(f"config.json: {key} is {_short(value)}: {reason}")
        elif key not in reads.written and key not in allowed and key not in _OF_ANY_CLASS:
            found.append(
                f"config.json: {key} is {_short(value)}: its meaning for {model.architecture.hf_class} is unknown, so "
                "a GGUF file would not have it"
            )
    return (*found, *(f"config.json: {problem}" for problem in _rope_losses(model)))


def notes(model: Model) -> tuple[str, ...]:
    """Settings that the file expresses, but llama.cpp applies otherwise than transformers."""
    if model.rope.kind != "longrope":
        return ()
    return (
        Warned(
            f"longrope: with a context of over {model.original_context} tokens, llama.cpp uses the long factors for "
            f"every prompt; transformers uses them for prompts of that length. For shorter prompts, run it with "
            f"-c {model.original_context}"
        ),
    )


#: Every sixth layer of Gemma 3 has full attention.
_PERIOD = 6

# --- checks -----------------------------------------------------------------------------------------------------------


def _only(*allowed: Any) -> Check:
    """Only these values: in llama.cpp they are a constant."""

    def check(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
        if any(type(value) is type(one) and value == one for one in allowed):
            return ""
        return f"llama.cpp's {model.architecture.hf_class} always has {allowed[0]!r}"

    return check


def _nothing(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
    """A feature that llama.cpp does not have."""
    return "" if not value else f"llama.cpp's {model.architecture.hf_class} does not have this feature"


def _window(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
    """A sliding window of ``value`` tokens in every layer."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= model.context):
        return ""
    return (
        f"llama.cpp's {model.architecture.hf_class} has no sliding window, so it computes longer prompts otherwise "
        f"(its context is {model.context} tokens)"
    )


def _window_if_used(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
    """Qwen's switch for the window of layers from ``max_window_layers`` on, or of those in ``layer_types``."""
    kinds, every = settings.get("layer_types"), model.architecture.model_type == "qwen3_moe"
    if isinstance(kinds, list) and not every:
        slides = any(kind != "full_attention" for kind in kinds)
    else:
        first = settings.get("max_window_layers", 28)
        slides = bool(value) and (every or not (isinstance(first, int) and first >= model.layers))
    window = settings.get("sliding_window", 4096) if value else 0
    return _window(window, model, settings) if slides else ""


def _layer_types(period: int) -> Check:
    """Every ``period``-th layer has full attention, the others a window."""

    def check(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
        usual = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(model.layers)]
        return "" if value is None or value == usual else _every(period, model)

    return check


def _pattern(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
    """Gemma 3's period, which applies if there is no ``layer_types``."""
    return "" if value == _PERIOD or settings.get("layer_types") is not None else _every(_PERIOD, model)


def _every(period: int, model: Model) -> str:
    of = model.architecture.hf_class
    return f"in llama.cpp's {of} every {period}th layer has full attention, and the others have a sliding window"


def _attention_scale(largest: int) -> Check:
    """The s of attention's scale 1/√s: a head's width, or hidden / heads in llama.cpp's model of ``largest`` layers."""

    def check(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
        width = model.hidden // model.heads if model.layers == largest else model.head_dim
        if isinstance(value, (int, float)) and value == width:
            return ""
        return f"llama.cpp scales the attention of a model of these sizes by 1/√{width}"

    return check


def _is_causal(value: Any, model: Model, settings: Mapping[str, Any]) -> str:
    return "" if isinstance(value, bool) else "it is neither true nor false"


# --- rotary embeddings ------------------------------------------------------------------------------------------------

#: Known rope settings. Nothing reads ``finetuned``, which was beside YaRN's first ones.
_ROPE_KEYS = frozenset(
    {"rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "original_max_position_embeddings"}
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"}
    | {"short_factor", "long_factor", "low_freq_factor", "high_freq_factor"}
)
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope_losses(model: Model) -> list[str]:
    rope, of = model.rope, model.architecture.hf_class
    found = [
        f"{key} is {_short(value)} among the rope settings, and its meaning is unknown"
        for key, value in rope.settings.items()
        if key not in _ROPE_KEYS
    ]
    if rope.kind != "default" and rope.kind not in model.architecture.rope_types:
        known = ", ".join(sorted({"default", *model.architecture.rope_types}))
        found.append(f"rope type {rope.kind!r} is not supported for {of} in GGUF: {known}")
    partial = rope.settings.get("partial_rotary_factor")
    if model.architecture.name != "phi3" and isinstance(partial, (int, float)) and partial != 1:
        found.append(f"partial_rotary_factor is {partial}; {of} rotates whole heads")
    if model.architecture.name == "gemma2" and rope.theta != 10_000.0:
        found.append(f"rope_theta is {rope.theta:g}: llama.cpp's {of} always has 10000")
    if rope.kind == "yarn":
        found += _yarn_losses(model)
    if rope.kind == "longrope":
        found += _longrope_losses(model)
    if rope.kind == "llama3":
        numbers = {key: rope.settings.get(key) for key in _LLAMA3_KEYS}
        found += [
            f"{key} is {_short(value)} among the rope settings; expected a number"
            for key, value in numbers.items()
            if not _is_number(value)
        ]
    if model.architecture.model_type == "gemma3_text":
        found += _local_losses(model)
    return found


def _local_losses(model: Model) -> list[str]:
    """Of the rope settings of Gemma 3's layers with a window, a file has only theta."""
    nested = model.settings.get("rope_parameters")
    local = nested.get("sliding_attention") if isinstance(nested, dict) else None
    usual = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    return [
        f"{key} is {_short(value)} among the rope settings of layers with a window; llama.cpp has only their theta"
        for key, value in (local.items() if isinstance(local, dict) else ())
        if key != "rope_theta" and value != usual.get(key)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _yarn_losses(model: Model) -> list[str]:
    """llama.cpp reads YaRN's factor and original context; its other settings are constants."""
    settings, found = model.rope.settings, []
    factor = model.rope.number("factor", 1.0)
    expected, asked = _yarn_mscale(factor, 1.0), settings.get("attention_factor")
    name = "attention_factor"
    mscale, of_all = settings.get("mscale"), settings.get("mscale_all_dim")
    if asked is None and mscale and of_all and _is_number(mscale) and _is_number(of_all):
        name, asked = "mscale", _yarn_mscale(factor, mscale) / _yarn_mscale(factor, of_all)
    if asked is not None and not (_is_number(asked) and math.isclose(asked, expected, rel_tol=1e-6)):
        found.append(
            f"{name} makes YaRN's attention factor {_short(asked)}: llama.cpp always has 0.1 ln {factor:g} + 1 = "
            f"{expected:.6g}"
        )
    for key, usual in (("extrapolation_factor", 1.0), ("attn_factor", 1.0)):
        if key in settings and settings[key] != usual:
            found.append(f"{key} is {_short(settings[key])} among YaRN's settings, which transformers does not read")
    if _yarn_range(model, settings) != _yarn_range(model, {}):
        names = [name for name in ("beta_fast", "beta_slow", "truncate") if name in settings]
        keys = ", ".join(f"{name} {_short(settings[name])}" for name in names)
        found.append(f"{keys} among YaRN's settings: llama.cpp always has beta_fast 32, beta_slow 1 and truncates")
    return found


def _yarn_mscale(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn_range(model: Model, settings: Mapping[str, Any]) -> object:
    """The dimensions between which YaRN interpolates. Sources: transformers' modeling_rope_utils.py, and
    ggml_rope_yarn_corr_dims in ggml.c, whose defaults are 32, 1 and true."""
    fast, slow = settings.get("beta_fast") or 32, settings.get("beta_slow") or 1
    if not (_is_number(fast) and _is_number(slow) and fast > 0 and slow > 0 and model.original_context):
        return settings.get("beta_fast"), settings.get("beta_slow")
    size, context, theta = model.rope_dimensions, model.original_context, model.rope.theta
    if theta <= 1:
        return theta
    low, high = (size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, size - 1)


def _longrope_losses(model: Model) -> list[str]:
    """llama.cpp computes the attention factor from the two contexts."""
    settings, context, original = model.rope.settings, model.context, model.original_context or 0
    if original < 2:
        return []  # `read_model` reports this
    expected = longrope_factor(context / original, original)
    factor, asked = settings.get("factor"), settings.get("attention_factor")
    if asked is None and factor is not None:
        asked = longrope_factor(factor, original) if _is_number(factor) else factor
    if asked is None or (_is_number(asked) and math.isclose(asked, expected, rel_tol=1e-6)):
        return []
    return [f"longrope's attention factor is {_short(asked)}: a GGUF file has {expected:.6g}, from both contexts"]


def longrope_factor(factor: float, original: int) -> float:
    """Longrope's scale of attention for a context of s times c tokens: √(1 + ln s / ln c)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


# --- the classes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reads:
    """The settings that transformers' code of a class reads."""

    written: frozenset[str]
    checked: Mapping[str, Check]


_ALWAYS = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    | {"num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"}
    | {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
    | {"model_type", "architectures", "quantization_config"}  # `read_model` refuses wrong values of these
)
_EVERY: Mapping[str, Check] = {"per_layer_config": _nothing, "is_causal": _is_causal}
_SILU = {**_EVERY, "hidden_act": _only("silu", "swish")}
_GELU = {
    **_EVERY,
    "hidden_activation": _only("gelu_pytorch_tanh"),
    "use_bidirectional_attention": _nothing,
    "is_causal": _only(True),
}
_QWEN = {**_SILU, "use_sliding_window": _window_if_used}
_QWEN_WINDOW = frozenset({"sliding_window", "max_window_layers", "layer_types"})

READS: Mapping[str, Reads] = {
    "llama": Reads(_ALWAYS | {"attention_bias", "mlp_bias"}, _SILU),
    "mistral": Reads(_ALWAYS, {**_SILU, "sliding_window": _window}),
    "mixtral": Reads(
        _ALWAYS | {"num_local_experts", "num_experts", "num_experts_per_tok"}, {**_SILU, "sliding_window": _window}
    ),
    "qwen2": Reads(_ALWAYS | _QWEN_WINDOW, _QWEN),
    "qwen3": Reads(_ALWAYS | _QWEN_WINDOW | {"attention_bias"}, _QWEN),
    "qwen3_moe": Reads(
        _ALWAYS
        | {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"}
        | {"mlp_only_layers", "attention_bias", "sliding_window"},
        {**_SILU, "norm_topk_prob": _only(True), "use_sliding_window": _window_if_used},
    ),
    "gemma2": Reads(
        _ALWAYS | {"sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "attention_bias"},
        {**_GELU, "layer_types": _layer_types(2), "query_pre_attn_scalar": _attention_scale(46)},
    ),
    "gemma3_text": Reads(
        _ALWAYS | {"sliding_window", "final_logit_softcapping", "attention_bias", "rope_local_base_freq"},
        {
            **_GELU,
            "layer_types": _layer_types(_PERIOD),
            "sliding_window_pattern": _pattern,
            "query_pre_attn_scalar": _attention_scale(62),
            "attn_logit_softcapping": _nothing,
        },
    ),
    "phi3": Reads(_ALWAYS, {**_SILU, "sliding_window": _window, "is_causal": _only(True)}),
}
#: A setting that only another class reads has no effect.
_OF_ANY_CLASS = frozenset().union(*(reads.written | reads.checked.keys() for reads in READS.values()))
