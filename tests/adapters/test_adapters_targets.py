"""Settings that choose modules: a module is left out exactly where PEFT leaves it out when it loads the adapter."""

from __future__ import annotations

import copy
import itertools
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel
from peft.tuners.tuners_utils import MIN_TARGET_MODULES_FOR_OPTIMIZATION, BaseTunerLayer, check_target_module_exists
from torch import nn

from shardmerge.adapters.formats import peft_targets as targets
from shardmerge.adapters.registry import METHODS
from tests.support.builders import layer, refs_of
from tests.support.claims import claim_peft, shapes
from tests.support.family_oracle import Case, Net, refusal, write_case
from tests.support.peft_kinds import KINDS, SETTINGS, of_every_method

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.0.mlp.experts.1.up_proj",
    "encoder.h.1.block.3.q_proj",
    "layers.1.q_proj",
    "h.1.q_proj",
    "a.h.1",
    "q_proj",
    "lm_head",
    "model.lm_headless.q_proj",
    "model.vision.layers.1.q_proj",
    "model.score.q_proj",
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "target_modules": (
        ["q_proj", "up_proj"],
        ["1.self_attn.q_proj", "lm_head"],
        [],
        NAMES[:3],
        r".*(q_proj|up_proj)",
        r"model\..*",
    ),
    "exclude_modules": (None, [], "", ["q_proj"], ["0.self_attn.q_proj", "lm_head"], r".*vision.*", r"q_proj"),
    "modules_to_save": (None, [], ["lm_head"], ["score", "vision"], ["layers.1"], ["s.ore"], [r"h|layers"]),
    "layers_to_transform": (None, [], 1, 0, [0, 11], [3]),
    "layers_pattern": (None, [], "", "layers", ["h", "layers"], ["experts"], "layers|h", r"(h|layers)", r"block\.3"),
}


def choices() -> list[dict[str, Any]]:
    found = []
    for values in itertools.product(*CHOICES.values()):
        chosen = {key: list(of) if isinstance(of, tuple) else of for key, of in zip(CHOICES, values, strict=True)}
        # Neither of two settings that PEFT does not let be together.
        if not (isinstance(chosen["target_modules"], str) and chosen["layers_to_transform"] is not None):
            found.append(chosen)
    return found


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 9))])
def test_a_module_is_left_out_where_peft_leaves_it_out(part: int) -> None:
    left = 0
    for chosen in choices()[part::9]:
        for name in NAMES:
            theirs = bool(check_target_module_exists(SimpleNamespace(**chosen, target_parameters=None), name))
            assert (not targets.left_out(name, chosen)) == theirs, (name, chosen)
            left += theirs
    assert left > 500


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_modules": ["v_proj"]}, "target_modules do not cover"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules leave out"),
        ({"exclude_modules": r".*layers\.0\..*"}, "exclude_modules leave out"),
        ({"modules_to_save": ["self_attn"]}, "modules_to_save hold"),
        ({"layers_to_transform": 1}, "layers_to_transform leave out"),
        ({"layers_to_transform": [1, 2], "layers_pattern": "layers"}, "layers_to_transform leave out"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_to_transform leave out"),
    ],
    ids=str,
)
def test_the_setting_is_named(settings: dict[str, Any], told: str) -> None:
    name = layer(0, "self_attn.q_proj")
    (problem,) = claim_peft(refs_of(shapes(name)), **settings).problems
    assert problem == f"adapter_config.json's {told} {name}, for which the adapter has tensors; PEFT would ignore them"


def test_of_many_targets_peft_makes_shorter_ones() -> None:
    """By its full name a module is a target in any layer, but PEFT may have left no full name in a long list."""
    name = "model.layers.3.q_proj"
    for count, told in ((MIN_TARGET_MODULES_FOR_OPTIMIZATION - 1, ""), (MIN_TARGET_MODULES_FOR_OPTIMIZATION, "layers")):
        named = [name, *(f"model.layers.{number}.v_proj" for number in range(count - 1))]
        assert targets.left_out(name, {"target_modules": named, "layers_to_transform": [0]}).startswith(told)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"exclude_modules": {"q": 1}}, "exclude_modules must be a string or a list of strings"),
        ({"exclude_modules": ["q", 1]}, "exclude_modules must be a string or a list of strings"),
        ({"exclude_modules": "(q"}, "exclude_modules is not a regular expression"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of strings"),
        ({"modules_to_save": ["(head"]}, "modules_to_save: '(head' is not a regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a whole number or a list of them, found '1'"),
        ({"layers_to_transform": [1, True]}, "layers_to_transform must be a whole number"),
        ({"layers_to_transform": 1.0}, "layers_to_transform must be a whole number"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform have no meaning where"),
        ({"layers_pattern": {"a": 1}}, "layers_pattern must be a string or a list of strings"),
        ({"layers_pattern": ["layers", "h["]}, "layers_pattern: 'h[' is not a regular expression"),
        ({"layers_pattern": "(?P<idx>h)"}, "layers_pattern: '(?P<idx>h)' is not a regular expression"),
    ],
    ids=str,
)
def test_wrong_settings_are_told(settings: dict[str, Any], told: str) -> None:
    claims = claim_peft(refs_of(shapes(layer(0, "self_attn.q_proj"))), **settings)
    assert claims.refused and claims.updates == []
    assert any(problem.startswith(f"adapter_config.json: {told}") for problem in claims.problems), claims.problems


@pytest.mark.parametrize("key", ["exclude_modules", "layers_pattern", "modules_to_save"])
def test_a_pattern_that_takes_for_ever_is_refused(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardmerge.system import bounded_regex

    monkeypatch.setattr(bounded_regex, "SECONDS", 0.5)
    slow = "(a+)+x"
    settings = {key: slow if key == "exclude_modules" else [slow], "layers_to_transform": [0]}
    name = "a" * 60 + ".q_proj"
    with pytest.raises(bounded_regex.SlowPatternError), bounded_regex.bounded():
        claim_peft(refs_of(shapes_of(name)), target_modules=["q_proj"], **settings)


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {f"base_model.model.{name}.lora_A.weight": (4, 8), f"base_model.model.{name}.lora_B.weight": (8, 4)}


# --- every method -----------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """A network whose modules are in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net()])


def case_of(kind: str, folder: Path) -> tuple[Case, str]:
    """An adapter on two modules or one, and the name of one of them."""
    names = {"TRAINABLE_TOKENS": ["embed"], "LN_TUNING": ["norm"]}.get(kind, ["wide", "square"])
    config = KINDS[kind](target_modules=names, **SETTINGS.get(kind, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_case(folder, config, make=Stack), f"layers.0.{names[0]}"


def adapted(case: Case, config: dict[str, Any]) -> set[str]:
    """The modules that have an adapter once PEFT has loaded it with a config."""
    (case.adapter / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(case.net), case.adapter).base_model.model
        except ValueError as error:
            assert re.search(
                "excluded|not found in the base model|No layers? types compatible|No layer types compatible", str(error)
            ), error
            return set()
    return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_the_selectors_that_its_config_has(kind: str) -> None:
    fields = KINDS[kind].__dataclass_fields__
    assert METHODS[kind].selectors == {key for key in targets.SELECTORS if key in fields}


@of_every_method()
def test_every_method_refuses_tensors_that_its_settings_leave_out(tmp_path: Path, kind: str) -> None:
    case, name = case_of(kind, tmp_path)
    saved = json.loads((case.adapter / "adapter_config.json").read_text())
    assert name in adapted(case, saved)
    of_layers = {"layers_to_transform": [3], "layers_pattern": "layers"}
    for key, changes in (("exclude_modules", {"exclude_modules": [name]}), ("layers_to_transform", of_layers)):
        told = refusal(case, **{**saved, **changes})
        if key in METHODS[kind].selectors:
            assert f"{key} leave out {name}, for which the adapter has tensors" in told
            assert name not in adapted(case, {**saved, **changes})
        else:
            assert f"the key {key!r} is unknown" in told
            assert name in adapted(case, {**saved, **changes}), "PEFT does not read it either"
        (case.adapter / "adapter_config.json").write_text(json.dumps(saved))
