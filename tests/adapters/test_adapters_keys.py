"""Keys of adapter_config.json: every one that PEFT has is known, all others are told of."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, LoraRuntimeConfig

import shardmerge
from shardmerge.adapters.formats import peft_keys
from shardmerge.adapters.registry import METHODS
from tests.support.peft_kinds import KINDS, SETTINGS
from tests.support.peft_oracle import (
    Base,
    Lora,
    adapter_folder,
    assert_same_bits,
    base_folder,
    make_config,
    merge_to,
    merge_with_peft,
    oracle,
    stored,
)

BASE, LORA = Base(), Lora(targets=("q_proj",))
#: What PEFT wrote once and no longer knows, from 0.2.0 on; each says what it says by being there with its default.
FORMER: dict[str, dict[str, Any]] = {
    "LORA": {"merge_weights": False, "enable_lora": None},
    "OFT": {"rank_pattern": {}, "alpha_pattern": {}},
}
#: Sub-configs and lists as people and older versions write "not set".
UNSET: dict[str, Any] = {
    "layer_replication": [],
    "target_parameters": [],
    "trainable_token_indices": [],
    "alora_invocation_tokens": [],
    "modules_to_save": [],
    "exclude_modules": [],
    "layers_to_transform": [],
    "layers_pattern": "",
    "use_bdlora": False,
    "arrow_config": False,
    "monteclora_config": False,
    "alpha_pattern": None,
    "rank_pattern": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_peft_is_known_to_its_method(kind: str) -> None:
    assert set(KINDS[kind].__dataclass_fields__) <= METHODS[kind]._known
    assert set(FORMER.get(kind, {})) <= METHODS[kind]._known


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_by_default_has_no_unknown_key(kind: str) -> None:
    """As a file has it, with every option that is not set."""
    config = KINDS[kind](target_modules=["wide"], **SETTINGS.get(kind, {})).to_dict()
    written = json.loads(json.dumps({**config, **FORMER.get(kind, {})}, default=list))
    assert METHODS[kind]._config_problems(written) == []


@dataclass(frozen=True)
class Place:
    base: Path
    adapter: Path

    def config(self, **entry: Any) -> dict[str, Any]:
        return make_config(self.adapter.with_name("planned"), self.base, [{"path": str(self.adapter), **entry}])


def place_of(folder: Path, **changes: Any) -> Place:
    """A small Llama and a copy of an adapter whose config is changed."""
    adapter = folder / "adapter"
    shutil.copytree(adapter_folder(BASE, LORA), adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return Place(base_folder(BASE), adapter)


def refusal(place: Place, **entry: Any) -> str:
    with pytest.raises(shardmerge.PlanError) as error:
        shardmerge.plan(place.config(**entry))
    return str(error.value)


def test_whatever_says_that_nothing_is_set_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    place = place_of(tmp_path, **UNSET, **FORMER["LORA"], inference_mode=True, revision="main")
    merge_to(tmp_path / "out", place.base, place.adapter)
    # PEFT itself does not read all of them: the same adapter without them.
    assert_same_bits(stored(tmp_path / "out"), oracle(BASE, LORA))


@pytest.mark.parametrize("key", ["kasa_config", "arrow_config"])
def test_an_empty_sub_config_is_one_with_its_defaults(key: str) -> None:
    """PEFT makes the sub-config's class of an empty mapping, and that is on."""
    assert getattr(LoraConfig(**{key: {}}), key) is not None
    method = METHODS["LORA"]
    if key in method.refused:
        assert any(key in text for text in method._config_problems({"r": 4, "lora_alpha": 8, key: {}}))


def test_keys_of_other_programs_are_named_in_a_note(tmp_path: Path) -> None:
    place = place_of(
        tmp_path, fine_tune_type="lora", num_layers=16, lora_parameters={"rank": 4, "scale": 2.0}, seed=0, train=False
    )
    report = merge_to(tmp_path / "out", place.base, place.adapter)
    (note,) = [text for text in report.warnings if "fine_tune_type" in text]
    assert all(key in note for key in ("num_layers", "lora_parameters", "seed", "train"))
    assert_same_bits(stored(tmp_path / "out"), oracle(BASE, LORA))


def test_no_foreign_key_is_one_of_peft() -> None:
    assert not peft_keys.FOREIGN & {key for config in KINDS.values() for key in config.__dataclass_fields__}


@pytest.mark.parametrize("value", [True, False, 0, 1, "", "x", [], {}, [0]], ids=repr)
def test_an_unknown_key_is_refused_whatever_its_value_and_ignored_if_told_to(tmp_path: Path, value: Any) -> None:
    place = place_of(tmp_path, mystery=value)
    told = refusal(place)
    assert "the key 'mystery' is unknown" in told and "name it in the adapter's ignore_keys" in told
    assert "from the file" not in told
    merge_to(tmp_path / "out", place.base, {"path": str(place.adapter), "ignore_keys": ["mystery"]})
    assert shardmerge.verify(tmp_path / "out").raise_for_status().ok


def test_null_is_not_set_in_any_version(tmp_path: Path) -> None:
    assert LoraConfig().to_dict()["layers_to_transform"] is None
    place = place_of(tmp_path, option_of_a_later_version=None)
    shardmerge.plan(place.config())


def test_a_typing_error_in_ignore_keys_shows(tmp_path: Path) -> None:
    place = place_of(tmp_path, mystery=1)
    told = refusal(place, ignore_keys=["mistery"])
    assert "ignore_keys names 'mistery', which adapter_config.json does not have (did you mean mystery?)" in told
    assert "the key 'mystery' is unknown" in told


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "use_dora", "layer_replication", "bias"])
def test_a_key_that_is_read_cannot_be_ignored(tmp_path: Path, key: str) -> None:
    place = place_of(tmp_path, use_dora=False, layer_replication=None)
    assert f"ignore_keys names {key!r}, but this version knows" in refusal(place, ignore_keys=[key])


def test_ignore_keys_are_for_a_config_of_peft(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    (place.adapter / "adapter_config.json").unlink()
    assert "ignore_keys are of PEFT's adapter_config.json" in refusal(place, ignore_keys=["x"], alpha=8)


# --- alpha ------------------------------------------------------------------------------------------------------------


def test_an_alpha_of_zero_is_refused_and_our_config_gives_another(tmp_path: Path) -> None:
    place = place_of(tmp_path, lora_alpha=0)
    assert "Give the alpha of the training as alpha beside the adapter's path" in refusal(place)
    assert "lora_alpha in adapter_config.json is 0" in refusal(place, alpha=0)
    merge_to(tmp_path / "out", place.base, {"path": str(place.adapter), "alpha": 16})
    assert shardmerge.verify(tmp_path / "out").raise_for_status().ok
    given = place_of(tmp_path / "given", lora_alpha=16)
    theirs = merge_with_peft(given.base, given.adapter).state_dict()
    ours = stored(tmp_path / "out")
    assert_same_bits(ours, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("entry", [{"alpha": 16}, {"scaling": 2.0}], ids=str)
def test_any_other_alpha_is_the_adapters_own(tmp_path: Path, entry: dict[str, float]) -> None:
    assert "alpha and scaling must not be given" in refusal(place_of(tmp_path, lora_alpha=8), **entry)


def test_scaling_does_not_stand_for_a_missing_alpha(tmp_path: Path) -> None:
    assert "alpha and scaling must not be given" in refusal(place_of(tmp_path, lora_alpha=0), scaling=2.0)


def test_the_runtime_config_says_nothing(tmp_path: Path) -> None:
    assert "runtime_config" not in LoraConfig(runtime_config=LoraRuntimeConfig()).to_dict()
    shardmerge.plan(place_of(tmp_path, runtime_config={"ephemeral_gpu_offload": True}).config())
