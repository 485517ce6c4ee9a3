"""AdaLoRA against PEFT: whole and pruned ranks, layers of every kind, bits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.family_oracle import (
    DTYPES,
    Case,
    Swapped,
    Tall,
    assert_equals_peft,
    assert_no_worse_than_peft,
    assert_same_outputs,
    assert_tiles_agree,
    change_tensors,
    refusal,
    write_case,
)

LAYERS = ("wide", "square", "narrow", "conv2", "head")


def config(*targets: str, **settings: Any) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(target_modules=list(targets), **{"init_r": 6, "lora_alpha": 11, "total_step": 9, **settings})


def write(folder: Path, *targets: str, pruned: dict[str, int] | None = None, **options: Any) -> Case:
    """An adapter; ``pruned`` are ranks that are left of modules. It is saved as PEFT saves it, then loaded by it."""
    settings = {key: options.pop(key) for key in ("lora_alpha", "bias", "modules_to_save") if key in options}
    case = write_case(folder, config(*targets, **settings), **options)
    if pruned:
        pattern = {f"{name}.lora_E": [index < rank for index in range(6)] for name, rank in pruned.items()}
        file = case.adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": pattern}))

        def prune(tensors: dict[str, Tensor]) -> None:
            for name, rank in pruned.items():
                for role in "AE":
                    key = f"base_model.model.{name}.lora_{role}"
                    tensors[key] = tensors[key][:rank].clone()
                key = f"base_model.model.{name}.lora_B"
                tensors[key] = tensors[key][:, :rank].clone()

        change_tensors(case, prune)
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pruned", [{}, {"wide": 2, "square": 0, "conv2": 5, "narrow": 6}])
def test_bits_are_pefts(tmp_path: Path, dtype: str, pruned: dict[str, int]) -> None:
    case = write(tmp_path, *LAYERS, pruned=pruned, dtype=dtype)
    if pruned and dtype != "float32":
        # PEFT makes pruned factors anew in the base's dtype, so it rounds them, and all that it computes of them.
        assert_no_worse_than_peft(case, tmp_path / "out")
        return
    ours = assert_equals_peft(case, tmp_path / "out")
    assert torch.equal(ours["square.weight"], case.net.state_dict()["square.weight"]) == (pruned.get("square") == 0)
    if dtype == "float32":
        assert_same_outputs(case, ours)


def test_what_peft_prunes_and_saves(tmp_path: Path) -> None:
    """A rank pattern as PEFT's own allocator leaves it in the config."""
    import copy

    from peft import get_peft_model

    case = write(tmp_path, "wide", "narrow")
    settings = config("wide", "narrow", target_r=2, total_step=4, tinit=0, tfinal=1)
    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(case.net), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    for step in range(1, 4):
        model(torch.arange(5).view(1, 5)).square().sum().backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    model.save_pretrained(case.adapter)
    saved = json.loads((case.adapter / "adapter_config.json").read_text())["rank_pattern"]
    assert {sum(kept) for kept in saved.values()} != {6}, "nothing was pruned"
    shapes = {tensor.shape[0] for tensor in load_file(case.adapter / "adapter_model.safetensors").values()}
    assert shapes
    assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))


@pytest.mark.parametrize("alpha", [0, -3])
def test_alpha_below_zero_is_the_rank(tmp_path: Path, alpha: int) -> None:
    case = write(tmp_path, "wide", "narrow", lora_alpha=alpha, pruned={"wide": 3})
    assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))


@pytest.mark.parametrize(("make", "targets"), [(Tall, ("tall", "wide", "conv")), (Swapped, ("wide", "narrow"))])
def test_tiles(tmp_path: Path, make: type[nn.Module], targets: tuple[str, ...]) -> None:
    case = write(tmp_path, *targets, make=make)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


def test_biases_and_modules_to_save(tmp_path: Path) -> None:
    case = write(tmp_path, "wide", bias="lora_only", modules_to_save=["head"])
    ours = assert_equals_peft(case, tmp_path / "out")
    assert not torch.equal(ours["wide.bias"], case.net.state_dict()["wide.bias"])


def _key(role: str) -> str:
    return f"base_model.model.wide.lora_{role}"


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        (_key("E"), None, ["is there without", _key("E")]),
        (_key("A"), (5, 24), [_key("A"), "[5, 24]", "r = 6, init_r of wide"]),
        (_key("A"), (6, 25), ["lora_A is [6, 25]; expected [6, 24]"]),
        (_key("B"), (55, 6), ["lora_B is [55, 6]; expected [56, 6]"]),
        (_key("B"), (6,), [_key("B"), "[6]"]),
        (_key("E"), (6,), [_key("E"), "[6]", "(r, 1)"]),
        (_key("E"), (0, 1), [_key("E"), "is empty"]),
        (_key("F"), (6, 1), [_key("F"), "belongs to no update"]),
    ],
)
def test_refused_tensors(tmp_path: Path, name: str, shape: tuple[int, ...] | None, parts: list[str]) -> None:
    case = write(tmp_path, "wide")

    def change(tensors: dict[str, Tensor]) -> None:
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.ones(shape)

    change_tensors(case, change)
    text = refusal(case)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"init_r": None}, "init_r must be a whole number above zero"),
        ({"init_r": 5}, "r = 5, init_r of wide"),
        ({"lora_alpha": [1]}, "lora_alpha must be a finite number"),
        ({"rank_pattern": [1]}, "rank_pattern must map names"),
        ({"rank_pattern": {"wide.lora_E": 3}}, "must be a list of true and false"),
        ({"rank_pattern": {"wide.lora_E": [True, 1]}}, "must be a list of true and false"),
        ({"rank_pattern": {"wide.lora_E": [True] * 5}}, "has 5 ranks of wide, but init_r is 6"),
        ({"rank_pattern": {"wide.lora_E": [True] * 5 + [False]}}, "r = 5, what rank_pattern keeps of wide"),
        ({"use_dora": True}, "AdaLoRA has no DoRA"),
        ({"target_parameters": ["wide.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
    ],
)
def test_refused_settings(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(write(tmp_path, "wide"), **changes)
