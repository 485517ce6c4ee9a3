"""How lora_B of fused experts is laid out: what the file says, what our config says, and what must be asked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import shardmerge
from tests.support.family_oracle import Case, Mixture, merged_by_peft, write_case
from tests.support.peft_oracle import assert_same_bits, make_config, merge_to, stored

#: Of `Mixture`: four experts, up_proj (E, 40, 24).
EXPERTS, RANK, SCALE = 4, 3, 2.0
RANKED, GROUPED = "rank_major", "grouped_by_expert"


def case_of(folder: Path, **changes: Any) -> Case:
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=[], target_parameters=["experts.up_proj"])
    case = write_case(folder, config, make=Mixture)
    file = case.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return case


def marker(word: Any, **entry: Any) -> dict[str, Any]:
    """What Unsloth writes beside ``lora_B_layout``."""
    parameters = {"up_proj": {"lora_B_layout": word, "num_experts": EXPERTS, **entry}}
    return {"lora_A_layout": GROUPED, "parameters": parameters}


def formula(case: Case, word: str) -> torch.Tensor:
    """W + s · B A of every expert, in float64."""
    file = load_file(case.adapter / "adapter_model.safetensors")
    a, b = (file[f"base_model.model.experts.lora_{role}.weight"].double() for role in "AB")
    of = [b[:, e::EXPERTS] if word == RANKED else b[:, e * RANK : (e + 1) * RANK] for e in range(EXPERTS)]
    added = [of[e] @ a[e * RANK : (e + 1) * RANK] for e in range(EXPERTS)]
    return stored(case.base)["experts.up_proj"].double() + SCALE * torch.stack(added)


def merged(case: Case, output: Path, **entry: Any) -> torch.Tensor:
    merge_to(output, case.base, {"path": str(case.adapter), **entry})
    assert shardmerge.verify(output).raise_for_status().ok
    return stored(output)["experts.up_proj"].double()


def refusal(case: Case, **entry: Any) -> str:
    with pytest.raises(shardmerge.PlanError) as error:
        shardmerge.plan(make_config(case.base.with_name("out"), case.base, [{"path": str(case.adapter), **entry}]))
    return str(error.value)


UNSLOTH = {"auto_mapping": {"base_model_class": "Mixture", "unsloth_fixed": True}}


@pytest.mark.parametrize("word", [RANKED, GROUPED])
@pytest.mark.parametrize("where", ["flat", "by parameter", "both", "given too", "of Unsloth's"])
def test_the_file_is_obeyed(tmp_path: Path, word: str, where: str) -> None:
    settings: dict[str, Any] = {} if where == "by parameter" else {"lora_B_layout": word}
    if where != "flat":
        settings["unsloth_fused_expert_lora"] = marker(word)
    if where == "of Unsloth's":
        settings |= UNSLOTH
    case = case_of(tmp_path, **settings)
    given = {"expert_layout": "peft" if word == RANKED else "unsloth"} if where == "given too" else {}
    found = merged(case, tmp_path / "out", **given)
    assert torch.allclose(found, formula(case, word), rtol=0, atol=1e-6)
    assert not torch.allclose(found, formula(case, RANKED if word == GROUPED else GROUPED), rtol=0, atol=1e-3)
    if word == RANKED:
        assert_same_bits(stored(tmp_path / "out"), dict(merged_by_peft(case)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lora_B_layout": "mixed"}, ["lora_B_layout must be rank_major or grouped_by_expert", "its layers differ"]),
        ({"lora_B_layout": "by_column"}, ["lora_B_layout must be rank_major or grouped_by_expert, found 'by_column'"]),
        ({"lora_B_layout": ""}, ["lora_B_layout must be"]),
        ({"lora_B_layout": 1}, ["lora_B_layout must be"]),
        ({"unsloth_fused_expert_lora": marker("mixed")}, ["['up_proj'].lora_B_layout must be", "its layers differ"]),
        ({"unsloth_fused_expert_lora": marker(None)}, ["['up_proj'].lora_B_layout must be"]),
        ({"unsloth_fused_expert_lora": marker(RANKED, rows=1)}, ["['up_proj']: the key 'rows' is unknown"]),
        ({"unsloth_fused_expert_lora": marker(RANKED, num_experts=0)}, ["num_experts must be a whole number"]),
        ({"unsloth_fused_expert_lora": marker(RANKED, num_experts=5)}, ["up_proj has 5 experts, but lora_A has 4"]),
        ({"unsloth_fused_expert_lora": marker(RANKED) | {"x": 1}}, ["the key 'x' is unknown"]),
        ({"unsloth_fused_expert_lora": marker(RANKED) | {"lora_A_layout": RANKED}}, ["lora_A_layout must be grouped"]),
        ({"unsloth_fused_expert_lora": {"parameters": []}}, ["must hold parameters"]),
        ({"unsloth_fused_expert_lora": {}}, ["must hold parameters"]),
        ({"unsloth_fused_expert_lora": False}, ["must hold parameters"]),
        ({"unsloth_fused_expert_lora": {"parameters": {"up_proj": RANKED}}}, ["must hold lora_B_layout"]),
        (
            {"lora_B_layout": RANKED, "unsloth_fused_expert_lora": marker(GROUPED)},
            ["lora_B_layout: 'rank_major', but 'grouped_by_expert' for 'up_proj'", "one of them is wrong"],
        ),
    ],
    ids=str,
)
def test_what_the_file_says_wrongly_is_refused(tmp_path: Path, settings: dict[str, Any], told: list[str]) -> None:
    text = refusal(case_of(tmp_path, **settings))
    for part in told:
        assert part in text
    assert "remove" not in text


@pytest.mark.parametrize(("word", "given"), [(RANKED, "unsloth"), (GROUPED, "peft")])
def test_a_contradiction_names_both(tmp_path: Path, word: str, given: str) -> None:
    for settings in ({"lora_B_layout": word}, {"unsloth_fused_expert_lora": marker(word)}):
        text = refusal(case_of(tmp_path / str(len(settings)) / next(iter(settings)), **settings), expert_layout=given)
        assert f"lora_B_layout in adapter_config.json says {word} for up_proj" in text
        assert f"expert_layout: {given}" in text


@pytest.mark.parametrize("settings", [UNSLOTH, {"unsloth_fused_expert_lora": {"parameters": {}}}], ids=str)
def test_what_unsloth_made_and_does_not_say_is_asked_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    case = case_of(tmp_path, **settings)
    text = refusal(case)
    for part in ("Give expert_layout: peft (column k·E + e", "or unsloth (column e·r + k", "up_proj"):
        assert part in text
    for given, word in (("peft", RANKED), ("unsloth", GROUPED)):
        found = merged(case, tmp_path / given, expert_layout=given)
        assert torch.allclose(found, formula(case, word), rtol=0, atol=1e-6)


def test_without_a_sign_of_unsloth_it_is_as_peft_has_it(tmp_path: Path) -> None:
    for number, mapping in enumerate((None, {"unsloth_fixed": False}, {"parent_library": "transformers"})):
        case = case_of(tmp_path / str(number), auto_mapping=mapping)
        merged(case, tmp_path / f"out{number}")
        assert_same_bits(stored(tmp_path / f"out{number}"), dict(merged_by_peft(case)))


def test_where_both_are_the_same_nothing_is_asked(tmp_path: Path) -> None:
    """At rank 1, and of one matrix, there is no order of columns."""
    config = LoraConfig(r=1, lora_alpha=2, target_modules=[], target_parameters=["experts.up_proj"])
    case = write_case(tmp_path / "rank", config, make=Mixture)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=["embed.weight"])
    other = write_case(tmp_path / "matrix", config, make=Mixture)
    for of in (case, other):
        file = of.adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **UNSLOTH}))
        merge_to(of.base.with_name("out"), of.base, of.adapter)
        theirs = dict(merged_by_peft(Case(of.base, of.adapter, copy.deepcopy(of.net))))
        assert_same_bits(stored(of.base.with_name("out")), theirs)
