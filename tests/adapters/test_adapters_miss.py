"""MiSS against PEFT: its three variants, bits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shardmerge
from tests.support.family_oracle import (
    DTYPES,
    LINEARS,
    Case,
    Tall,
    assert_equals_peft,
    assert_same_outputs,
    assert_tiles_agree,
    change_tensors,
    merged_by_peft,
    merged_by_us,
    refusal,
    write_case,
)
from tests.support.peft_oracle import assert_same_bits


def config(*targets: str, **settings: Any) -> Any:
    from peft import MissConfig

    return MissConfig(target_modules=list(targets), **{"r": 8, **settings})


WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (LINEARS, {}),
    "rest": (LINEARS, {"r": 7}),
    "random": (LINEARS, {"r": 5, "init_weights": False}),
    "mini": (("wide", "square", "narrow"), {"init_weights": "mini", "mini_r": 4}),
    "mini-rest": (("wide", "square", "narrow"), {"init_weights": "mini", "mini_r": 1, "r": 9}),
    "bat": (("wide", "square", "narrow"), {"init_weights": "bat"}),
    "bat-small": (("wide", "square", "narrow"), {"init_weights": "bat", "r": 2}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_bits_are_pefts(tmp_path: Path, way: str, dtype: str) -> None:
    targets, settings = WAYS[way]
    case = write_case(tmp_path, config(*targets, **settings), dtype=dtype)
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 25},
        {"init_weights": "mini", "mini_r": 12},
        {"init_weights": "bat", "r": 24},
        {"init_weights": "bat", "r": 3},
        {"init_weights": "bat", "r": 48},
    ],
    ids=str,
)
def test_tiles(tmp_path: Path, settings: dict[str, Any]) -> None:
    case = write_case(tmp_path, config("tall", "wide", **settings), make=Tall)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


def test_biases_and_modules_to_save(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide", bias="all", modules_to_save=["head"]), dtype="bfloat16")
    ours = assert_equals_peft(case, tmp_path / "out")
    assert not torch.equal(ours["wide.bias"], case.net.state_dict()["wide.bias"])


def test_a_weight_scales_what_is_added_and_has_no_meaning_for_what_multiplies(tmp_path: Path) -> None:
    case = write_case(tmp_path / "plain", config("wide"))
    half, full = (
        shardmerge.merge({**_job(case.base, case.adapter, weight), "output": {"path": str(tmp_path / f"{weight}")}})
        for weight in (0.5, 1.0)
    )
    from tests.support.peft_oracle import stored

    before, some, all_ = case.net.state_dict()["wide.weight"], stored(Path(half.output)), stored(Path(full.output))
    torch.testing.assert_close(some["wide.weight"] - before, (all_["wide.weight"] - before) / 2)
    case = write_case(tmp_path / "bat", config("wide", init_weights="bat"))
    with pytest.raises(shardmerge.PlanError, match="has no meaning for miss-bat"):
        shardmerge.plan({**_job(case.base, case.adapter, 0.5), "output": {"path": str(tmp_path / "never")}})


def _job(base: Path, adapter: Path, weight: float) -> dict[str, Any]:
    return {"base": str(base), "adapters": [{"path": str(adapter), "weight": weight}]}


KEY = "base_model.model.wide.miss_block"


@pytest.mark.parametrize(
    ("settings", "shape", "parts"),
    [
        ({}, (8, 55), [f"{KEY} is [8, 55]; expected [8, 56]"]),
        ({}, (7, 56), [f"{KEY} is [7, 56]; expected [8, 56]"]),
        ({}, (56,), [f"{KEY} is [56]"]),
        ({"init_weights": "mini", "mini_r": 4}, (8, 56), [f"{KEY} is [8, 56]; expected [8, 4]"]),
        ({"init_weights": "bat"}, (8, 8, 8), [f"{KEY} is [8, 8, 8]; expected [7, 8, 8]"]),
    ],
)
def test_refused_tensors(tmp_path: Path, settings: dict[str, Any], shape: tuple[int, ...], parts: list[str]) -> None:
    case = write_case(tmp_path, config("wide", **settings))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[KEY] = torch.ones(shape)

    change_tensors(case, change)
    text = refusal(case)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"r": 25}, "r is 25 and mini_r 0, which do not fit wide [56, 24]"),
        ({"init_weights": "mini", "mini_r": 5}, "mini_r 5, which do not fit"),
        ({"init_weights": "bat", "r": 9}, "blocks of r = 9 do not divide"),
        ({"init_weights": "olora"}, "init_weights must be true, false, 'bat' or 'mini'"),
        ({"init_weights": ["bat"]}, "init_weights must be"),
        ({"init_weights": 1}, "init_weights must be"),
        ({"mini_r": -1}, "mini_r must be a whole number above zero"),
    ],
)
def test_refused_settings(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(write_case(tmp_path, config("wide")), **changes)


def test_a_tensor_of_no_update_is_refused(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide"))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.wide.miss_blocks"] = torch.ones(2)

    change_tensors(case, change)
    assert "miss_blocks belongs to no update" in refusal(case)


# --- Bone, as it was called before ------------------------------------------------------------------------------------


def as_bone(case: Case) -> None:
    """What PEFT's script for converting one does, the other way round."""
    file = case.adapter / "adapter_config.json"
    kept = {"r", "init_weights", "target_modules", "modules_to_save", "bias", "exclude_modules", "layers_to_transform"}
    config = {key: value for key, value in json.loads(file.read_text()).items() if key in kept}
    file.write_text(json.dumps({**config, "peft_type": "BONE", "task_type": None, "layers_pattern": None}))

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("miss_block", "bone_block")] = tensors.pop(name)

    change_tensors(case, rename)


def bone(weight: Tensor, block: Tensor) -> Tensor:
    """The merge of peft/tuners/bone/layer.py of 0.14 to 0.17, in float64, number by number."""
    rows, columns = weight.shape
    if block.dim() == 2:
        return weight + torch.stack([block[column % len(block)] for column in range(columns)], dim=1)
    size = block.shape[-1]
    changed = weight.clone()
    for row in range(0, rows, size):
        for column in range(0, columns, size):
            part = weight[row : row + size, column : column + size]
            changed[row : row + size, column : column + size] += part @ block[row // size] + block[row // size]
    return changed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["plain", "rest", "random", "bat"])
def test_bone(tmp_path: Path, way: str, dtype: str) -> None:
    """The bits are those of the adapter that PEFT converts it to; and what the old class computed."""
    targets, settings = WAYS[way]
    case = write_case(tmp_path, config(*targets, **settings), dtype=dtype)
    converted = dict(merged_by_peft(case))
    as_bone(case)
    ours = merged_by_us(case, tmp_path / "out")
    assert_same_bits(ours, converted)
    blocks = load_file(case.adapter / "adapter_model.safetensors")
    for module in targets:
        before = case.net.get_parameter(f"{module}.weight").double()
        exact = bone(before, blocks[f"base_model.model.{module}.bone_block"].double())
        found = ours[f"{module}.weight"].double()
        assert (found - exact).norm() <= (exact - before).norm() * (1e-6 if dtype == "float32" else 0.02)


def test_bone_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide"))
    as_bone(case)
    assert "bone_block is [8, 56]; expected [7, 56]" in refusal(case, r=7)
    assert "init_weights must be true, false or 'bat'" in refusal(case, r=8, init_weights="mini")
    assert "mini_r" in refusal(case, init_weights=True, mini_r=4), "Bone had no such setting"
