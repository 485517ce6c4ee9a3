"""Heads that are tied to the embedding: when they are untied, what is written then, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from tests.builders import (
    HIDDEN,
    Q0,
    RANK,
    VOCAB,
    Place,
    llama_tensors,
    model_config,
    peft_config,
    peft_tensors,
    random_tensor,
    read_tensors,
    write_base,
    write_peft,
)

P = "base_model.model."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def embedding(seed: int = 1) -> dict[str, Tensor]:
    return {
        f"{P}model.embed_tokens.lora_embedding_A": random_tensor((RANK, VOCAB), seed, std=0.3),
        f"{P}model.embed_tokens.lora_embedding_B": random_tensor((HIDDEN, RANK), seed + 1, std=0.3),
    }


def head(seed: int = 3) -> dict[str, Tensor]:
    return {
        f"{P}lm_head.lora_A.weight": random_tensor((RANK, HIDDEN), seed, std=0.3),
        f"{P}lm_head.lora_B.weight": random_tensor((VOCAB, RANK), seed + 1, std=0.3),
    }


def saved(module: str, rows: int = VOCAB, seed: int = 5) -> dict[str, Tensor]:
    return {f"{P}{module}.weight": random_tensor((rows, HIDDEN), seed)}


def tokens(module: str, seed: int = 7) -> dict[str, Tensor]:
    return {f"{P}{module}.token_adapter.trainable_tokens_delta": random_tensor((2, HIDDEN), seed)}


def delta(factors: dict[str, Tensor]) -> Tensor:
    a, b = factors.values()
    product = (b @ a) * 2.0
    return product.T if product.shape == (HIDDEN, VOCAB) else product


def make(folder: Path, tensors: dict[str, Tensor], *, base: dict[str, Any] | None = None, **config: Any) -> Place:
    """A tied base, an adapter of these tensors. ``base`` are changes of its config.json."""
    place = Place(folder)
    there = llama_tensors(tied=True)
    write_base(place.base, there, config=model_config(tie_word_embeddings=True, vocab_size=VOCAB, **(base or {})))
    write_peft(place.adapter, tensors, config=peft_config(target_modules=None, **config))
    return place


def merged(place: Place, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    report = shardmerge.merge(place.config(**changes))
    return read_tensors(place.output), json.loads((place.output / "config.json").read_text()), report.warnings


BASE = llama_tensors(tied=True)[EMBED]

#: The adapter's tensors and config, then what is expected of the embedding, of the head (None: not written).
CASES: dict[str, tuple[dict[str, Tensor], dict[str, Any], Tensor, Tensor | None]] = {
    "neither": (peft_tensors((Q0,)), {}, BASE, None),
    "LoRA on the embedding": (embedding(), {}, BASE + delta(embedding()), BASE),
    "LoRA on the head": (head(), {}, BASE, BASE + delta(head())),
    "LoRA on both": ({**embedding(), **head()}, {}, BASE + delta(embedding()), BASE + delta(head())),
    "embedding saved": (
        saved("model.embed_tokens"),
        {"modules_to_save": ["embed_tokens"]},
        random_tensor((VOCAB, HIDDEN), 5),
        BASE,
    ),
    "head saved": (saved("lm_head"), {"modules_to_save": ["lm_head"]}, BASE, random_tensor((VOCAB, HIDDEN), 5)),
    "embedding saved, tying ensured": (
        saved("model.embed_tokens"),
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        random_tensor((VOCAB, HIDDEN), 5),
        None,
    ),
    "both written by PEFT itself": (
        {**peft_tensors((Q0,)), **saved("model.embed_tokens"), **saved("lm_head")},
        {},
        random_tensor((VOCAB, HIDDEN), 5),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_untie(tmp_path: Path, name: str) -> None:
    tensors, config, wanted_embedding, wanted_head = CASES[name]
    found, told, warnings = merged(make(tmp_path, tensors, **config))
    assert torch.allclose(found[EMBED], wanted_embedding, rtol=0, atol=1e-6)
    assert (HEAD in found) == (wanted_head is not None)
    assert told["tie_word_embeddings"] is (wanted_head is None)
    said = [warning for warning in warnings if "the base ties lm_head.weight to" in warning]
    assert len(said) == (wanted_head is not None)
    if wanted_head is not None:
        assert torch.allclose(found[HEAD], wanted_head, rtol=0, atol=1e-6)
    untouched = llama_tensors(tied=True)
    for tensor in untouched.keys() - {EMBED, f"{Q0}.weight"}:
        assert torch.equal(found[tensor], untouched[tensor]), tensor


def test_as_peft(tmp_path: Path) -> None:
    """Everything is added to the one tensor."""
    place = make(tmp_path, {**embedding(), **head()})
    found, told, warnings = merged(place, tied="peft")
    assert HEAD not in found and told["tie_word_embeddings"] is True
    assert torch.allclose(found[EMBED], BASE + delta(embedding()) + delta(head()), rtol=0, atol=1e-6)
    assert any("stay one tensor" in warning for warning in warnings)


def test_a_saved_head_is_a_tensor_of_its_own_in_either_mode(tmp_path: Path) -> None:
    tensors, config, _, wanted = CASES["head saved"]
    found, told, _ = merged(make(tmp_path, tensors, **config), tied="peft")
    assert wanted is not None and torch.equal(found[HEAD], wanted)
    assert torch.equal(found[EMBED], BASE) and told["tie_word_embeddings"] is False


def test_trained_tokens_are_seen_by_both_sides(tmp_path: Path) -> None:
    place = make(tmp_path, tokens("model.embed_tokens"), trainable_token_indices=[3, 60])
    found, told, _ = merged(place)
    assert HEAD not in found and told["tie_word_embeddings"] is True
    assert torch.equal(found[EMBED][[3, 60]], random_tensor((2, HIDDEN), 7))


def test_the_head_sees_trained_tokens_when_it_is_untied(tmp_path: Path) -> None:
    """LoRA on the head, and tokens of the embedding: in the unmerged model the head sees those tokens."""
    place = make(tmp_path, {**tokens("model.embed_tokens"), **head()}, trainable_token_indices=[3, 60])
    found, told, _ = merged(place)
    wanted = BASE + delta(head())
    wanted[[3, 60]] = random_tensor((2, HIDDEN), 7)
    assert torch.allclose(found[HEAD], wanted, rtol=0, atol=1e-6) and told["tie_word_embeddings"] is False


def test_tokens_of_the_head_alone(tmp_path: Path) -> None:
    indices = {"lm_head": [3, 60]}
    found, told, _ = merged(make(tmp_path, tokens("lm_head"), trainable_token_indices=indices))
    assert torch.equal(found[HEAD][[3, 60]], random_tensor((2, HIDDEN), 7))
    assert torch.equal(found[EMBED], BASE) and told["tie_word_embeddings"] is False


def test_a_head_that_is_stored_though_tied(tmp_path: Path) -> None:
    place = make(tmp_path, head())
    write_base(place.base, llama_tensors(), config=model_config(tie_word_embeddings=True, vocab_size=VOCAB))
    found, told, _ = merged(place)
    assert torch.allclose(found[HEAD], llama_tensors()[HEAD] + delta(head()), rtol=0, atol=1e-6)
    assert told["tie_word_embeddings"] is False


def test_resharded_and_converted(tmp_path: Path) -> None:
    """The new tensor has a place in the index and follows the output's dtype."""
    place = make(tmp_path, head())
    found, _, _ = merged(place, output={"dtype": "bfloat16", "max_shard_size": "20kB"})
    assert found[HEAD].dtype == torch.bfloat16
    index = json.loads((place.output / "model.safetensors.index.json").read_text())
    assert HEAD in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("kind", ["t5", "umt5", "switch_transformers"])
def test_a_model_that_cannot_be_untied(tmp_path: Path, kind: str) -> None:
    place = make(tmp_path, head())
    for file in place.base.glob("*.safetensors*"):
        file.unlink()
    shared = {"shared.weight": llama_tensors(tied=True)[EMBED]}
    architecture = {"t5": "T5ForConditionalGeneration", "umt5": "UMT5ForConditionalGeneration"}
    write_base(
        place.base,
        shared,
        shards=1,
        config={
            "model_type": kind,
            "architectures": [architecture.get(kind, "SwitchTransformersForConditionalGeneration")],
            "tie_word_embeddings": True,
        },
    )
    with pytest.raises(PlanError, match="cannot be untied"):
        shardmerge.plan(place.config())
    assert HEAD not in merged(place, tied="peft")[0]


# --- a resized vocabulary ---------------------------------------------------------------------------------------------

MORE = VOCAB + 3


def test_resized(tmp_path: Path) -> None:
    tensors = {**peft_tensors((Q0,)), **saved("model.embed_tokens", MORE), **saved("lm_head", MORE)}
    found, told, _ = merged(make(tmp_path, tensors))
    assert found[EMBED].shape == (MORE, HIDDEN) and HEAD not in found
    assert (told["vocab_size"], told["tie_word_embeddings"]) == (MORE, True)


def test_resized_of_a_text_model(tmp_path: Path) -> None:
    """Only what said the old size is changed."""
    tensors = {**peft_tensors((Q0,)), **saved("model.embed_tokens", MORE)}
    place = make(tmp_path, tensors)
    inner = {"vocab_size": VOCAB, "tie_word_embeddings": True}
    config = {**model_config(), "text_config": inner, "audio_config": {"vocab_size": 99}}
    write_base(place.base, llama_tensors(tied=True), config={**config, "tie_word_embeddings": True})
    _, told, _ = merged(place)
    assert told["text_config"]["vocab_size"] == MORE and told["audio_config"]["vocab_size"] == 99


def test_a_smaller_vocabulary(tmp_path: Path) -> None:
    tensors = {**peft_tensors((Q0,)), **saved("model.embed_tokens", VOCAB - 5)}
    found, told, _ = merged(make(tmp_path, tensors))
    assert found[EMBED].shape == (VOCAB - 5, HIDDEN) and told["vocab_size"] == VOCAB - 5


@pytest.mark.parametrize(
    ("tensors", "base", "part"),
    [
        (saved("model.embed_tokens", MORE), {"tie_word_embeddings": False}, "vocabulary, but not all of it"),
        ({**saved("model.embed_tokens", MORE), **saved("lm_head", MORE + 1)}, {}, "resizes the vocabulary"),
        (saved("model.embed_tokens", MORE), {"vocab_size": 99}, "that is not its vocabulary"),
        ({f"{P}model.norm.weight": torch.ones(HIDDEN + 1)}, {"vocab_size": 99}, "is [33]"),
    ],
    ids=["half of it", "two sizes", "not the vocabulary", "a norm"],
)
def test_what_cannot_be_resized(tmp_path: Path, tensors: dict[str, Tensor], base: dict[str, Any], part: str) -> None:
    place = make(tmp_path, {**peft_tensors((Q0,)), **tensors}, modules_to_save=["norm"])
    stored = llama_tensors(tied=base.get("tie_word_embeddings", True))
    config = {**model_config(tie_word_embeddings=True, vocab_size=VOCAB), **base}
    write_base(place.base, stored, config=config)
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(place.config())
    assert part in str(raised.value)


def test_a_weight_scales_what_was_learned_and_not_the_copy_of_the_base(tmp_path: Path) -> None:
    """PEFT writes a targeted embedding's own weight, too, which is no part of what the adapter learned."""
    copy = {f"{P}model.embed_tokens.base_layer.weight": BASE.clone()}
    place = make(tmp_path, {**embedding(), **copy})
    found, _, _ = merged(place, adapters=[{"path": str(place.adapter), "weight": 0.5}])
    assert torch.allclose(found[EMBED], BASE + 0.5 * delta(embedding()), rtol=0, atol=1e-6)
