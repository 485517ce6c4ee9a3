"""Heads that are tied to the embedding: when they are untied, what is written then, and what is said."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.errors import FormatError
from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.table import table
from shardmerge.planning import untying
from shardmerge.planning.tied import tied_parameter
from tests.support import zoo
from tests.support.builders import (
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
from tests.support.peft_oracle import merge_to, stored
from tests.support.zoo import lora

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
    """PEFT writes a targeted embedding's own weight, too, which is not part of what the adapter learned."""
    copy = {f"{P}model.embed_tokens.base_layer.weight": BASE.clone()}
    place = make(tmp_path, {**embedding(), **copy})
    found, _, _ = merged(place, adapters=[{"path": str(place.adapter), "weight": 0.5}])
    assert torch.allclose(found[EMBED], BASE + 0.5 * delta(embedding()), rtol=0, atol=1e-6)


# --- a head that is stored with values of its own ---------------------------------------------------------------------


def copies(module: str, tensor: Tensor = BASE) -> dict[str, Tensor]:
    """What PEFT saves of a targeted embedding or head besides the factors."""
    return {f"{P}{module}.base_layer.weight": tensor.clone()}


def with_head(place: Place, head_weight: Tensor, **config: Any) -> Place:
    """The base has a head, though its config says that it is tied."""
    tensors = {**llama_tensors(tied=True), HEAD: head_weight}
    write_base(place.base, tensors, config=model_config(tie_word_embeddings=True, vocab_size=VOCAB, **config))
    return place


OTHER = random_tensor((VOCAB, HIDDEN), 77)


@pytest.mark.parametrize("tied", ["auto", "untie", "peft"])
@pytest.mark.parametrize("side", ["embedding", "head"])
def test_a_head_of_other_values_is_nobodys_copy(tmp_path: Path, side: str, tied: str) -> None:
    """As transformers 5 loads it: it compares the values and ties only what is equal."""
    trained = {**embedding(), **copies("model.embed_tokens")}
    if side == "head":
        trained = {**head(), **copies("lm_head", OTHER)}
    found, told, _ = merged(with_head(make(tmp_path, trained), OTHER), tied=tied)
    wanted = {EMBED: BASE, HEAD: OTHER + delta(head())}
    if side == "embedding":
        wanted = {EMBED: BASE + delta(embedding()), HEAD: OTHER}
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    assert told["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", ["auto", "peft"])
def test_a_head_of_equal_values_is_tied(tmp_path: Path, tied: str) -> None:
    place = with_head(make(tmp_path, {**embedding(), **copies("model.embed_tokens", OTHER)}), BASE.clone())
    found, told, _ = merged(place, tied=tied)
    assert torch.allclose(found[EMBED], OTHER + delta(embedding()), rtol=0, atol=1e-6)
    assert torch.allclose(found[HEAD], found[EMBED] if tied == "peft" else OTHER, rtol=0, atol=1e-6)
    assert told["tie_word_embeddings"] is (tied == "peft")


def test_a_resized_vocabulary_beside_a_head_of_other_values(tmp_path: Path) -> None:
    """Both were saved, and neither is the other's."""
    tensors = {**peft_tensors((Q0,)), **saved("model.embed_tokens", MORE), **saved("lm_head", MORE, 6)}
    found, told, _ = merged(with_head(make(tmp_path, tensors), OTHER))
    assert torch.equal(found[EMBED], random_tensor((MORE, HIDDEN), 5))
    assert torch.equal(found[HEAD], random_tensor((MORE, HIDDEN), 6)) and told["vocab_size"] == MORE


def test_the_last_row_alone_is_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are compared to the end, a block at a time."""
    monkeypatch.setattr(untying, "_BLOCK", 1000)
    almost = BASE.clone()
    almost[-1, -1] += 1
    place = with_head(make(tmp_path, {**embedding(), **copies("model.embed_tokens", OTHER)}), almost)
    assert torch.equal(merged(place)[0][HEAD], almost)


def test_only_the_head_is_stored(tmp_path: Path) -> None:
    """transformers ties the embedding to it then; untied, both must be there."""
    place = make(tmp_path, embedding())
    stored_head = {HEAD if name == EMBED else name: tensor for name, tensor in llama_tensors(tied=True).items()}
    write_base(place.base, stored_head, config=model_config(tie_word_embeddings=True, vocab_size=VOCAB))
    found, told, _ = merged(place)
    assert torch.allclose(found[EMBED], BASE + delta(embedding()), rtol=0, atol=1e-6)
    assert torch.equal(found[HEAD], BASE) and told["tie_word_embeddings"] is False


def test_only_the_head_is_stored_and_stays_tied(tmp_path: Path) -> None:
    place = make(tmp_path, tokens("model.embed_tokens"), trainable_token_indices=[3, 60])
    stored_head = {HEAD if name == EMBED else name: tensor for name, tensor in llama_tensors(tied=True).items()}
    write_base(place.base, stored_head, config=model_config(tie_word_embeddings=True, vocab_size=VOCAB))
    found, told, _ = merged(place)
    assert EMBED not in found and told["tie_word_embeddings"] is True
    assert torch.equal(found[HEAD][[3, 60]], random_tensor((2, HIDDEN), 7))


# --- architectures that the table does not know -----------------------------------------------------------------------


def unknown(place: Place, tensors: dict[str, Tensor] | None = None, **config: Any) -> Place:
    """A base of its own code."""
    there = llama_tensors(tied=True) if tensors is None else tensors
    write_base(place.base, there, config={"model_type": "of-its-own-code", "vocab_size": VOCAB, **config})
    return place


@pytest.mark.parametrize("says", [{}, {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
@pytest.mark.parametrize("tensors", [embedding(), head(), {**embedding(), **copies("model.embed_tokens")}])
def test_a_tie_that_nobody_knows_of_is_asked_for(tmp_path: Path, tensors: dict[str, Tensor], says: Any) -> None:
    place = unknown(make(tmp_path, tensors), **says)
    with pytest.raises(PlanError, match=r"which shardmerge does not know: choose tied: peft, .* or tied: untie"):
        shardmerge.plan(place.config())


@pytest.mark.parametrize("tensors", [embedding(), head()], ids=["embedding", "head"])
def test_a_tie_that_nobody_knows_of_is_undone_on_request(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    found, told, _ = merged(unknown(make(tmp_path, tensors)), tied="untie")
    touched = EMBED if tensors.keys() == embedding().keys() else HEAD
    both = {EMBED: BASE, HEAD: BASE, touched: BASE + delta(tensors)}
    for name, wanted in both.items():
        assert torch.allclose(found[name], wanted, rtol=0, atol=1e-6), name
    assert told["tie_word_embeddings"] is False


@pytest.mark.parametrize("tensors", [embedding(), head()], ids=["embedding", "head"])
def test_a_tie_that_nobody_knows_of_is_kept_on_request(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    found, told, _ = merged(unknown(make(tmp_path, tensors)), tied="peft")
    assert torch.allclose(found[EMBED], BASE + delta(tensors), rtol=0, atol=1e-6) and HEAD not in found
    assert "tie_word_embeddings" not in told


@pytest.mark.parametrize("tied", ["auto", "untie"])
def test_a_head_whose_name_nobody_knows(tmp_path: Path, tied: str) -> None:
    tensors = {name.replace("model.embed_tokens", "trunk.vocabulary"): of for name, of in embedding().items()}
    base = {name.replace("model.embed_tokens", "trunk.vocabulary"): of for name, of in llama_tensors(tied=True).items()}
    place = unknown(make(tmp_path, tensors), base)
    with pytest.raises(PlanError, match="what its output head is called is not known"):
        shardmerge.plan(place.config(tied=tied))
    found, _, _ = merged(place, tied="peft")
    assert torch.allclose(found["trunk.vocabulary.weight"], BASE + delta(embedding()), rtol=0, atol=1e-6)


def test_a_head_that_the_adapter_names(tmp_path: Path) -> None:
    """Its convention is none of ours."""
    tensors = {name.replace("lm_head", "trunk.output_layer"): of for name, of in head().items()}
    base = {name.replace("model.embed_tokens", "trunk.vocabulary"): of for name, of in llama_tensors(tied=True).items()}
    found, _, _ = merged(unknown(make(tmp_path, tensors), base), tied="untie")
    assert torch.allclose(found["trunk.output_layer.weight"], BASE + delta(head()), rtol=0, atol=1e-6)
    assert torch.equal(found["trunk.vocabulary.weight"], BASE)


@pytest.mark.parametrize(
    ("tensors", "base", "config"),
    [
        (peft_tensors((Q0,)), llama_tensors(tied=True), {"tie_word_embeddings": True}),
        (embedding(), llama_tensors(tied=True), {"tie_word_embeddings": False}),
        (embedding(), llama_tensors(), {}),
        (head(), llama_tensors(), {"tie_word_embeddings": False}),
        (head(), llama_tensors(), {"tie_word_embeddings": True}),
        (tokens("model.embed_tokens"), llama_tensors(tied=True), {}),
        ({**peft_tensors((Q0,)), **saved("model.embed_tokens", VOCAB + 3)}, llama_tensors(tied=True), {}),
    ],
    ids=["neither", "not tied", "head stored", "not tied, stored", "stored apart", "tokens", "resized"],
)
def test_nothing_to_ask(tmp_path: Path, tensors: Any, base: Any, config: Any) -> None:
    """Where it is not tied, or one tensor was trained for both sides."""
    place = make(tmp_path, tensors, trainable_token_indices=[3, 60])
    found, told, _ = merged(unknown(place, base, **config))
    assert found.keys() == base.keys()
    assert told.get("tie_word_embeddings") == config.get("tie_word_embeddings")


def test_equal_head_of_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    base = {**llama_tensors(tied=True), HEAD: BASE.clone()}
    place = unknown(make(tmp_path, head()), base, tie_word_embeddings=True)
    with pytest.raises(PlanError, match="choose tied: peft"):
        shardmerge.plan(place.config())
    found, told, _ = merged(place, tied="untie")
    assert torch.allclose(found[HEAD], BASE + delta(head()), rtol=0, atol=1e-6)
    assert torch.equal(found[EMBED], BASE) and told["tie_word_embeddings"] is False


def test_code_that_comes_with_a_model_of_a_known_type(tmp_path: Path) -> None:
    """MPT's own code has no head at all, whatever transformers makes of the type."""
    place = make(tmp_path, embedding())
    config = {**model_config(tie_word_embeddings=True, vocab_size=VOCAB), "architectures": ["MyForCausalLM"]}
    write_base(place.base, llama_tensors(tied=True), config={**config, "auto_map": {"AutoModelForCausalLM": "my.My"}})
    with pytest.raises(PlanError, match="whether llama ties an output head to it is up to the model's code"):
        shardmerge.plan(place.config())


def test_ties_across_numbers_cannot_be_undone(tmp_path: Path) -> None:
    place = make(
        tmp_path,
        {
            f"{P}class_embed.0.lora_A.weight": random_tensor((RANK, HIDDEN), 1),
            f"{P}class_embed.0.lora_B.weight": random_tensor((7, RANK), 2),
        },
    )
    base = {"class_embed.0.weight": random_tensor((7, HIDDEN), 3), "model.decoder.norm.weight": torch.ones(4)}
    for file in place.base.glob("*.safetensors*"):
        file.unlink()
    config = {"model_type": "deformable_detr", "architectures": ["DeformableDetrForObjectDetection"]}
    write_base(place.base, base, shards=1, config=config)
    with pytest.raises(PlanError, match=r"class_embed\.0\.weight, to which the model ties the same of other numbers"):
        shardmerge.plan(place.config())
    found, _, warnings = merged(place, tied="peft")
    assert not torch.equal(found["class_embed.0.weight"], base["class_embed.0.weight"])
    assert any("stays one tensor" in warning for warning in warnings)


def test_a_tie_of_what_is_stored_in_parts_cannot_be_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No class has one today."""
    known = table().architectures
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    tied = {**known["MixtralForCausalLM"].tied, "model.twin": experts}
    monkeypatch.setitem(known, "MixtralForCausalLM", dataclasses.replace(known["MixtralForCausalLM"], tied=tied))
    base = {"model.embed_tokens.weight": BASE}
    for expert, part in itertools.product(range(2), ("w1", "w3")):
        base[f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"] = torch.ones(6, HIDDEN)
    place = make(tmp_path, embedding())
    for file in place.base.glob("*.safetensors*"):
        file.unlink()
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "tie_word_embeddings": True}
    write_base(place.base, base, shards=1, config=config)
    with pytest.raises(PlanError, match=f"{experts}, which is tied as well, is not stored as one tensor"):
        shardmerge.plan(place.config())


# --- several adapters -------------------------------------------------------------------------------------------------


def two(tmp_path: Path, first: dict[str, Tensor], second: dict[str, Tensor], *config: dict[str, Any]) -> dict[str, Any]:
    """A plan's config of two adapters on a base that is not tied."""
    configs = [*config, {}, {}]
    place = make(tmp_path, first, **configs[0])
    write_base(place.base, llama_tensors(), config=model_config(vocab_size=VOCAB))
    more = write_peft(tmp_path / "second", second, config=peft_config(target_modules=None, **configs[1]))
    return place.config(adapters=[str(place.adapter), str(more)])


def result(config: dict[str, Any]) -> dict[str, Tensor]:
    shardmerge.merge(config)
    return read_tensors(Path(config["output"]["path"]))


def test_two_adapters_with_copies_of_the_same_base_both_add(tmp_path: Path) -> None:
    both = [{**embedding(seed), **copies("model.embed_tokens", llama_tensors()[EMBED])} for seed in (1, 11)]
    found = result(two(tmp_path, *both))[EMBED]
    wanted = llama_tensors()[EMBED] + delta(embedding(1)) + delta(embedding(11))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


def test_two_adapters_on_a_resized_vocabulary(tmp_path: Path) -> None:
    """The second's copy is the first's."""
    grown = random_tensor((MORE, HIDDEN), 5)
    larger = {**copies("model.embed_tokens", grown), **saved("lm_head", MORE, 6)}
    factors = [
        {
            f"{P}model.embed_tokens.lora_embedding_A": random_tensor((RANK, MORE), seed, std=0.3),
            f"{P}model.embed_tokens.lora_embedding_B": random_tensor((HIDDEN, RANK), seed + 1, std=0.3),
        }
        for seed in (1, 11)
    ]
    found = result(two(tmp_path, {**factors[0], **larger}, {**factors[1], **copies("model.embed_tokens", grown)}))
    deltas = [2 * (b @ a).T for a, b in (list(of.values()) for of in factors)]
    assert torch.allclose(found[EMBED], grown + deltas[0] + deltas[1], rtol=0, atol=1e-5)


def test_a_later_copy_of_another_base_is_refused(tmp_path: Path) -> None:
    config = two(tmp_path, embedding(), {**embedding(11), **copies("model.embed_tokens", OTHER)})
    with pytest.raises(FormatError, match=r"copy of model\.embed_tokens\.weight differs from the base's in rows"):
        shardmerge.merge(config)


def test_a_later_copy_of_another_size_is_refused(tmp_path: Path) -> None:
    config = two(tmp_path, embedding(), copies("model.embed_tokens", random_tensor((MORE, HIDDEN), 5)))
    with pytest.raises(
        PlanError, match=f"has {MORE} rows, but for adapter .* it has {VOCAB}: they were trained on diff"
    ):
        shardmerge.plan(config)


def test_a_copy_after_a_trained_whole_is_refused(tmp_path: Path) -> None:
    first = {"modules_to_save": ["embed_tokens"]}
    second = {**embedding(), **copies("model.embed_tokens", llama_tensors()[EMBED])}
    with pytest.raises(PlanError, match="would undo"):
        shardmerge.plan(two(tmp_path, saved("model.embed_tokens"), second, first))


def test_a_first_adapters_copy_is_what_peft_loads(tmp_path: Path) -> None:
    """Though it is not the base's."""
    second = {f"{P}{Q0}.lora_A.weight": torch.ones(RANK, HIDDEN), f"{P}{Q0}.lora_B.weight": torch.ones(HIDDEN, RANK)}
    found = result(two(tmp_path, {**embedding(), **copies("model.embed_tokens", OTHER)}, second))
    assert torch.allclose(found[EMBED], OTHER + delta(embedding()), rtol=0, atol=1e-6)


def rows(*indices: int) -> dict[str, Any]:
    return {"trainable_token_indices": list(indices)}


@pytest.mark.parametrize(
    ("first", "config"),
    [
        (embedding(), {}),
        (saved("model.embed_tokens"), {"modules_to_save": ["embed_tokens"]}),
        (tokens("model.embed_tokens"), rows(60, 4)),
    ],
    ids=["LoRA", "saved", "the same token"],
)
def test_later_trained_tokens_undo_what_was_done_before(tmp_path: Path, first: Any, config: Any) -> None:
    with pytest.raises(PlanError, match=r"replaces rows of model\.embed_tokens\.weight, which would undo"):
        shardmerge.plan(two(tmp_path, first, tokens("model.embed_tokens", 17), config, rows(3, 60)))


def test_other_tokens_and_what_comes_after_them_undo_nothing(tmp_path: Path) -> None:
    copy = {f"{P}model.embed_tokens.token_adapter.base_layer.weight": llama_tensors()[EMBED]}
    first, second = {**tokens("model.embed_tokens"), **copy}, {**tokens("model.embed_tokens", 17), **copy}
    config = two(tmp_path, first, second, rows(3, 60), rows(4, 5))
    third = write_peft(tmp_path / "third", embedding(), config=peft_config(target_modules=None))
    found = result({**config, "adapters": [*config["adapters"], str(third)]})[EMBED]
    wanted = llama_tensors()[EMBED].clone()
    wanted[[3, 60]], wanted[[4, 5]] = random_tensor((2, HIDDEN), 7), random_tensor((2, HIDDEN), 17)
    assert torch.allclose(found, wanted + delta(embedding()), rtol=0, atol=1e-6)
