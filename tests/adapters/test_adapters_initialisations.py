"""What each initialisation does to the base when PEFT loads the adapter, and what is said of those that move it."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from tests.support.family_oracle import Case, Net, assert_same_outputs, refusal, unmerged, write_case
from tests.support.peft_kinds import KINDS, SETTINGS, of_every_method
from tests.support.peft_oracle import assert_same_bits, make_config, merge_to, stored

TARGETS = ["wide", "square"]
#: How PEFT loads: into weights of its own, or into empty ones (``low_cpu_mem_usage``).
LOADS = (False, True)
#: Value → what loading does to the base: nothing, "moves" it, or PEFT "fails"; into empty weights it fails wherever it
#: would move it.
PLAIN = (True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica", "MiCA")
MOVE = ("pissa", "pissa_niter_4", "olora", "OLoRA", "loftq")
#: corda needs what its preprocessing leaves in the model. lora_ga has moved the base in training and does not when
#: loading, so that even PEFT's own merge is not what was trained.
OTHERS = {"corda": "fails", "lora_ga": "keeps"}
UNKNOWN = ("xavier", "PiSSA", "EVA", "LoftQ", "true", 1)


@pytest.fixture(autouse=True)
def loftq_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ needs a GPU and packages that are not here; one that rounds to fifteen steps stands in."""

    def loftq(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        step = weight.abs().max() / 7
        rounded = (weight / step).round() * step
        u, s, v = torch.linalg.svd(weight - rounded, full_matrices=False)
        root = s[:reduced_rank].sqrt()
        return rounded, root[:, None] * v[:reduced_rank], u[:, :reduced_rank] * root

    found = importlib.util.find_spec
    monkeypatch.setattr(layer, "loftq_init", loftq)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: object() if name == "scipy" else found(name, *of)
    )


def case_of(folder: Path, value: object) -> Case:
    """A trained adapter whose config says that it began so."""
    case = write_case(folder, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    file = case.adapter / "adapter_config.json"
    settings = {
        "init_lora_weights": value,
        **({"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if value == "loftq" else {}),
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return case


def effect(case: Case, *, empty: bool) -> str:
    """What loading does to the base's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(case.net), case.adapter, low_cpu_mem_usage=empty)
        except (ValueError, RuntimeError, AttributeError):
            return "fails"
    after, before = model.unload().state_dict(), case.net.state_dict()
    return "keeps" if all(torch.equal(after[name], before[name]) for name in before) else "moves"


@pytest.mark.parametrize("value", PLAIN, ids=str)
def test_plain_initialisations_keep_the_base_and_are_merged(tmp_path: Path, value: object) -> None:
    case = case_of(tmp_path, value)
    assert [effect(case, empty=empty) for empty in LOADS] == ["keeps", "keeps"]
    merge_to(tmp_path / "out", case.base, case.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_bits(stored(tmp_path / "out"), unmerged(case).merge_and_unload().state_dict())


@pytest.mark.parametrize("value", [*MOVE, *OTHERS], ids=str)
def test_initialisations_that_move_the_base_are_refused_by_name(tmp_path: Path, value: str) -> None:
    case = case_of(tmp_path, value)
    assert effect(case, empty=False) == OTHERS.get(value, "moves")
    assert effect(case, empty=True) == OTHERS.get(value, "fails")
    told = refusal(case)
    assert f"init_lora_weights: {value!r}" in told and "ignore_keys" in told and "unknown" not in told
    assert ("No conversion undoes that" in told) == (value == "loftq")
    assert ("path_initial_model_for_weight_conversion" in told) == (value != "loftq")


@pytest.mark.parametrize("value", UNKNOWN, ids=str)
def test_unknown_initialisations_are_said_to_be_unknown(tmp_path: Path, value: object) -> None:
    case = case_of(tmp_path, value)
    assert [effect(case, empty=empty) for empty in LOADS] == ["fails", "fails"]
    told = refusal(case)
    assert f"init_lora_weights: {value!r} is an initialisation that is unknown" in told
    assert "out of the base's weights" not in told


@pytest.mark.parametrize("value", ["pissa", "olora", "loftq"])
def test_the_advice_to_merge_onto_the_base_of_the_training_is_right(tmp_path: Path, value: str) -> None:
    """The base that training had is what PEFT leaves when it loads the adapter and unloads it."""
    case = case_of(tmp_path, value)
    moved = tmp_path / "moved"
    moved.mkdir()
    save_file(
        {name: tensor.clone() for name, tensor in unmerged(case).unload().state_dict().items()},
        moved / "model.safetensors",
    )
    (moved / "config.json").write_text("{}")
    entry = {"path": str(case.adapter), "ignore_keys": ["init_lora_weights"]}
    merge_to(tmp_path / "out", moved, entry)
    assert_same_outputs(case, stored(tmp_path / "out"))
    merge_to(tmp_path / "wrong", case.base, entry)
    with pytest.raises(AssertionError):
        assert_same_outputs(case, stored(tmp_path / "wrong"))


@pytest.mark.parametrize("value", ["pissa", "olora", "lora_ga"])
def test_the_advice_to_convert_is_right(tmp_path: Path, value: str) -> None:
    """What PEFT converts where it was trained merges onto the base as it is."""
    net = Net().eval()
    settings = {"lora_ga_config": LoraGAConfig()} if value == "lora_ga" else {}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=value, **settings)
    base = copy.deepcopy(net)
    if value == "lora_ga":
        for name in TARGETS:
            module: Any = base.get_submodule(name)
            module._peft_loraga_grad = torch.randn_like(module.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = value
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        wanted = model.eval()(torch.arange(14).view(2, 7))
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    merge_to(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    net.load_state_dict(stored(tmp_path / "out"))
    with torch.inference_mode():
        assert (net(torch.arange(14).view(2, 7)) - wanted).abs().max() < 1e-4 * wanted.abs().max()


# --- other methods ----------------------------------------------------------------------------------------------------

#: Values that PEFT's other methods take besides true and false.
VALUES: dict[str, tuple[Any, ...]] = {
    "ADALORA": ("gaussian", "pissa", "olora", "xavier"),
    "C3A": ("gaussian", "kaiming_uniform", "xavier_uniform"),
    "HIRA": ("gaussian",),
    "LOKR": ("lycoris",),
    "MISS": ("bat", "mini"),
}


@of_every_method("LORA", "LN_TUNING", "OSF")
def test_no_other_method_moves_the_base_by_its_initialisation(tmp_path: Path, kind: str) -> None:
    """OSF is not here, whose base is a decomposition whatever its initialisation; LN tuning has none."""
    fields = KINDS[kind].__dataclass_fields__
    key = next((key for key in fields if key.startswith("init_") and key.endswith("weights")), None)
    if key is None:
        assert kind == "VBLORA"
        return
    targets = ["embed"] if kind == "TRAINABLE_TOKENS" else TARGETS
    for value in (True, False, *VALUES.get(kind, ())):
        settings = {"mini_r": 2} if value == "mini" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = KINDS[kind](target_modules=targets, **{**SETTINGS.get(kind, {}), key: value, **settings})
            net = Net().eval()
            before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            after = get_peft_model(net, config).unload().state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before), value


def test_adalora_takes_no_notice_of_it(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=4, total_step=10, target_modules=TARGETS, init_lora_weights="olora")
    case = write_case(tmp_path, config)
    assert effect(case, empty=False) == "keeps"
    shardmerge.plan(make_config(tmp_path / "out", case.base, [case.adapter]))
