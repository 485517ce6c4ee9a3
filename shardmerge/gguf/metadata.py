"""config.json, generation_config.json and the tokenizer's files → the key-values of a GGUF file.

For these architectures the official converter writes the same keys, with the same values and in the same order. The
keys that it guesses from names and model cards are left out: see `LEFT_OUT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.gguf.files import ModelFiles
from shardmerge.gguf.formats import FILE_TYPES
from shardmerge.gguf.layout import Layout
from shardmerge.gguf.model import Model
from shardmerge.gguf.values import KeyValue, Scalar
from shardmerge.gguf.vocabulary import tokenizer_values
from shardmerge.gguf.writer import unencodable
from shardmerge.spec.notices import Warned

_GUESSED = "the converter guesses it from the folder's name"
_CARD = "the converter copies it from the front matter of README.md, which describes the base and not what was merged"

#: Keys that the converter may write and we do not, and why. ``{…}`` stands for a number.
LEFT_OUT: Mapping[str, str] = {
    "general.basename": _GUESSED,
    "general.finetune": _GUESSED,
    "general.version": _GUESSED,
    "general.organization": _GUESSED,
    "general.author": _CARD,
    "general.description": _CARD,
    "general.quantized_by": _CARD,
    "general.license": _CARD,
    "general.license.name": _CARD,
    "general.license.link": _CARD,
    "general.url": _CARD,
    "general.doi": _CARD,
    "general.uuid": _CARD,
    "general.repo_url": _CARD,
    "general.source.url": _CARD,
    "general.source.doi": _CARD,
    "general.source.uuid": _CARD,
    "general.source.repo_url": _CARD,
    "general.base_model.count": _CARD,
    "general.base_model.{…}": _CARD,
    "general.dataset.count": _CARD,
    "general.dataset.{…}": _CARD,
    "general.tags": _CARD,
    "general.languages": _CARD,
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
    """How many parameters, roughly: ``1.1B``, or of experts ``8x7B``."""
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
    """At least two digits."""
    scale, letter = next(
        ((scale, letter) for scale, letter in ((1e-12, "T"), (1e-9, "B"), (1e-6, "M")) if parameters > 1 / scale),
        (1e-3, "K"),
    )
    scaled = parameters * scale
    digits = len(str(round(scaled)).lstrip("0"))
    return f"{scaled:.{max(2 - digits, 0)}f}{letter}"


def _parameters(model: Model, file_type: int) -> list[KeyValue]:
    """``llama.block_count`` and all that follow it."""
    of_model = {"gemma2": _of_gemma2, "phi3": _of_phi3}.get(model.architecture.name, _of_all)
    return [
        KeyValue(key if key.startswith("general.") else f"{model.architecture.name}.{key}", kind, value)
        for key, kind, value in of_model(model, file_type)
    ]


_Row = tuple[str, str, Scalar]


def _of_all(model: Model, file_type: int) -> list[_Row]:
    rows: list[_Row] = [
        ("block_count", "u32", model.layers),
        ("context_length", "u32", model.context),
        ("embedding_length", "u32", model.hidden),
        ("feed_forward_length", "u32", model.intermediate),
        ("attention.head_count", "u32", model.heads),
        ("attention.head_count_kv", "u32", model.kv_heads),
    ]
    if not model.causal:
        rows.append(("attention.causal", "bool", False))
    rows += _rope_scaling(model)
    rows.append(("rope.freq_base", "f32", model.rope.theta))
    if model.local_theta is not None:
        rows.append(("rope.freq_base_swa", "f32", model.local_theta))
    rows.append(("attention.layer_norm_rms_epsilon", "f32", model.rms_eps))
    if model.experts is not None and model.experts_used is not None:
        rows += [("expert_count", "u32", model.experts), ("expert_used_count", "u32", model.experts_used)]
    if model.head_dim is not None:
        rows += [("attention.key_length", "u32", model.head_dim), ("attention.value_length", "u32", model.head_dim)]
    rows.append(("general.file_type", "u32", file_type))
    if model.architecture.name == "llama":
        rows += [("vocab_size", "u32", model.vocab_size), ("rope.dimension_count", "u32", model.rope_dimensions)]
    if model.expert_intermediate is not None:
        rows.append(("expert_feed_forward_length", "u32", model.expert_intermediate))
    if model.architecture.name == "gemma3":
        if model.final_softcap:
            rows.append(("final_logit_softcapping", "f32", model.final_softcap))
        if model.sliding_window is not None:
            rows.append(("attention.sliding_window", "u32", model.sliding_window))
    return rows


def _rope_scaling(model: Model) -> list[_Row]:
    rope = model.rope
    if rope.kind not in ("linear", "yarn"):
        return []
    rows: list[_Row] = [
        ("rope.scaling.type", "str", rope.kind),
        ("rope.scaling.factor", "f32", rope.number("factor", 1.0)),
    ]
    if rope.kind == "yarn":
        if model.original_context is not None:
            rows.append(("rope.scaling.original_context_length", "u32", model.original_context))
        attention = "attention_factor" if "attention_factor" in rope.settings else "attn_factor"
        for setting, key in (
            ("extrapolation_factor", "yarn_ext_factor"),
            (attention, "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if rope.settings.get(setting) is not None:
                rows.append((f"rope.scaling.{key}", "f32", rope.number(setting, 0.0)))
    return rows


def _of_gemma2(model: Model, file_type: int) -> list[_Row]:
    assert model.head_dim and model.attention_softcap is not None and model.final_softcap is not None
    assert model.sliding_window is not None
    return [
        ("context_length", "u32", model.context),
        ("embedding_length", "u32", model.hidden),
        ("block_count", "u32", model.layers),
        ("feed_forward_length", "u32", model.intermediate),
        ("attention.head_count", "u32", model.heads),
        ("attention.head_count_kv", "u32", model.kv_heads),
        ("attention.layer_norm_rms_epsilon", "f32", model.rms_eps),
        ("attention.key_length", "u32", model.head_dim),
        ("attention.value_length", "u32", model.head_dim),
        ("general.file_type", "u32", file_type),
        ("attn_logit_softcapping", "f32", model.attention_softcap),
        ("final_logit_softcapping", "f32", model.final_softcap),
        ("attention.sliding_window", "u32", model.sliding_window),
    ]


def _of_phi3(model: Model, file_type: int) -> list[_Row]:
    assert model.original_context is not None
    return [
        ("context_length", "u32", model.context),
        ("rope.scaling.original_context_length", "u32", model.original_context),
        ("embedding_length", "u32", model.hidden),
        ("feed_forward_length", "u32", model.intermediate),
        ("block_count", "u32", model.layers),
        ("attention.head_count", "u32", model.heads),
        ("attention.head_count_kv", "u32", model.kv_heads),
        ("attention.layer_norm_rms_epsilon", "f32", model.rms_eps),
        ("rope.dimension_count", "u32", model.rope_dimensions),
        ("rope.freq_base", "f32", model.rope.theta),
        ("general.file_type", "u32", file_type),
        # 0 means none; that is how llama.cpp distinguishes Phi-4 from Phi-3.
        ("attention.sliding_window", "u32", model.sliding_window or 0),
    ]


def _attention_factor(model: Model) -> list[KeyValue]:
    """Phi-3 with longrope: what attention is scaled by, √(1 + ln s / ln c) for a context of s times c tokens."""
    if model.architecture.name != "phi3" or model.rope.kind != "longrope" or not model.original_context:
        return []
    scale = model.context / model.original_context
    factor = math.sqrt(1 + math.log(scale) / math.log(model.original_context)) if scale > 1 else 1.0
    return [KeyValue("phi3.rope.scaling.attn_factor", "f32", factor)]
