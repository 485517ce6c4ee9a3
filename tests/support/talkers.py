"""Tiny random models that talk, with tokenizers whose tokens are words, or parts of characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"word{i}" for i in range(40)]
ROLES = ["system", "user", "assistant"]


def word_tokenizer() -> Any:
    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", *ROLES, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def byte_tokenizer() -> Any:
    """Byte-level BPE: many of a random model's tokens are parts of characters."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["the cat sat on the mat", "größer, 日本語, 😀 and\nmore"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def save_model(path: Path, tokenizer: Any, template: str | None = None, **generation: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1 << 16,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path
