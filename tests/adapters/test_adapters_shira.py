"""SHiRA against PEFT: bits, places as floats, and what is refused."""

from __future__ import annotations

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
    Tall,
    assert_equals_peft,
    assert_same_outputs,
    assert_tiles_agree,
    change_tensors,
    merged_by_us,
    refusal,
    write_case,
)


def config(*targets: str, **settings: Any) -> Any:
    from peft import ShiraConfig

    return ShiraConfig(target_modules=list(targets), **{"r": 3, "random_seed": 4, **settings})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 9])
def test_bits_are_pefts(tmp_path: Path, dtype: str, rank: int) -> None:
    case = write_case(tmp_path, config(*LINEARS, r=rank, modules_to_save=["norm"]), dtype=dtype)
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


def test_tiles(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("tall", "wide"), make=Tall)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


PLACES, NUMBERS = "base_model.model.wide.shira_indices", "base_model.model.wide.shira_weight"


def _change(name: str, tensor: Tensor | None) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_places_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    case = write_case(tmp_path, config("wide"))
    places = load_file(case.adapter / "adapter_model.safetensors")[PLACES]
    assert places.dtype == torch.int32
    change_tensors(case, _change(PLACES, places.to(dtype)))
    assert_equals_peft(case, tmp_path / "out")


def test_a_place_may_be_there_twice(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide"))
    places = load_file(case.adapter / "adapter_model.safetensors")[PLACES]
    places[:, 1] = places[:, 0]
    change_tensors(case, _change(PLACES, places))
    assert_same_outputs(case, merged_by_us(case, tmp_path / "out"))


@pytest.mark.parametrize(("row", "value", "text"), [(0, 56, "56; .* to 55"), (1, 24, "24; .* to 23"), (0, -1, "-1 to")])
def test_a_place_beyond_the_matrix_stops_the_merge(tmp_path: Path, row: int, value: int, text: str) -> None:
    case = write_case(tmp_path, config("wide"))
    places = load_file(case.adapter / "adapter_model.safetensors")[PLACES]
    places[row, 5] = value
    change_tensors(case, _change(PLACES, places))
    with pytest.raises(shardmerge.FormatError, match=text):
        merged_by_us(case, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "tensor", "parts"),
    [
        (PLACES, None, [f"{NUMBERS} is there without {PLACES}"]),
        (NUMBERS, None, [f"{PLACES} is there without {NUMBERS}"]),
        (NUMBERS, torch.ones(239), [f"{NUMBERS} is [239]; expected [240]", "r = 3"]),
        (PLACES, torch.ones(240, 2, dtype=torch.int32), [f"{PLACES} is [240, 2]; expected [2, 240]"]),
        (NUMBERS, torch.ones(240, dtype=torch.int32), [f"{NUMBERS} is stored as I32"]),
        ("base_model.model.wide.shira_mask", torch.ones(240), ["shira_mask belongs to no update"]),
    ],
)
def test_refused_tensors(tmp_path: Path, name: str, tensor: Tensor | None, parts: list[str]) -> None:
    case = write_case(tmp_path, config("wide"))
    change_tensors(case, _change(name, tensor))
    text = refusal(case)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"r": 2}, "r = 2"), ({"r": "3"}, "r must be a whole number"), ({"mask_kind": "x"}, "'mask_kind' is unknown")],
)
def test_refused_settings(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(write_case(tmp_path, config("wide")), **changes)
