"""The scale of adapters without adapter_config.json, by where it is said. The oracle is the formula in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.reporting.inspection import inspect_path
from tests.support.builders import random_tensor
from tests.support.peft_oracle import make_config, stored

SHAPES = {"blocks.0.attn.to_q": (24, 20), "blocks.1.mlp.0": (36, 24)}
RANK = 4
#: How a pair's keys are written: the module, the ends of A's and B's keys, and whether they are transposed.
STYLES = {
    "diffusers": ("transformer.{}", "lora_A.weight", "lora_B.weight", False),
    "comfy": ("diffusion_model.{}", "lora_A.weight", "lora_B.weight", False),
    "bare": ("{}", "lora_A.weight", "lora_B.weight", False),
    "named": ("{}", "lora_A.default.weight", "lora_B.default.weight", False),
    "peft": ("base_model.model.{}", "lora_A.weight", "lora_B.weight", False),
    "kohya": ("lora_unet_{}", "lora_down.weight", "lora_up.weight", False),
    "dotted": ("diffusion_model.{}", "lora_down.weight", "lora_up.weight", False),
    "old diffusers": ("unet.{}", "lora.down.weight", "lora.up.weight", False),
    "pure-pytorch": ("{}", "A", "B", True),
}
#: Where nothing says the scale: those that are asked about.
ASKED = ("bare", "named", "peft", "pure-pytorch")


def base_tensors() -> dict[str, Tensor]:
    return {f"{name}.weight": random_tensor(shape, 5 + n) for n, (name, shape) in enumerate(SHAPES.items())}


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (random_tensor((RANK, shape[1]), 40 + n, std=0.5), random_tensor((shape[0], RANK), 60 + n, std=0.5))
        for n, (name, shape) in enumerate(SHAPES.items())
    }


def named(style: str, module: str) -> str:
    name = STYLES[style][0]
    return name.format(module.replace(".", "_") if name.startswith("lora_unet_") else module)


def adapter_tensors(style: str, alphas: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    _, end_a, end_b, turned = STYLES[style]
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in pairs().items():
        key = named(style, module)
        tensors[f"{key}.{end_a}"], tensors[f"{key}.{end_b}"] = (
            (a.T.contiguous(), b.T.contiguous()) if turned else (a, b)
        )
        if alphas and module in alphas:
            tensors[f"{key}.alpha"] = torch.tensor(alphas[module])
    return tensors


class Place:
    """A base, and an adapter in one file."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.base = folder / "base.safetensors"
        self.adapter = folder / "lora" / "lora.safetensors"
        self.adapter.parent.mkdir()
        save_file(base_tensors(), self.base)
        save_file(dict(tensors), self.adapter, metadata=dict(metadata or {}))

    def config(self, **entry: Any) -> dict[str, Any]:
        return make_config(self.folder / "out", self.base, [{"path": str(self.adapter), **entry}])

    def refusal(self, **entry: Any) -> str:
        with pytest.raises(PlanError) as caught:
            shardmerge.plan(self.config(**entry))
        return str(caught.value)

    def scalings(self, **entry: Any) -> dict[str, float]:
        plan = shardmerge.plan(self.config(**entry))
        return {update.target.removesuffix(".weight"): update.scaling for _, update in plan.updates()}

    def assert_merged(self, scalings: Mapping[str, float], **entry: Any) -> shardmerge.MergeReport:
        """The formula's weights, and a proof of them by other code."""
        report = shardmerge.merge(self.config(**entry))
        ours, base = stored(self.folder / "out"), base_tensors()
        for module, (a, b) in pairs().items():
            name = f"{module}.weight"
            change = scalings[module] * (b.double() @ a.double())
            error = (ours[name].double() - base[name].double() - change).norm()
            assert error <= 1e-6 * change.norm(), module
        assert shardmerge.verify(self.folder / "out", rows=None).raise_for_status().complete
        return report


both = dict.fromkeys(SHAPES, 6.0)


# --- our config, then tensors, then metadata, then the convention -----------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("entry", "scaling"), [({"alpha": 3}, 0.75), ({"scaling": 0.3}, 0.3), ({}, 1.5)], ids=["alpha", "scaling", "none"]
)
def test_our_config_comes_before_tensors(tmp_path: Path, style: str, entry: dict[str, float], scaling: float) -> None:
    place = Place(tmp_path, adapter_tensors(style, both), {"alpha": "100", "ss_network_alpha": "7"})
    place.assert_merged(dict.fromkeys(SHAPES, scaling), **entry)


@pytest.mark.parametrize(
    "style",
    [pytest.param(style, marks=[pytest.mark.slow] * (style not in ("diffusers", "peft", "kohya"))) for style in STYLES],
)
@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_alpha": "6", "ss_network_dim": "4"},
        {"alpha": "6.0", "rank": "4"},
        {"lora_alpha": "6"},
        {"network_alpha": "6", "network_dim": "4", "alpha": "6.0"},
        {"ss_network_alpha": "6", "ss_network_args": '{"rs_lora": "False", "conv_alpha": null}'},
    ],
    ids=["kohya", "alpha", "lora_alpha", "two that agree", "arguments that say nothing"],
)
def test_numbers_in_the_metadata(tmp_path: Path, style: str, metadata: dict[str, str]) -> None:
    place = Place(tmp_path, adapter_tensors(style), metadata)
    assert place.scalings() == dict.fromkeys(SHAPES, 1.5)
    place.assert_merged(dict.fromkeys(SHAPES, 1.5))


@pytest.mark.parametrize("style", STYLES)
def test_nothing_says_it(tmp_path: Path, style: str) -> None:
    place = Place(tmp_path, adapter_tensors(style), {"format": "pt"})
    if style in ASKED:
        assert "its scale is unknown: give alpha (or scaling)" in place.refusal()
        return
    report = place.assert_merged(dict.fromkeys(SHAPES, 1.0))
    (note,) = [warning for warning in report.warnings if "alpha" in warning]
    assert "the alpha of 2 of its modules, so their scale is 1" in note


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_a_module_without_its_own(tmp_path: Path, style: str) -> None:
    first, second = SHAPES
    place = Place(tmp_path, adapter_tensors(style, {first: 6.0}))
    assert place.scalings() == {first: 1.5, second: 1.0}
    save_file(adapter_tensors(style, {first: 6.0}), place.adapter, metadata={"ss_network_alpha": "2"})
    assert place.scalings() == {first: 1.5, second: 0.5}


def test_a_model_that_calls_itself_transformer_is_not_diffusers(tmp_path: Path) -> None:
    place = Place(tmp_path, adapter_tensors("diffusers"))
    save_file({f"transformer.{name}": tensor for name, tensor in base_tensors().items()}, place.base)
    assert "its scale is unknown" in place.refusal()
    assert set(place.scalings(alpha=2)) == {f"transformer.{module}" for module in SHAPES}


@pytest.mark.parametrize("style", ["diffusers", "kohya", "pure-pytorch"])
@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"alpha": "8", "ss_network_alpha": "4"}, ["contradict each other", "alpha '8'"]),
        ({"alpha": "8", "rank": "4", "ss_network_dim": "8"}, ["contradict each other"]),
        ({"alpha": "8", "rank": "16"}, ["says alpha 8 of rank 16, but it has factors of rank 4"]),
        ({"ss_network_alpha": "Dynamic"}, ["ss_network_alpha 'Dynamic'; expected a number"]),
        ({"ss_network_alpha": "None", "ss_network_dim": "4"}, ["ss_network_alpha 'None'"]),
        ({"alpha": "nan"}, ["alpha 'nan'; expected a number"]),
        ({"alpha": "1e999"}, ["expected a number"]),
        ({"alpha": "0"}, ["expected a number other than 0"]),
        ({"lora_scale": "0.5"}, ["lora_scale '0.5', and not what that scales"]),
        ({"alpha": "8", "use_rslora": "true"}, ["says use_rslora"]),
        ({"ss_network_alpha": "8", "ss_network_args": '{"conv_alpha": "1"}'}, ["says conv_alpha"]),
        ({"alpha": "8" * 10_000}, ["expected a number"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value)[:60],
)
def test_what_cannot_be_trusted_is_asked_about(
    tmp_path: Path, style: str, metadata: dict[str, str], parts: list[str]
) -> None:
    place = Place(tmp_path, adapter_tensors(style), metadata)
    refusal = place.refusal()
    assert all(part in refusal for part in [*parts, "give alpha (or scaling)"]), refusal
    assert place.scalings(alpha=6) == dict.fromkeys(SHAPES, 1.5)  # and the advice helps


def test_a_file_with_the_tensors_does_not_ask_its_metadata(tmp_path: Path) -> None:
    """kohya writes one α for all layers into the metadata, and another for convolutions beside them."""
    place = Place(tmp_path, adapter_tensors("kohya", both), {"ss_network_alpha": "Dynamic", "ss_network_dim": "8"})
    assert place.scalings() == dict.fromkeys(SHAPES, 1.5)


@pytest.mark.parametrize("style", STYLES)
def test_an_alpha_without_factors(tmp_path: Path, style: str) -> None:
    tensors = {**adapter_tensors(style, both), f"{named(style, 'blocks.7.x')}.alpha": torch.tensor(3.0)}
    assert f"{named(style, 'blocks.7.x')}.alpha is there without" in Place(tmp_path, tensors).refusal()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(0.0)], ids=["two", "zero"])
def test_an_alpha_that_is_no_alpha(tmp_path: Path, style: str, value: Tensor) -> None:
    tensors = adapter_tensors(style, both)
    tensors = {name: value.clone() if name.endswith(".alpha") else tensor for name, tensor in tensors.items()}
    place = Place(tmp_path, tensors)
    assert ("expected one number" if len(value.shape) else "holds 0") in place.refusal()
    assert place.scalings(scaling=2) == dict.fromkeys(SHAPES, 2.0)


# --- diffusers' config in the header ----------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["to_q", "mlp.0"]}


def header(config: Mapping[str, Any], part: str = "transformer.") -> dict[str, str]:
    return {"format": "pt", "lora_adapter_metadata": json.dumps({part + key: value for key, value in config.items()})}


@pytest.mark.parametrize("part", ["transformer.", ""], ids=["pipeline", "model"])
@pytest.mark.parametrize("style", ["diffusers", "bare"])
def test_the_config_of_a_part(tmp_path: Path, part: str, style: str) -> None:
    if part and style == "bare":
        assert (
            "does not speak of a model without a name"
            in Place(tmp_path, adapter_tensors(style), header(CONFIG, part)).refusal()
        )
        return
    Place(tmp_path, adapter_tensors(style), header(CONFIG, part)).assert_merged(dict.fromkeys(SHAPES, 1.5))


def test_patterns_speak_of_modules_without_the_part(tmp_path: Path) -> None:
    first, second = SHAPES
    config = {**CONFIG, "alpha_pattern": {f"^{first}": 8, "transformer.blocks.1.mlp.0": 5}, "rank_pattern": {}}
    place = Place(tmp_path, adapter_tensors("diffusers"), header(config))
    place.assert_merged({first: 2.0, second: 1.5})


def test_rslora_is_obeyed(tmp_path: Path) -> None:
    place = Place(tmp_path, adapter_tensors("diffusers"), header({**CONFIG, "use_rslora": True}))
    assert "give scaling rather than alpha" in place.refusal(alpha=6)
    assert place.scalings(scaling=0.3) == dict.fromkeys(SHAPES, 0.3)
    place.assert_merged(dict.fromkeys(SHAPES, 6 / math.sqrt(RANK)))


def test_our_config_comes_before_the_header_s(tmp_path: Path) -> None:
    place = Place(tmp_path, adapter_tensors("diffusers"), header({**CONFIG, "alpha_pattern": {"to_q": 9}}))
    place.assert_merged(dict.fromkeys(SHAPES, 0.5), alpha=2)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({**CONFIG, "r": 8}, "has rank 4, but lora_adapter_metadata says 8"),
        ({**CONFIG, "use_dora": True}, "says use_dora, but transformer"),
        ({**CONFIG, "use_qalora": True}, "QALoRA"),
        ({**CONFIG, "warp": 9}, "the key 'warp' is unknown to this version"),
        ({**CONFIG, "peft_type": "LOHA"}, "is of peft_type 'LOHA'; expected LORA"),
        ({**CONFIG, "target_modules": ["to_q"]}, "do not cover"),
        ({**CONFIG, "lora_alpha": "six"}, "lora_alpha must be a finite number"),
        ({**CONFIG, "lora_alpha": math.inf}, "lora_alpha must be a finite number"),
        ({**CONFIG, "r": 0}, "r must be a whole number above zero"),
        ({"lora_alpha": 6}, "r must be a whole number above zero"),
    ],
    ids=["rank", "DoRA", "QALoRA", "unknown", "another method", "targets", "no number", "infinite", "zero", "no rank"],
)
def test_what_the_header_s_config_says_is_obeyed_or_refused(tmp_path: Path, config: dict[str, Any], part: str) -> None:
    refusal = Place(tmp_path, adapter_tensors("diffusers"), header(config)).refusal()
    assert part in refusal and "adapter_config.json" not in refusal, refusal


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"lora_adapter_metadata": "no JSON"}, "is not an object in JSON"),
        ({"lora_adapter_metadata": "[1]"}, "is not an object in JSON"),
        ({"lora_adapter_metadata": "[" * 100_000}, "is not an object in JSON"),
        ({"lora_adapter_metadata": '{"transformer.r": 4, "transformer.r": 8}'}, "is not an object in JSON"),
        (header(CONFIG, "unet."), "does not speak of transformer."),
        ({"lora_adapter_metadata": '{"transformer.r": 4, "lora_alpha": 8}'}, "and of a model without a name"),
        ({**header(CONFIG), "alpha": "3"}, "which contradict each other"),
    ],
    ids=["text", "list", "deep", "twice", "another part", "both", "a number beside it"],
)
def test_a_header_that_cannot_be_trusted(tmp_path: Path, metadata: dict[str, str], part: str) -> None:
    place = Place(tmp_path, adapter_tensors("diffusers"), metadata)
    refusal = place.refusal()
    assert part in refusal and "give alpha" in refusal
    assert place.scalings(alpha=6) == dict.fromkeys(SHAPES, 1.5)


@pytest.mark.parametrize(("alpha", "agrees"), [(6.0, True), (4.0, False)])
def test_tensors_beside_the_header_s_config_must_agree(tmp_path: Path, alpha: float, agrees: bool) -> None:
    place = Place(tmp_path, adapter_tensors("diffusers", dict.fromkeys(SHAPES, alpha)), header(CONFIG))
    if agrees:
        place.assert_merged(dict.fromkeys(SHAPES, 1.5))
    else:
        assert "makes a scale of 1, and the lora_adapter_metadata in its header one of 1.5" in place.refusal()


@pytest.mark.parametrize("alphas", [None, both], ids=["none", "beside them"])
@pytest.mark.parametrize("style", ["kohya", "dotted", "old diffusers", "pure-pytorch"])
def test_the_header_s_config_beside_other_keys(tmp_path: Path, style: str, alphas: dict[str, float] | None) -> None:
    """Nobody writes it, so what it means for names without dots is not known."""
    place = Place(tmp_path, adapter_tensors(style, alphas), header(CONFIG, ""))
    assert "lora_adapter_metadata in its header is read beside PEFT's keys alone" in place.refusal()
    assert place.scalings(alpha=6) == dict.fromkeys(SHAPES, 1.5)


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_inspect(tmp_path: Path, style: str) -> None:
    place = Place(tmp_path, adapter_tensors(style))
    found = inspect_path(str(place.adapter))
    assert (found["kind"], found["ranks"], found["problems"]) == ("adapter", [RANK], [])
    assert found["scalings"] == (None if style in ASKED else [1.0])
    save_file(adapter_tensors(style, both), place.adapter)
    assert inspect_path(str(place.adapter))["scalings"] == [1.5]
    save_file(adapter_tensors(style), place.adapter, metadata={"alpha": "6"})
    assert inspect_path(str(place.adapter))["scalings"] == [1.5]
