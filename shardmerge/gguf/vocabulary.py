"""Reads the vocabulary: tokens with their types and scores, and the name of the pre-tokenizer.

There are three kinds: SentencePiece from ``tokenizer.model``; SentencePiece from a ``tokenizer.json`` with byte
fallback, which has no scores; and byte-level BPE, whose pre-tokenizer llama.cpp knows by name only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardmerge.gguf.files import ModelFiles, items, mapping
from shardmerge.gguf.formats import KeyValue
from shardmerge.gguf.model import Model
from shardmerge.gguf.pre_tokenizers import Tokenizer, open_tokenizer, pre_tokenizer
from shardmerge.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, read_pieces
from shardmerge.gguf.special_tokens import ROLES, read_special_tokens, text_of
from shardmerge.spec.notices import Warned

_NO_SCORE, _PADDING_SCORE = -1000.0, -10000.0
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``kind`` is ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece)."""

    kind: str
    pre: str
    tokens: tuple[bytes, ...]
    types: tuple[int, ...]
    #: Only for SentencePiece.
    scores: tuple[float, ...] = ()
    #: Only for BPE: pairs, joined by a blank.
    merges: tuple[str, ...] = ()

    def key_values(self) -> list[KeyValue]:
        found = [
            KeyValue("tokenizer.ggml.model", "str", self.kind),
            KeyValue("tokenizer.ggml.pre", "str", self.pre),
            KeyValue("tokenizer.ggml.tokens", "str", self.tokens),
        ]
        if self.scores:
            found.append(KeyValue("tokenizer.ggml.scores", "f32", self.scores))
        found.append(KeyValue("tokenizer.ggml.token_type", "i32", self.types))
        if self.merges:
            found.append(KeyValue("tokenizer.ggml.merges", "str", self.merges))
        return found


@dataclass(slots=True)
class _Pieces:
    """Tokens by id, in the making."""

    tokens: list[bytes] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)

    def set(self, token: int, text: str, kind: int) -> None:
        self.tokens[token], self.scores[token], self.types[token] = text.encode(), _NO_SCORE, kind


def tokenizer_values(model: Model, files: ModelFiles, problems: list[str], warnings: list[str]) -> list[KeyValue]:
    """The key-values of the tokenizer: those of the converter's class of the architecture."""
    name, settings = model.architecture.name, files.json("tokenizer_config.json") or {}
    before: list[KeyValue] = []
    after: list[KeyValue] = []
    if name == "llama":
        if isinstance(space := settings.get("add_prefix_space"), bool):
            before.append(KeyValue("tokenizer.ggml.add_space_prefix", "bool", space))
        if model.vocab_size == 32016:
            problems.append("vocab_size 32016 is CodeLlama's, whose tokens for filling in are not supported in GGUF")
        if model.vocab_size == 49152:  # to the converter, this size means Granite or SmolLM
            after.append(KeyValue("tokenizer.ggml.add_bos_token", "bool", False))
    elif name in ("gemma2", "gemma3"):
        after.append(KeyValue("tokenizer.ggml.add_space_prefix", "bool", False))
    vocabulary = _vocabulary(model, files, problems, warnings)
    if vocabulary is None:
        return []
    if len(vocabulary.tokens) != model.vocab_size:
        problems.append(
            f"the tokenizer has {len(vocabulary.tokens)} tokens and config.json's vocab_size is {model.vocab_size}; "
            "llama.cpp needs one token for each row of the embedding"
        )
    limit = len(vocabulary.tokens) if vocabulary.kind == "llama" else None
    special = read_special_tokens(files, limit).key_values()
    # A repeated key has the later value at the earlier place.
    return list({value.key: value for value in (*before, *vocabulary.key_values(), *special, *after)}.values())


def _vocabulary(model: Model, files: ModelFiles, problems: list[str], warnings: list[str]) -> Vocabulary | None:
    name = model.architecture.name
    if name == "phi3" and (files.json("tokenizer_config.json") or {}).get("tokenizer_class") == "GPT2Tokenizer":
        return _byte_level(model, files, problems)
    if "tokenizer.model" in files and model.architecture.sentencepiece:
        return _sentencepiece(model, files, problems)
    if name in ("gemma2", "gemma3", "phi3"):
        problems.append(
            f"tokenizer.model is missing: {model.architecture.hf_class} cannot be written as GGUF without it"
        )
        return None
    if (tokenizer := files.json("tokenizer.json")) is None:
        problems.append("no tokenizer.json and no tokenizer.model: a GGUF file holds its tokenizer")
        return None
    if name == "llama" and _has_byte_fallback(tokenizer):
        warnings.append(
            Warned(
                "the tokenizer's scores are not in tokenizer.json, so llama.cpp may cut words into other pieces: put "
                "the model's tokenizer.model beside it"
            )
        )
        return _of_llama(tokenizer, files, problems)
    return _byte_level(model, files, problems)


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def _sentencepiece(model: Model, files: ModelFiles, problems: list[str]) -> Vocabulary | None:
    try:
        pieces = read_pieces(files.bytes("tokenizer.model"))
    except ValueError as error:
        problems.append(f"tokenizer.model is not a SentencePiece model: {error}")
        return None
    size = model.vocab_size
    found = _Pieces([f"[PAD{index}]".encode() for index in range(size)], [_PADDING_SCORE] * size, [UNUSED] * size)
    # To the converter, user-defined pieces are normal; other files may set their type below.
    for index, piece in enumerate(pieces[:size]):
        found.tokens[index], found.scores[index] = piece.text, piece.score
        found.types[index] = NORMAL if piece.kind == USER_DEFINED else piece.kind
    for text, index in (files.json("added_tokens.json") or {}).items():
        if isinstance(index, int) and 0 <= index < size:
            found.set(index, text, USER_DEFINED)
    for index, token in _added_tokens(files, model.architecture.name == "phi3"):
        if index < size:
            _set_added(found, index, token, model.architecture.name == "phi3")
    return Vocabulary("llama", "default", tuple(found.tokens), tuple(found.types), tuple(found.scores))


def _added_tokens(files: ModelFiles, of_tokenizer: bool) -> list[tuple[int, Mapping[str, Any]]]:
    """(id, token) of tokenizer_config.json, then, with ``of_tokenizer``, of tokenizer.json."""
    decoder = (files.json("tokenizer_config.json") or {}).get("added_tokens_decoder")
    found = list(decoder.items()) if isinstance(decoder, dict) else []
    if of_tokenizer:
        added = items((files.json("tokenizer.json") or {}).get("added_tokens"))
        found += [(token.get("id"), token) for token in added if isinstance(token, dict)]
    return [
        (int(index), token)
        for index, token in found
        if isinstance(token, dict) and isinstance(token.get("content"), str) and str(index).isdecimal()
    ]


def _set_added(found: _Pieces, index: int, token: Mapping[str, Any], plainly: bool) -> None:
    text = str(token["content"])
    if token.get("special") or (not plainly and _looks_special(text)):
        found.set(index, text, CONTROL)
    else:
        found.set(index, text if plainly else text.replace(_SPACE, " "), USER_DEFINED)


def _looks_special(text: str) -> bool:
    """Some models do not mark their control tokens as special: the converter decides by the text."""
    bars = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    unused = text.startswith("<unused") and text.endswith(">")
    return bars or unused or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _has_byte_fallback(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json was made of a SentencePiece model."""
    model, decoder = tokenizer.get("model"), tokenizer.get("decoder")
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        return False
    return model.get("type") == "BPE" and bool(model.get("byte_fallback")) and decoder.get("type") == "Sequence"


def _of_llama(tokenizer: Mapping[str, Any], files: ModelFiles, problems: list[str]) -> Vocabulary | None:
    """A SentencePiece vocabulary from tokenizer.json, without scores."""
    vocab = _vocab_of(tokenizer, problems)
    if vocab is None:
        return None
    texts = {index: text for text, index in vocab.items()}
    if sorted(texts) != list(range(len(vocab))):
        problems.append("tokenizer.json: the ids of its vocabulary have gaps")
        return None
    special = _special_texts(files.json("tokenizer_config.json") or {})
    found = _Pieces()
    for index in range(len(vocab)):
        text = texts[index]
        is_byte = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text)
        found.tokens.append(text.encode())
        found.types.append(BYTE if is_byte else CONTROL if text in special else NORMAL)
    added = {
        token["id"]: token["content"]
        for token in items(tokenizer.get("added_tokens"))
        if isinstance(token, dict) and isinstance(token.get("content"), str)
        if isinstance(token.get("id"), int) and token["id"] >= len(vocab)
    }
    for _, text in sorted(added.items()):
        found.tokens.append(text.encode())
        found.types.append(CONTROL if text in special else USER_DEFINED)
    scores = (_NO_SCORE,) * len(found.tokens)
    return Vocabulary("llama", "default", tuple(found.tokens), tuple(found.types), scores)


def _special_texts(settings: Mapping[str, Any]) -> set[str]:
    """transformers' special tokens of a Llama tokenizer: those with a role, and those listed as special."""
    defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    found = [settings.get(f"{role}_token", defaults.get(f"{role}_token")) for role in ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key)
        found += [*items(listed), *mapping(listed).values()]
    return {text for text in map(text_of, found) if isinstance(text, str)}


def _vocab_of(tokenizer: Mapping[str, Any], problems: list[str]) -> dict[str, int] | None:
    vocab = mapping(tokenizer.get("model")).get("vocab")
    if isinstance(vocab, dict) and all(isinstance(index, int) for index in vocab.values()):
        return vocab
    problems.append("tokenizer.json does not contain a vocabulary")
    return None


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def _byte_level(model: Model, files: ModelFiles, problems: list[str]) -> Vocabulary | None:
    raw = files.json("tokenizer.json")
    if raw is None:
        problems.append("tokenizer.json is missing or broken: a GGUF file holds its tokenizer")
        return None
    tokenizer = open_tokenizer(files.bytes("tokenizer.json"), problems)
    if tokenizer is None:
        return None
    pre = pre_tokenizer(tokenizer)
    if pre is None or pre not in model.architecture.pre_tokenizers:
        known = ", ".join(sorted(model.architecture.pre_tokenizers)) or "none"
        problems.append(
            f"tokenizer.json: llama.cpp knows pre-tokenizers by name, and this one ({pre or 'unknown'}) is none of "
            f"those that were tested for {model.architecture.hf_class} ({known}); write safetensors and convert them "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
        return None
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if vocab and max(vocab.values()) >= model.vocab_size:
        problems.append(
            f"the tokenizer has ids up to {max(vocab.values())}; config.json's vocab_size is {model.vocab_size}"
        )
        return None
    problems += _roles_without_tokens(files.json("tokenizer_config.json") or {}, vocab)
    added = tokenizer.get_added_tokens_decoder()
    texts = {index: text for text, index in vocab.items()}
    found = _Pieces()
    for index in range(model.vocab_size):
        text, kind = _bpe_token(tokenizer, texts.get(index), index, added.get(index))
        found.tokens.append(text.encode())
        found.types.append(kind)
    return Vocabulary("gpt2", pre, tuple(found.tokens), tuple(found.types), merges=_merges(raw, files))


def _bpe_token(tokenizer: Tokenizer, text: str | None, index: int, added: Any) -> tuple[str, int]:
    if text is None:
        return f"[PAD{index}]", UNUSED
    if added is None:
        return text, NORMAL
    if not added.normalized:
        # llama.cpp expects such tokens to be normalised.
        text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
    if added.special or _looks_special(text):
        return text, CONTROL
    return text.replace(_SPACE, " "), USER_DEFINED


def _roles_without_tokens(settings: Mapping[str, Any], vocab: Mapping[str, int]) -> list[str]:
    """Problems with tokens to which transformers would give a new id, after all others."""
    problems = []
    for role in ROLES:
        text = text_of(settings.get(f"{role}_token"))
        if isinstance(text, str) and text and text not in vocab:
            problems.append(f"tokenizer_config.json: {role}_token is {text!r}, which tokenizer.json does not have")
    return problems


def _merges(tokenizer: Mapping[str, Any], files: ModelFiles) -> tuple[str, ...]:
    """Pairs joined by a blank. Blanks within a token are written as in byte-level BPE."""
    if merges := items(mapping(tokenizer.get("model")).get("merges")):  # tokenizers has checked their form
        blank = chr(ord(" ") + 256)
        return tuple(
            pair if isinstance(pair, str) else " ".join(part.replace(" ", blank) for part in pair) for pair in merges
        )
    lines = (files.text("merges.txt") or "").split("\n")
    lines = lines[1:] if lines[0].startswith("#") else lines
    return tuple(" ".join(parts) for line in lines if len(parts := line.split()) == 2)
