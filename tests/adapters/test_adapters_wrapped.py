"""Adapters whose keys carry what stood around the model in training: the same bytes as without.

The oracle is PEFT's own merge of the adapter as PEFT wrote it; the keys are then written as the wrappers leave them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shardmerge
from shardmerge import PlanError
from tests.support import text_zoo, zoo
from tests.support.conformance import FAMILIES, Row, merged, row
from tests.support.family_oracle import Case, Net, change_tensors, merged_by_peft, write_case
from tests.support.peft_oracle import _new_folder as new_folder
from tests.support.peft_oracle import assert_same_bits, make_config, merge_to, stored
from tests.support.zoo import lora

PEFT = "base_model.model."
Rename = Callable[[str], str]


def before(text: str) -> Rename:
    return lambda key: text + key


def behind(text: str) -> Rename:
    """Behind PEFT's prefix."""
    return lambda key: key.replace(PEFT, PEFT + text, 1)


def in_factor(text: str) -> Rename:
    """Behind the name of a factor of LoRA, and of a tensor that was saved whole."""

    def rename(key: str) -> str:
        for factor in ("lora_A.", "lora_B.", "modules_to_save."):
            key = key.replace(f".{factor}", f".{factor}{text}")
        return key

    return rename


WRAPPERS: Mapping[str, Rename] = {
    "compiled": before("_orig_mod."),
    "DDP": before("module."),
    "DDP of compiled": before("module._orig_mod."),
    "compiled DDP": before("_orig_mod.module."),
    "PEFT twice": before(PEFT),
    "PEFT thrice": before(PEFT * 2),
    "a model around": before("model."),
    "an engine in a model": before("model.module."),
    "FSDP": lambda key: "_fsdp_wrapped_module." + key.replace(PEFT, "base_model._fsdp_wrapped_module.model.", 1),
    "DDP inside": behind("module."),
    "FSDP inside": behind("_fsdp_wrapped_module._checkpoint_wrapped_module."),
    "both sides": lambda key: "module." + key.replace(PEFT, PEFT + "module.", 1),
    "every layer": lambda key: key.replace(".lora_", "._checkpoint_wrapped_module._fsdp_wrapped_module.lora_"),
}
FACTORS: Mapping[str, Rename] = {
    "compiled": in_factor("_orig_mod."),
    "named, compiled": in_factor("default._orig_mod."),
    "FSDP, named": in_factor("_fsdp_wrapped_module.default."),
    "DDP": in_factor("module."),
    "DDP, named": in_factor("module.default."),
    "named, DDP": in_factor("default.module."),
}


class Blocks(nn.Module):
    """A network whose names are regular, and one of whose modules is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.module = nn.Linear(37, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.module(self.net(tokens)))


LORA = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=["wide", "square", "conv2", "embed", "module"],
    modules_to_save=["narrow"],
    rank_pattern={"net.square": 3},
    alpha_pattern={"net.wide": 9},
    init_lora_weights=False,
)


@cache
def lora_case() -> tuple[Case, dict[str, Tensor]]:
    case = write_case(new_folder("wrapped"), LORA, make=Blocks)
    return case, dict(merged_by_peft(case))


def renamed(adapter: Path, rename: Rename, folder: Path) -> Path:
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = {rename(name): tensor for name, tensor in tensors.items()}
    assert len(changed) == len(tensors) and changed.keys() != tensors.keys()
    save_file(changed, file)
    return folder


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *(f"factor: {name}" for name in FACTORS)])
def test_lora_of_every_kind(tmp_path: Path, wrapper: str) -> None:
    """Linear layers, a convolution, an embedding, a module called ``module``, one that was saved whole, patterns."""
    case, expected = lora_case()
    rename = WRAPPERS.get(wrapper) or FACTORS[wrapper.removeprefix("factor: ")]
    merge_to(tmp_path / "out", case.base, renamed(case.adapter, rename, tmp_path / "adapter"))
    assert_same_bits(stored(tmp_path / "out"), expected)
    assert shardmerge.verify(tmp_path / "out", rows=None).raise_for_status().complete


QUICK = (
    *(each for each in FAMILIES if each.feature in ("IA3", "LoKr", "VeRA", "OFT")),
    row("llama", "DoRA", lora("all-linear", use_dora=True)),
    row("mixtral", "experts", lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    row("llama", "tokens", lora("q_proj", trainable_token_indices=[3, 5, 7])),
)
OTHERS = tuple(each for each in FAMILIES if each not in QUICK)


@pytest.mark.parametrize(
    "row",
    [pytest.param(each, marks=[pytest.mark.slow] * (each in OTHERS), id=str(each)) for each in (*QUICK, *OTHERS)],
)
def test_every_method(tmp_path: Path, row: Row) -> None:
    """`tests.end_to_end.test_conformance` compares what is merged without wrappers with PEFT."""
    base, adapter = zoo.base_folder(row.model, row.dtype), zoo.adapter_folder(row.model, row.adapter, row.dtype)
    for name in ("DDP of compiled", "PEFT twice", "both sides"):
        folder = renamed(adapter, WRAPPERS[name], tmp_path / name / "adapter")
        merge_to(tmp_path / name / "out", base, folder)
        assert_same_bits(stored(tmp_path / name / "out"), stored(merged(row)))


@pytest.mark.parametrize("wrapper", ["DDP of compiled", "PEFT twice", "both sides"])
def test_names_of_a_text_model_alone(tmp_path: Path, wrapper: str) -> None:
    """Whose names an adapter has is seen without what stands before them."""
    of = text_zoo.pair("Gemma3ForConditionalGeneration")
    base = text_zoo.write_around(tmp_path / "base", of, text_zoo.small(of), "disk")
    target = next(name for name in base if name.endswith("layers.0.self_attn.q_proj.weight"))
    rows, columns = base[target].shape
    a, b = torch.randn(4, columns), torch.randn(rows, 4)
    key = f"{PEFT}model.layers.0.self_attn.q_proj.lora_{{}}.weight"
    pair = {key.format("A"): a, key.format("B"): b}
    save_file({WRAPPERS[wrapper](name): tensor for name, tensor in pair.items()}, tmp_path / "lora.safetensors")
    merge_to(tmp_path / "out", tmp_path / "base", {"path": str(tmp_path / "lora.safetensors"), "scaling": 1.0})
    ours = stored(tmp_path / "out")
    assert torch.equal(ours[target], base[target] + b @ a)
    assert_same_bits({**ours, target: base[target]}, base)


def test_a_model_that_is_called_module(tmp_path: Path) -> None:
    """Of `module.x` and `x` the base has both, so the name is taken as it stands."""
    tensors = {"module.x.weight": torch.randn(24, 20), "x.weight": torch.randn(24, 20)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    a, b = torch.randn(4, 20), torch.randn(24, 4)
    (tmp_path / "adapter").mkdir()
    pair = {f"{PEFT}module.x.lora_A.weight": a, f"{PEFT}module.x.lora_B.weight": b}
    save_file(pair, tmp_path / "adapter" / "lora.safetensors")
    entry = {"path": str(tmp_path / "adapter"), "scaling": 1.0}
    merge_to(tmp_path / "out", tmp_path / "base", entry)
    ours = stored(tmp_path / "out")
    assert torch.equal(ours["x.weight"], tensors["x.weight"])
    assert torch.equal(ours["module.x.weight"], tensors["module.x.weight"] + b @ a)


def test_a_name_that_could_be_two_modules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weights = {"model.diffusion_model.x.weight": torch.ones(24, 20), "unet.x.weight": torch.ones(24, 20)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    pair = {"diffusion_model.x.lora_A.weight": torch.ones(4, 20), "diffusion_model.x.lora_B.weight": torch.ones(24, 4)}
    assert "model.diffusion_model.x" in planned(tmp_path, pair)  # by the base model's usual prefix
    pair = {name.replace("diffusion_model", "transformer"): tensor for name, tensor in pair.items()}
    problem = planned(tmp_path, pair)
    assert "transformer.x is ambiguous: it could be model.diffusion_model.x or unet.x" in problem


def planned(folder: Path, pair: Mapping[str, Tensor]) -> str:
    """The targets of the plan, or what it refuses."""
    save_file(dict(pair), folder / "lora.safetensors")
    entry = {"path": str(folder / "lora.safetensors"), "scaling": 1.0}
    try:
        plan = shardmerge.plan(make_config(folder / "out", folder / "base", [entry]))
    except PlanError as error:
        return str(error)
    return " ".join(update.target for _, update in plan.updates())


def test_two_keys_of_one_factor_are_refused(tmp_path: Path) -> None:
    case = write_case(tmp_path, peft.LoraConfig(r=4, target_modules=["wide"], init_lora_weights=False))
    change_tensors(case, lambda tensors: tensors.update(_doubled(tensors)))
    with pytest.raises(PlanError, match=r"is there without .*lora_B|both update"):
        shardmerge.plan(make_config(tmp_path / "out", case.base, [case.adapter]))


def _doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".lora_A.", ".lora_A._orig_mod."): tensor.clone() for name, tensor in tensors.items()}


def test_patterns_of_whole_names_are_not_guessed_at(tmp_path: Path) -> None:
    config: Any = peft.LoraConfig(r=4, target_modules=["wide"], alpha_pattern={"^wide": 3}, init_lora_weights=False)
    case = write_case(tmp_path, config)
    shardmerge.plan(make_config(tmp_path / "out", case.base, [case.adapter]))
    change_tensors(case, _under_module)
    with pytest.raises(PlanError, match="is of whole names, so what it matches is unknown"):
        shardmerge.plan(make_config(tmp_path / "out", case.base, [case.adapter]))


def _under_module(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def test_one_process_s_part_of_every_factor_is_named(tmp_path: Path) -> None:
    case = write_case(tmp_path, peft.LoraConfig(r=4, target_modules=["wide"], init_lora_weights=False))

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor[: len(tensor) // 2].clone() for name, tensor in tensors.items()})

    change_tensors(case, halve)
    with pytest.raises(PlanError, match=r"A has 1/2 of its rows, as where one process .* saved only its own part"):
        shardmerge.plan(make_config(tmp_path / "out", case.base, [case.adapter]))
