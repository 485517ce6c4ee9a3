"""Small tokenizers of every kind that models are stored with, written as transformers 4 and 5 write them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|end|>")
CORPUS = ("a few words to cut into pieces", "the merged model speaks as it was trained", "other words, other pieces")

Texts = Mapping[str, str | bytes]


def word_level(words: int = 20) -> dict[str, str | bytes]:
    vocab = {word: number for number, word in enumerate([*SPECIAL, *(f"w{index}" for index in range(words))])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return {"tokenizer.json": made.to_str()}


def byte_level(text: str = "hello", with_json: bool = True) -> dict[str, str | bytes]:
    """GPT-2's kind: a vocabulary of bytes with a merge a letter, as ``vocab.json`` and ``merges.txt``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(text[:index], text[index]) for index in range(1, len(text))]
    tokens = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    files: dict[str, str | bytes] = {
        "vocab.json": json.dumps(vocab),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
    }
    return {**files, "tokenizer.json": made.to_str()} if with_json else files


def word_piece(words: int = 20) -> dict[str, str | bytes]:
    """BERT's kind: ``vocab.txt`` alone."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SPECIAL, *(f"w{index}" for index in range(words))]
    return {"vocab.txt": "\n".join(tokens) + "\n"}


def sentence_piece(size: int = 60) -> dict[str, str | bytes]:
    """SentencePiece: ``spiece.model`` alone. (Llama's ``tokenizer.model`` needs protobuf.)"""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=size, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False, user_defined_symbols=["<pad>", "<|end|>"],
    )  # fmt: skip
    return {"spiece.model": model.getvalue()}


#: Kind → (files of a vocabulary, of another vocabulary, the class that tokenizer_config.json names).
KINDS: Mapping[str, tuple[Callable[[], Texts], Callable[[], Texts], str]] = {
    "tokenizer.json": (word_level, lambda: word_level(12), "PreTrainedTokenizerFast"),
    "vocab.json and merges.txt": (
        lambda: byte_level(with_json=False),
        lambda: byte_level("world", with_json=False),
        "GPT2Tokenizer",
    ),
    "vocab.json, merges.txt and tokenizer.json": (byte_level, lambda: byte_level("world"), "GPT2Tokenizer"),
    "vocab.txt": (word_piece, lambda: word_piece(12), "BertTokenizer"),
    "spiece.model": (sentence_piece, lambda: sentence_piece(50), "BertGenerationTokenizer"),
}


def write_tokenizer(folder: Path, files: Texts, kind: str, eos: str, more: Texts | None = None) -> None:
    """A tokenizer's files: vocabulary, ``tokenizer_config.json`` and ``more``; one's text None is not written."""
    config = {"tokenizer_class": kind, "eos_token": eos, "bos_token": "<s>", "unk_token": "<unk>", "pad_token": eos}
    for name, text in {**files, "tokenizer_config.json": json.dumps(config), **(more or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
