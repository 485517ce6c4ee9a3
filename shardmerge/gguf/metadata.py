"""config.json, generation_config.json and the tokenizer's files → the key-values of a GGUF file.

For these architectures the official converter writes the same keys, with the same values and in the same order. The
keys that it guesses from names and model cards are left out: see `LEFT_OUT`.
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
_CARD = "the converter copies it from the front matter of README.md, which describes the base and not what was merged"
_CARD_KEYS = (
    *("author", "description", "quantized_by", "license", "license.name", "license.link", "url", "doi", "uuid"),
    *("repo_url", "source.url", "source.doi", "source.uuid", "source.repo_url", "base_model.count", "base_model.{…}"),
    *("dataset.count", "dataset.{…}", "tags", "languages"),
)
#: Keys that the converter may write and we do not, and why. ``{…}`` stands for a number.
LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys((f"general.{key}" for key in ("basename", "finetune", "version", "organization")), _GUESSED),
    **dict.fromkeys((f"general.{key}" for key in _CARD_KEYS), _CARD),
}

#: generation_config.json → what llama.cpp takes as its defaults.
_SAMPLING: tuple[tuple[str, str, str], ...] = (
    ("sequence", "sequence", "str"),
    ("top_k", "top_k", "i32"),
    ("top_p", "top_p", "f32"),
    ("min_p", "min_p", "f32"),
    ("xtc_probability", "xtc_probability", "f32"),
    ("xtc_threshold", "xtc_threshold", "f32"),
    ("temperature", "temp", "f32"),
    ("penalty_last_n", "penalty_last_n", "i32"),
    ("penalty_repeat", "penalty_repeat", "f32"),
    ("mirostat", "mirostat", "i32"),
    ("mirostat_tau", "mirostat_tau", "f32"),
    ("mirostat_eta", "mirostat_eta", "f32"),
)
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class Description:
    """The key-values in the file's order; none where there are problems."""

    values: tuple[KeyValue, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def describe(model: Model, layout: Layout, quantization: str, contents: Mapping[str, bytes], name: str) -> Description:
    """All key-values. ``contents`` are the files that `files.wanted` names; ``name`` is ``general.name``."""
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
    for name, key, kind in _SAMPLING:
        value = generation.get(name)
        wanted = str if kind == "str" else int if kind == "i32" else (int, float)
        if value is None or value == "":
            continue
        if not isinstance(value, wanted):
            problems.append(f"generation_config.json: {name} is {value!r}")
            continue
        found.append(KeyValue(f"general.sampling.{key}", kind, value))
    return found


def size_label(layout: Layout) -> str:
    """The number of parameters, rounded: ``1.1B``, or ``8x7B`` with experts."""
    total = shared = expert = experts = stacks = 0
    for tensor in layout.tensors:
        size = math.prod(tensor.shape)
        total += size
        if "_exps." in tensor.name:
            expert += size // tensor.shape[0]
            experts += tensor.shape[0]
            stacks += 1
        else:
            shared += size
    if stacks:
        return f"{experts // stacks}x{_rounded(shared + expert)}"
    return _rounded(total)


def _rounded(parameters: int) -> str:
    """A number with at least two digits and a letter for its scale."""
    scale, letter = next(
        ((scale, letter) for scale, letter in ((1e-12, "T"), (1e-9, "B"), (1e-6, "M")) if parameters > 1 / scale),
        (1e-3, "K"),
    )
    scaled = parameters * scale
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{letter}"


#: The order of the parameters' keys in the file, for the architectures that have one of their own and for all others.
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
_ORDER = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.causal", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.freq_base", "rope.freq_base_swa"),
    *("attention.layer_norm_rms_epsilon", "expert_count", "expert_used_count", "attention.key_length"),
    *("attention.value_length", "general.file_type", "vocab_size", "rope.dimension_count"),
    *("expert_feed_forward_length", "final_logit_softcapping", "attention.sliding_window"),
)


def _parameters(model: Model, file_type: int) -> list[KeyValue]:
    """``llama.block_count`` and all that follow it; parameters that the model does not have (None) are left out."""
    name, rope = model.architecture.name, model.rope
    is_llama, is_gemma, is_yarn = name == "llama", name in ("gemma2", "gemma3"), rope.kind == "yarn"
    is_scaled = rope.kind in ("linear", "yarn")
    # 0 means no window; that is how llama.cpp distinguishes Phi-4 from Phi-3.
    window = model.sliding_window or 0 if name == "phi3" else model.sliding_window if is_gemma else None
    softcap = model.final_softcap if name == "gemma2" or (name == "gemma3" and model.final_softcap) else None
    attention = "attention_factor" if "attention_factor" in rope.settings else "attn_factor"

    def yarn(setting: str) -> float | None:
        return rope.number(setting, 0.0) if is_yarn and rope.settings.get(setting) is not None else None

    integers: dict[str, int | None] = {
        "block_count": model.layers,
        "context_length": model.context,
        "embedding_length": model.hidden,
        "feed_forward_length": model.intermediate,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "rope.scaling.original_context_length": model.original_context if is_yarn or name == "phi3" else None,
        "expert_count": model.experts,
        "expert_used_count": model.experts_used,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "general.file_type": file_type,
        "vocab_size": model.vocab_size if is_llama else None,
        "rope.dimension_count": model.rope_dimensions if is_llama or name == "phi3" else None,
        "expert_feed_forward_length": model.expert_intermediate,
        "attention.sliding_window": window,
    }
    floats = {
        "rope.scaling.factor": rope.number("factor", 1.0) if is_scaled else None,
        "rope.scaling.yarn_ext_factor": yarn("extrapolation_factor"),
        "rope.scaling.yarn_attn_factor": yarn(attention),
        "rope.scaling.yarn_beta_fast": yarn("beta_fast"),
        "rope.scaling.yarn_beta_slow": yarn("beta_slow"),
        "rope.freq_base": rope.theta,
        "rope.freq_base_swa": model.local_theta,
        "attention.layer_norm_rms_epsilon": model.rms_eps,
        "attn_logit_softcapping": model.attention_softcap,
        "final_logit_softcapping": softcap,
    }
    rows: dict[str, tuple[str, Scalar | None]] = {
        **{key: ("u32", value) for key, value in integers.items()},
        **{key: ("f32", number) for key, number in floats.items()},
        "attention.causal": ("bool", None if model.causal else False),
        "rope.scaling.type": ("str", rope.kind if is_scaled else None),
    }
    found = [
        KeyValue(key if key.startswith("general.") else f"{name}.{key}", rows[key][0], value)
        for key in _ORDERS.get(name, _ORDER)
        if (value := rows[key][1]) is not None
    ]
    assert name not in _ORDERS or len(found) == len(_ORDERS[name])
    return found


def _attention_factor(model: Model) -> list[KeyValue]:
    """What longrope scales Phi-3's attention by."""
    if model.architecture.name != "phi3" or model.rope.kind != "longrope" or not model.original_context:
        return []
    factor = longrope_factor(model.context / model.original_context, model.original_context)
    return [KeyValue("phi3.rope.scaling.attn_factor", "f32", factor)]
