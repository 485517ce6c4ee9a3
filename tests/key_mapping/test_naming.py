"""Adapter module → base weight: what is stripped from names, and which names are near."""

from __future__ import annotations

import pytest

from shardmerge.key_mapping.naming import module_name, nearest
from tests.support.builders import Q0, llama_tensors

KNOWN = list(llama_tensors())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("base_model.model.lm_head", "lm_head"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("_orig_mod.base_model.model.lm_head", "lm_head"),
        ("base_model.model._orig_mod.lm_head", "lm_head"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c", "a.b.c"),
        ("a.not_orig_mod.b", "a.not_orig_mod.b"),
        ("base_model.model.base_model.model.x", "base_model.model.x"),
        ("base_model.modelx", "base_model.modelx"),
        ("x.base_model.model.y", "x.base_model.model.y"),
    ],
)
def test_module_name(name: str, module: str) -> None:
    assert module_name(name) == module


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("layers.0.self_attn.q_proj.weight", Q0 + ".weight"),
        ("base_model.model.model.model.layers.0.self_attn.q_proj.weight", Q0 + ".weight"),
        ("language_model.model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.q_porj.weight", Q0 + ".weight"),
        ("model.embed_token.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
    ],
    ids=["prefix missing", "prefix twice", "another prefix", "misspelt", "misspelt at the end", "short"],
)
def test_nearest(name: str, first: str) -> None:
    found = nearest(name, KNOWN)
    assert found[0] == first
    assert len(found) <= 3
    assert set(found) <= set(KNOWN)


def test_same_end_comes_before_the_same_spelling() -> None:
    known = ["model.layers.0.mlp.up_proj.weight", "transformer.blocks.0.mlp.up_proj.weight"]
    assert nearest("decoder.blocks.0.mlp.up_proj.weight", known)[0] == "transformer.blocks.0.mlp.up_proj.weight"


def test_nothing_is_near() -> None:
    assert nearest("zzzz.qqqq", ["model.norm.weight"]) == []
    assert nearest("x", []) == []
