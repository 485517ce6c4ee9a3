"""Every reason for which a merge is refused: the class of the error, its words, and that nothing was written."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge
from shardmerge.errors import PlanError
from tests.support.builders import (
    Q0,
    llama_tensors,
    make_place,
    peft_config,
    peft_tensors,
    write_base,
    write_peft,
)
from tests.support.refusals import REFUSALS, P, Refusal, adapter, factors, refused


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refusal(tmp_path: Path, refusal: Refusal) -> None:
    place = make_place(tmp_path)
    refused(tmp_path, refusal.setup(place), refusal)


def test_the_place_before_its_setup_is_in_order(tmp_path: Path) -> None:
    """Else every refusal could be for a reason that is not the one it is named for."""
    assert len(list(shardmerge.plan(make_place(tmp_path).config()).updates())) == 3


SINGLE = {name: refusal for name, refusal in REFUSALS.items() if refusal.error is PlanError}
SEVERAL = {
    "factors are empty": 2,
    "nothing to merge": 2,
    "rank is not the config's": 3,
    "int8 factors": 3,
    "DoRA without lengths": 3,
    "scaling times weight overflows": 3,
    "format is not what it is": 7,
    "neither base nor adapter": 2,
    "everything at once": 5,
}


@pytest.mark.parametrize(("name", "refusal"), SINGLE.items(), ids=SINGLE)
def test_a_problem_is_told_once(tmp_path: Path, name: str, refusal: Refusal) -> None:
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(refusal.setup(make_place(tmp_path)))
    assert len(raised.value.problems) == SEVERAL.get(name, 1), raised.value
    assert len(set(raised.value.problems)) == len(raised.value.problems)


def test_every_line_names_its_adapter(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_peft(tmp_path / "good")
    config = adapter(peft_tensors(), use_qalora=True)(place)
    config["adapters"] = [str(tmp_path / "good"), str(place.adapter), str(tmp_path / "good")]
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(config)
    (problem,) = raised.value.problems
    assert problem.startswith(f"adapter {place.adapter}: use_qalora: ")


def test_of_many_alike_ten_are_listed(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    tensors: dict[str, Any] = {}
    for number in range(25):
        tensors |= factors(f"model.layers.{number + 100}.self_attn.q_proj", 32, 32)
    config = adapter(tensors)(place)
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(config)
    first, *listed, rest = raised.value.problems
    assert "none of the 25 weights that it updates is in the base" in first
    assert len(listed) == 10
    assert all("which is not in the base" in problem for problem in listed)
    assert rest.endswith("… and 15 more like the last")


def test_a_search_for_near_names_is_made_only_for_what_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search is slow; with thousands of leftovers of a large model they would take hours."""
    searched: list[str] = []

    def nearest(name: str, known: Collection[str]) -> list[str]:
        searched.append(name)
        return []

    monkeypatch.setattr(importlib.import_module("shardmerge.planning.match"), "nearest", nearest)
    place = make_place(tmp_path)
    tensors: dict[str, Any] = {f"strange.{number}": torch.ones(1) for number in range(50)}
    for number in range(50):
        tensors |= factors(f"model.ghosts.{number}.q_proj", 2, 2)
    with pytest.raises(PlanError):
        shardmerge.plan(adapter(tensors)(place))
    assert 0 < len(searched) <= 20


def test_too_little_memory_is_no_second_problem(tmp_path: Path) -> None:
    config = REFUSALS["ranks differ"].setup(make_place(tmp_path))
    with pytest.raises(PlanError) as raised:
        shardmerge.plan({**config, "compute": {"max_memory": 1}})
    assert len(raised.value.problems) == 1


# --- what is not refused ----------------------------------------------------------------------------------------------


def test_tied_head_does_not_forbid_other_targets(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_base(place.base, llama_tensors(tied=True), config={"tie_word_embeddings": True})
    assert len(list(shardmerge.plan(place.config()).updates())) == 3


def test_head_that_is_not_tied(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    config = adapter(factors("lm_head", 64, 32), target_modules=None)(place)
    assert [update.target for _, update in shardmerge.plan(config).updates()] == ["lm_head.weight"]


def test_several_adapters_may_update_the_same_weight(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_peft(tmp_path / "other", peft_tensors((Q0,), rank=2), config=peft_config(r=2, lora_alpha=1))
    config = place.config(adapters=[{"path": str(tmp_path / "other"), "weight": -3}, str(place.adapter)])
    updates = [update for _, update in shardmerge.plan(config).updates() if update.module == Q0]
    assert [(update.adapter, update.rank, update.scaling) for update in updates] == [(0, 2, -1.5), (1, 4, 2.0)]


def test_quantised_weights_that_nothing_updates(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    quantised = {**llama_tensors(), "model.x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    write_base(place.base, {**quantised, "model.x.weight_scale": torch.ones(1)})
    plan = shardmerge.plan(place.config(output={"dtype": "bfloat16"}))
    dtypes = {tensor.source.name: tensor.out.dtype for shard in plan.shards for tensor in shard.tensors}
    assert dtypes["model.x.weight"] == "F8_E4M3"
    assert dtypes["model.x.weight_scale"] == "F32"  # a part of it
    assert dtypes[Q0 + ".weight"] == "BF16"


def test_zero_scaling_is_a_warning(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    (warning,) = shardmerge.plan(place.config(adapters=[{"path": str(place.adapter), "weight": 0}])).warnings
    assert "every scaling is zero" in warning
    assert str(place.adapter) in warning
    assert P not in warning
