"""Makes the key-values of a GGUF file from config.json, generation_config.json and the tokenizer's files.

The official converter writes the same keys, values and order, and those in `LEFT_OUT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.gguf.files import ModelFiles
from shardmerge.gguf.formats import FILE_TYPES, KeyValue, Scalar
from shardmerge.gguf.layout import Layout
from shardmerge.gguf.model import Model
from shardmerge.gguf.settings import longrope_factor
from shardmerge.gguf.vocabulary import tokenizer_values
from shardmerge.gguf.writer import unencodable
from shardmerge.spec.notices import Warned

_GUESSED = "the converter guesses it from the folder's name"
_CARD = "the converter copies it from the front matter of README.md, which describes the base and not the merged model"
_CARD_KEYS = (
    *("author", "description", "quantized_by", "license", "license.name", "license.link", "url", "doi", "uuid"),
    *("repo_url", "source.url", "source.doi", "source.uuid", "source.repo_url", "base_model.count", "base_model.{…}"),
    *("dataset.count", "dataset.{…}", "tags", "languages"),
)
#: Keys that only the converter writes → why. ``{…}`` is a number.
LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys((f"general.{key}" for key in ("basename", "finetune", "version", "organization")), _GUESSED),
    **dict.fromkeys((f"general.{key}" for key in _CARD_KEYS), _CARD),
}

#: Settings of generation_config.json that llama.cpp takes as its defaults → kinds of values.
_SAMPLING: Mapping[str, str] = {
    "sequence": "str",
    "top_k": "i32",
    **dict.fromkeys(("top_p", "min_p", "xtc_probability", "xtc_threshold", "temperature"), "f32"),
    "penalty_last_n": "i32",
    "penalty_repeat": "f32",
    "mirostat": "i32",
    **dict.fromkeys(("mirostat_tau", "mirostat_eta"), "f32"),
}
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class Description:
    """The key-values in the file's order; none if there are problems."""

    values: tuple[KeyValue, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def describe(model: Model, layout: Layout, quantization: str, contents: Mapping[str, bytes], name: str) -> Description:
    """All key-values. ``contents`` are the files of `files.wanted`; ``name`` is ``general.name``."""
    problems: list[str] = []
    warnings: list[str] = []
    files = ModelFiles(contents, problems)
    values = [KeyValue("general.architecture", "str", model.architecture.name)]
    values += _attention_factor(model)
    values += [KeyValue("general.type", "str", "model"), *_sampling(files, problems)]
    values += [KeyValue("general.name", "str", name)] if name else []
    values += [KeyValue("general.size_label", "str", size_label(layout))]
    values += _parameters(model, FILE_TYPES[quantization])
    values.append(KeyValue("general.quantization_version", "u32", _QUANTIZATION_VERSION))
    values += tokenizer_values(model, files, problems, warnings)
    if model.architecture.multimodal:
        warnings.append(Warned("only the text model is written: llama.cpp keeps vision in a file of its own (mmproj)"))
    problems += unencodable(values)
    return Description(() if problems else tuple(values), tuple(problems), tuple(warnings))


def _sampling(files: ModelFiles, problems: list[str]) -> list[KeyValue]:
    generation = files.json("generation_config.json") or {}
    found = []
    for name, kind in _SAMPLING.items():
        value = generation.get(name)
        wanted = str if kind == "str" else int if kind == "i32" else (int, float)
        if value is None or value == "":
            continue
        if not isinstance(value, wanted):
            problems.append(f"generation_config.json: {name} is {value!r}")
            continue
        found.append(KeyValue(f"general.sampling.{'temp' if name == 'temperature' else name}", kind, value))
    return found


def size_label(layout: Layout) -> str:
    """The number of parameters, rounded: ``1.1B``, or ``8x7B`` with experts."""
    stacks = [tensor.shape for tensor in layout.tensors if "_exps." in tensor.name]
    total = sum(math.prod(tensor.shape) for tensor in layout.tensors)
    if not stacks:
        return _rounded(total)
    # Of all stacks, one expert each.
    other_experts = sum(math.prod(shape) // shape[0] * (shape[0] - 1) for shape in stacks)
    return f"{sum(shape[0] for shape in stacks) // len(stacks)}x{_rounded(total - other_experts)}"


def _rounded(parameters: int) -> str:
    """A number with at least two digits and a letter for its scale."""
    scales = ((1e-12, "T"), (1e-9, "B"), (1e-6, "M"), (1e-3, "K"))
    scale, letter = next((row for row in scales if parameters > 1 / row[0]), scales[-1])
    scaled = parameters * scale
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{letter}"


#: Architectures in whose files the parameters have another order than in `_parameters`.
_ORDERS: Mapping[str, tuple[str, ...]] = {
    "gemma2": (
        *("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"),
        *("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length"),
        *("attention.value_length", "general.file_type", "attn_logit_softcapping", "final_logit_softcapping"),
        "attention.sliding_window",
    ),
    "phi3": (
        *("context_length", "rope.scaling.original_context_length", "embedding_length", "feed_forward_length"),
        *("block_count", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("rope.dimension_count", "rope.freq_base", "general.file_type", "attention.sliding_window"),
    ),
}


def _parameters(model: Model, file_type: int) -> list[KeyValue]:
    """``llama.block_count`` and the other parameters, in the file's order; those that are None are left out."""
    name, rope = model.architecture.name, model.rope
    is_llama, is_phi3, is_yarn = name == "llama", name == "phi3", rope.kind == "yarn"
    is_scaled = rope.kind in ("linear", "yarn")
    # 0 means no window; llama.cpp distinguishes Phi-4 from Phi-3 by it.
    window = model.sliding_window or 0 if is_phi3 else model.sliding_window if name in ("gemma2", "gemma3") else None
    softcap = model.final_softcap if name == "gemma2" or (name == "gemma3" and model.final_softcap) else None
    attention = "attention_factor" if "attention_factor" in rope.settings else "attn_factor"

    def yarn(setting: str) -> float | None:
        return rope.number(setting, 0.0) if is_yarn and rope.settings.get(setting) is not None else None

    rows: dict[str, tuple[str, Scalar | None]] = {
        "block_count": ("u32", model.layers),
        "context_length": ("u32", model.context),
        "embedding_length": ("u32", model.hidden),
        "feed_forward_length": ("u32", model.intermediate),
        "attention.head_count": ("u32", model.heads),
        "attention.head_count_kv": ("u32", model.kv_heads),
        "attention.causal": ("bool", None if model.causal else False),
        "rope.scaling.type": ("str", rope.kind if is_scaled else None),
        "rope.scaling.factor": ("f32", rope.number("factor", 1.0) if is_scaled else None),
        "rope.scaling.original_context_length": ("u32", model.original_context if is_yarn or is_phi3 else None),
        "rope.scaling.yarn_ext_factor": ("f32", yarn("extrapolation_factor")),
        "rope.scaling.yarn_attn_factor": ("f32", yarn(attention)),
        "rope.scaling.yarn_beta_fast": ("f32", yarn("beta_fast")),
        "rope.scaling.yarn_beta_slow": ("f32", yarn("beta_slow")),
        "rope.freq_base": ("f32", rope.theta),
        "rope.freq_base_swa": ("f32", model.local_theta),
        "attention.layer_norm_rms_epsilon": ("f32", model.rms_eps),
        "expert_count": ("u32", model.experts),
        "expert_used_count": ("u32", model.experts_used),
        "attention.key_length": ("u32", model.head_dim),
        "attention.value_length": ("u32", model.head_dim),
        "general.file_type": ("u32", file_type),
        "vocab_size": ("u32", model.vocab_size if is_llama else None),
        "rope.dimension_count": ("u32", model.rope_dimensions if is_llama or is_phi3 else None),
        "expert_feed_forward_length": ("u32", model.expert_intermediate),
        "attn_logit_softcapping": ("f32", model.attention_softcap if name == "gemma2" else None),
        "final_logit_softcapping": ("f32", softcap),
        "attention.sliding_window": ("u32", window),
    }
    found = [
        KeyValue(key if key.startswith("general.") else f"{name}.{key}", rows[key][0], value)
        for key in _ORDERS.get(name, rows)
        if (value := rows[key][1]) is not None
    ]
    assert name not in _ORDERS or len(found) == len(_ORDERS[name])
    return found


def _attention_factor(model: Model) -> list[KeyValue]:
    """The scale of Phi-3's attention with longrope."""
    if model.architecture.name != "phi3" or model.rope.kind != "longrope" or not model.original_context:
        return []
    factor = longrope_factor(model.context / model.original_context, model.original_context)
    return [KeyValue("phi3.rope.scaling.attn_factor", "f32", factor)]
