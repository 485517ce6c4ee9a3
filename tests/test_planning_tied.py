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
from shardmerge.names import Names
from shardmerge.planning.tied import tied_parameter
from tests import zoo
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
from tests.peft_oracle import merge_to, stored
from tests.zoo import lora

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


@pytest.mark.parametrize("tied", ["untie", "peft"])
def test_the_head_sees_trained_tokens_when_it_is_untied(tmp_path: Path, tied: str) -> None:
    """LoRA on the head, and tokens of the embedding: in the unmerged model LoRA adds to what the head sees of them."""
    place = make(tmp_path, {**tokens("model.embed_tokens"), **head()}, trainable_token_indices=[3, 60])
    found, told, _ = merged(place, tied=tied)
    wanted = BASE.clone()
    wanted[[3, 60]] = random_tensor((2, HIDDEN), 7)
    name = HEAD if tied == "untie" else EMBED
    assert torch.allclose(found[name], wanted + delta(head()), rtol=0, atol=1e-6)
    assert told["tie_word_embeddings"] is (tied == "peft")


@pytest.mark.parametrize("model", ["llama-tied", "bart"])
def test_tokens_and_lora_on_the_head_compute_what_peft_computes(tmp_path: Path, model: str) -> None:
    """BART has an encoder's and a decoder's embedding, too: untied with the head, they must not lose the tokens."""
    adapter = lora("lm_head", trainable_token_indices=[5, 3, 50])
    merge_to(tmp_path / "out", zoo.base_folder(model), zoo.adapter_folder(model, adapter))
    ours = zoo.answer(zoo.load(tmp_path / "out"), zoo.MODELS[model].inputs())
    assert torch.allclose(ours, zoo.adapter_answer(model, adapter), rtol=0, atol=2e-5)


# --- one tensor for both sides ----------------------------------------------------------------------------------------


def test_what_was_saved_for_both_sides_is_what_the_next_adapter_finds(tmp_path: Path) -> None:
    """Tying was ensured by the first adapter; the second has LoRA on the head."""
    place = make(tmp_path, saved("model.embed_tokens"), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    second = write_peft(tmp_path / "second", head(), config=peft_config(target_modules=None))
    found, _, _ = merged(place, adapters=[str(place.adapter), str(second)])
    assert torch.equal(found[EMBED], random_tensor((VOCAB, HIDDEN), 5))
    assert torch.allclose(found[HEAD], random_tensor((VOCAB, HIDDEN), 5) + delta(head()), rtol=0, atol=1e-6)
    with pytest.raises(PlanError, match="would undo"):
        shardmerge.plan(place.config(adapters=[str(second), str(place.adapter)]))


@pytest.mark.parametrize("tied", ["untie", "peft"])
def test_copies_of_the_base_that_two_adapters_bring_are_no_updates_of_the_other_side(tmp_path: Path, tied: str) -> None:
    place = make(tmp_path, {**embedding(), f"{P}model.embed_tokens.base_layer.weight": BASE.clone()})
    tensors = {**head(), f"{P}lm_head.base_layer.weight": BASE.clone()}
    second = write_peft(tmp_path / "second", tensors, config=peft_config(target_modules=None))
    found, _, _ = merged(place, adapters=[str(place.adapter), str(second)], tied=tied)
    both = {EMBED: BASE + delta(embedding()), HEAD: BASE + delta(head())}
    if tied == "peft":
        both = {EMBED: BASE + delta(embedding()) + delta(head())}
    assert {name for name in (EMBED, HEAD) if name in found} == both.keys()
    for name, wanted in both.items():
        assert torch.allclose(found[name], wanted, rtol=0, atol=1e-6)


def test_a_copy_that_is_there_for_the_head_alone_is_of_the_one_tensor(tmp_path: Path) -> None:
    copy = random_tensor((VOCAB, HIDDEN), 6)
    tensors = {**tokens("model.embed_tokens"), **head(), f"{P}lm_head.base_layer.weight": copy}
    found, _, _ = merged(make(tmp_path, tensors, trainable_token_indices=[3, 60]), tied="peft")
    wanted = copy.clone()
    wanted[[3, 60]] = random_tensor((2, HIDDEN), 7)
    assert torch.allclose(found[EMBED], wanted + delta(head()), rtol=0, atol=1e-6) and HEAD not in found


def test_a_stored_head_has_its_own_copy(tmp_path: Path) -> None:
    tensors = {**saved("model.embed_tokens", MORE), **saved("lm_head", MORE, 6)}
    place = make(tmp_path, {**peft_tensors((Q0,)), **tensors})
    write_base(place.base, llama_tensors(), config=model_config(tie_word_embeddings=True, vocab_size=VOCAB))
    found, told, _ = merged(place)
    assert torch.equal(found[EMBED], random_tensor((MORE, HIDDEN), 5)) and told["vocab_size"] == MORE
    assert torch.equal(found[HEAD], random_tensor((MORE, HIDDEN), 6))


def test_a_head_of_a_part_has_its_parts_embedding() -> None:
    """SeamlessM4T has two heads, and the name of one is the end of the other's."""
    shapes = {"shared.weight": (9, 4), "t2u_model.model.decoder.embed_tokens.weight": (7, 4)}
    names = Names({"model_type": "seamless_m4t", "architectures": ["SeamlessM4TModel"]}, shapes)
    for module, rows in (("lm_head", 9), ("t2u_model.lm_head", 7)):
        found = tied_parameter(names, module, "weight")
        assert found is not None and (found.name, found.shape) == (f"{module}.weight", (rows, 4))


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


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_a_head_that_is_apart_though_transformers_5_would_tie_it(tmp_path: Path, kind: str) -> None:
    """As of T5 1.1. With transformers 4 PEFT saved the two apart where the vocabulary had been resized."""
    head = {f"{P}lm_head.weight": random_tensor((MORE, HIDDEN), 9)}
    place = make(tmp_path, {f"{P}shared.weight": random_tensor((MORE, HIDDEN), 8), **head})
    for file in place.base.glob("*.safetensors*"):
        file.unlink()
    config = {"model_type": kind.lower(), "architectures": [f"{kind}ForConditionalGeneration"], "vocab_size": VOCAB}
    tensors = {"shared.weight": BASE, HEAD: random_tensor((VOCAB, HIDDEN), 7)}
    write_base(place.base, tensors, shards=1, config={**config, "tie_word_embeddings": False})
    found, told, _ = merged(place)
    assert torch.equal(found["shared.weight"], random_tensor((MORE, HIDDEN), 8))
    assert torch.equal(found[HEAD], random_tensor((MORE, HIDDEN), 9))
    assert (told["vocab_size"], told["tie_word_embeddings"]) == (MORE, False)


# --- a resized vocabulary ---------------------------------------------------------------------------------------------

MORE = VOCAB + 3

#: What embeddings and heads are called that PEFT saves where they were resized. Of code that comes with a model:
#: output and tok_embeddings (InternLM2), output_layer (ChatGLM).
CALLED = [
    *("embed_in", "embed_tokens", "shared", "tok_embeddings", "tokens_embed", "word_embedding", "word_embeddings"),
    *("wte", "decoder", "embed_out", "generator_lm_head", "lm_head", "lm_loss", "output", "output_layer"),
    *("output_projection", "proj_out", "vocab_projector"),
]


@pytest.mark.parametrize("called", CALLED)
def test_whatever_the_embedding_is_called(tmp_path: Path, called: str) -> None:
    place = Place(tmp_path)
    module = f"transformer.{called}"
    base = {
        f"{module}.weight": BASE,
        f"{module}.bias": random_tensor((VOCAB,), 1),
        "transformer.q.weight": torch.ones(4, 4),
    }
    write_base(place.base, base, shards=1, config={"model_type": "of-its-own-code", "vocab_size": VOCAB})
    q = {f"{P}transformer.q.lora_A.weight": torch.ones(RANK, 4), f"{P}transformer.q.lora_B.weight": torch.ones(4, RANK)}
    more = {f"{module}.weight": random_tensor((MORE, HIDDEN), 8), f"{module}.bias": random_tensor((MORE,), 9)}
    tensors = {**q, **{P + name: tensor for name, tensor in more.items()}}
    write_peft(place.adapter, tensors, config=peft_config(target_modules=["q"]))
    found, told, _ = merged(place)
    assert all(torch.equal(found[name], tensor) for name, tensor in more.items())
    assert told["vocab_size"] == MORE


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")], ids="+".join)
def test_resized_where_one_side_is_targeted(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """PEFT saves the one tensor for the targeted side alone."""
    adapter = lora(*targets, more_tokens=4)
    folder = zoo.adapter_folder("llama-tied", adapter)
    merge_to(tmp_path / "out", zoo.base_folder("llama-tied"), folder)
    tensors, found = stored(folder), stored(tmp_path / "out")
    copy = next(tensor for name, tensor in tensors.items() if name.endswith("base_layer.weight"))
    for module, weight in (("lm_head", found[HEAD]), ("embed_tokens", found[EMBED])):
        wanted = copy
        if module in targets:
            a, b = (tensor for name, tensor in sorted(tensors.items()) if f"{module}.lora" in name)
            change = 2.6 * (b @ a)
            wanted = copy + (change if change.shape == copy.shape else change.T)
        assert torch.allclose(weight, wanted, rtol=0, atol=1e-5), module
    ours = zoo.answer(zoo.load(tmp_path / "out"), zoo.MODELS["llama-tied"].inputs())
    assert torch.allclose(ours, zoo.adapter_answer("llama-tied", adapter), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "bias"), [("bart", "final_logits_bias"), ("roberta", "lm_head.bias")], ids=["bart", "roberta"]
)
def test_a_bias_of_the_output_that_peft_does_not_save(tmp_path: Path, model: str, bias: str) -> None:
    """transformers makes it longer with the rest, but the adapter does not have it: a model of both would not load."""
    adapter = lora("all-linear", more_tokens=4)
    with pytest.raises(PlanError, match=f"but not all of it: .*{bias} has 61"):
        merge_to(tmp_path / "out", zoo.base_folder(model), zoo.adapter_folder(model, adapter))


@pytest.mark.parametrize(
    ("name", "entries", "accepted"),
    [
        ("cls.predictions.bias", VOCAB, False),
        ("lm_head.bias", VOCAB, False),
        ("entity_predictions.bias", VOCAB - 7, True),
        ("model.layers.0.mlp.bias", VOCAB, True),
    ],
)
def test_which_biases_are_of_the_vocabulary(tmp_path: Path, name: str, entries: int, accepted: bool) -> None:
    place = make(tmp_path, {**peft_tensors((Q0,)), **saved("model.embed_tokens", MORE)})
    base = {**llama_tensors(tied=True), name: torch.ones(entries)}
    write_base(place.base, base, config=model_config(tie_word_embeddings=True, vocab_size=VOCAB))
    if accepted:
        assert merged(place)[1]["vocab_size"] == MORE
    else:
        with pytest.raises(PlanError, match=f"but not all of it: {name} has {entries}"):
            shardmerge.plan(place.config())


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
