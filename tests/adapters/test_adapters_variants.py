"""Variants of LoRA: that each which PEFT has is known here, and what does not fit is refused by name.

That they are merged as PEFT merges them, `test_adapters_options` and `test_adapters_methods` show.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layers

import shardmerge
from shardmerge.adapters.formats.lora_forms import variants
from shardmerge.adapters.formats.peft_lora import LoraMethod
from tests.support.family_oracle import Case, Swapped, assert_equals_peft, change_tensors, refusal, write_case
from tests.support.peft_oracle import assert_same_bits, make_config, stored

#: What is done with every variant: merged, or refused.
VARIANTS = {
    **dict.fromkeys(("use_dora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config", "mica"), "merged"),
    **dict.fromkeys(("arrow_config", "alora_invocation_tokens"), "refused"),
}


def _layers(cls: Any) -> Iterator[Any]:
    yield cls
    for below in cls.__subclasses__():
        yield from _layers(below)


#: What PEFT's layers say of the variants that they may be of, each by the names of the settings that choose it.
TABLES = [list(cls.lora_variants.fget(object.__new__(cls))) for cls in _layers(peft_layers.LoraLayer)]


def test_every_variant_is_known() -> None:
    fields = dataclasses.fields(LoraConfig)
    tagged = {of.name for of in fields if of.metadata.get("is_lora_variant")}
    initial = {name for of in fields for name in of.metadata.get("lora_variants", ())}
    assert tagged | initial == VARIANTS.keys()
    assert {name for table in TABLES for names in table for name in names} <= VARIANTS.keys()
    refused = {name for name, what in VARIANTS.items() if what == "refused"}
    assert refused <= LoraMethod.refused.keys()
    chosen = variants({**{name: {} for name in VARIANTS}, "init_lora_weights": "mica"})
    assert set(chosen) == {*(VARIANTS.keys() - refused - {"mica"}), "init_lora_weights: mica"}


def test_peft_knows_no_adapter_of_two_variants() -> None:
    assert all(len(names) < 2 for table in TABLES for names in table)


def write(folder: Path, *targets: str, **settings: Any) -> Case:
    return write_case(folder, LoraConfig(r=4, target_modules=list(targets or ("wide", "square")), **settings))


def test_two_variants_are_refused(tmp_path: Path) -> None:
    case = write(tmp_path, kasa_config={})
    assert "sets use_dora and kasa_config, but PEFT knows no adapter" in refusal(case, use_dora=True)
    assert "kasa_config and init_lora_weights: mica" in refusal(case, use_dora=False, init_lora_weights="mica")
    case = write(tmp_path / "velora", velora_config={})
    assert "sets use_dora and velora_config" in refusal(case, use_dora=True)


@pytest.mark.parametrize("key", ["kasa_config", "monteclora_config", "velora_config"])
@pytest.mark.parametrize("value", [True, 3, "x", ["x"]])
def test_a_variant_is_a_mapping_of_settings(key: str, value: Any, tmp_path: Path) -> None:
    assert f"{key} must be a mapping of settings, or null" in refusal(write(tmp_path, **{key: {}}), **{key: value})


# --- VeLoRA and MonteCLoRA: state of the training ---------------------------------------------------------------------


@pytest.mark.parametrize("key", ["monteclora_config", "velora_config"])
def test_state_of_the_training_without_its_variant_is_refused(key: str, tmp_path: Path) -> None:
    case = write(tmp_path, **{key: {}})
    state = {"monteclora_config": "lora_monteclora_sampler", "velora_config": "lora_velora_embed"}[key]
    assert state in refusal(case, **{key: None})


@pytest.mark.parametrize("key", ["monteclora_config", "velora_config"])
def test_state_under_the_adapters_name(key: str, tmp_path: Path) -> None:
    """As a state dict of the model has it; PEFT's own file drops the name."""
    case = write(tmp_path, **{key: {}})
    whole = assert_equals_peft(case, tmp_path / "out")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            plain = name.replace("lora_velora_embed", "lora_velora_embed.default")
            plain = plain.replace("lora_monteclora_sampler.", "lora_monteclora_sampler.default.")
            tensors[plain.replace(".weight", ".default.weight")] = tensors.pop(name)

    change_tensors(case, rename)
    shardmerge.merge(make_config(tmp_path / "named", case.base, [case.adapter]))
    assert_same_bits(stored(tmp_path / "named"), whole)


# --- KaSA -------------------------------------------------------------------------------------------------------------


def test_kasa_that_does_not_fit(tmp_path: Path) -> None:
    case = write(tmp_path, kasa_config={})
    assert "square.lora_diag is there, but" in refusal(case, kasa_config=None)
    case = write(tmp_path / "plain")
    assert "says kasa_config, but base_model.model.square.lora_diag is missing" in refusal(case, kasa_config={})
    case = write(tmp_path / "embedding", "embed")
    assert "embed.lora_diag is missing" in refusal(case, kasa_config={})
    config = LoraConfig(r=4, target_modules=["wide"], target_parameters=["conv1.weight"])
    case = write_case(tmp_path / "parameter", config)
    assert "sets kasa_config, which target_parameters lack" in refusal(case, kasa_config={})


def test_kasa_of_a_layer_that_peft_refuses(tmp_path: Path) -> None:
    """A Conv1D, whose W is (in, out), and a convolution; and no singular value may be left."""
    case = write_case(tmp_path, LoraConfig(r=4, target_modules=["wide"]), make=Swapped)
    _add_diagonals(case)
    assert "KaSA updates Linear layers only" in refusal(case, kasa_config={})
    case = write(tmp_path / "conv", "conv1")
    _add_diagonals(case)
    assert "KaSA updates Linear layers only" in refusal(case, kasa_config={})
    case = write_case(tmp_path / "all", LoraConfig(r=24, target_modules=["wide"]))
    _add_diagonals(case)
    assert "cuts r singular values from [56, 24] and must leave one" in refusal(case, kasa_config={})


def _add_diagonals(case: Case) -> None:
    rank = json.loads((case.adapter / "adapter_config.json").read_text())["r"]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            tensors[name.replace("lora_A.weight", "lora_diag")] = torch.ones(rank)

    change_tensors(case, add)


def test_kasa_reads_the_base_as_it_was(tmp_path: Path) -> None:
    """PEFT too mixes it with no other adapter: what is cut would depend on which of them came first."""
    kasa, plain = write(tmp_path / "kasa", kasa_config={}), write(tmp_path / "plain")
    shardmerge.plan(make_config(tmp_path / "out", kasa.base, [kasa.adapter, plain.adapter]))
    with pytest.raises(shardmerge.PlanError, match=r"needs wide\.weight as it is"):
        shardmerge.plan(make_config(tmp_path / "out", kasa.base, [plain.adapter, kasa.adapter]))


def test_kasa_is_not_weighted(tmp_path: Path) -> None:
    case = write(tmp_path, kasa_config={})
    with pytest.raises(shardmerge.PlanError, match="has no meaning for kasa"):
        shardmerge.plan(make_config(tmp_path / "out", case.base, [{"path": str(case.adapter), "weight": 0.5}]))
