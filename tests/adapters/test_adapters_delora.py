"""DeLoRA against PEFT: bits, patterns, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.family_oracle import (
    DTYPES,
    LINEARS,
    Tall,
    assert_equals_peft,
    assert_no_worse_than_peft,
    assert_same_outputs,
    assert_tiles_agree,
    change_tensors,
    refusal,
    write_case,
)


def config(*targets: str, **settings: Any) -> Any:
    from peft import DeloraConfig

    return DeloraConfig(target_modules=list(targets), **{"r": 5, "delora_lambda": 3, **settings})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings", [{}, {"r": 1}, {"rank_pattern": {"wide": 2, "^square": 7}, "lambda_pattern": {"narrow": 9}}], ids=str
)
def test_bits_are_pefts(tmp_path: Path, dtype: str, settings: dict[str, Any]) -> None:
    case = write_case(tmp_path, config(*LINEARS, bias="delora_only", **settings), dtype=dtype)
    if dtype == "float32":
        assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))
    else:
        # PEFT rounds the update and then the sum.
        assert_no_worse_than_peft(case, tmp_path / "out")


def test_tiles(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("tall", "wide"), make=Tall)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


def test_lengths_that_are_almost_nothing(tmp_path: Path) -> None:
    """A row and a column shorter than the least count as the least; a column of zeros updates nothing."""

    def prepare(name: str, tensor: Tensor) -> None:
        if "delora_A" in name:
            tensor[1] *= 1e-6
        if "delora_B" in name:
            tensor[:, 2] *= 1e-6
            tensor[:, 3] = 0

    case = write_case(tmp_path, config("wide", "narrow"), prepare=prepare)
    assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))


def test_modules_to_save(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide", modules_to_save=["head"]))
    assert_equals_peft(case, tmp_path / "out")


P = "base_model.model.wide.delora_"


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        *((f"{P}{role}", None, ["is there without", f"{P}{role}"]) for role in ("A", "B", "lambda", "w_norm")),
        (f"{P}A", (5, 25), [f"{P}A is [5, 25]; expected [5, 24]"]),
        (f"{P}B", (56, 4), [f"{P}B is [56, 4]; expected [56, 5]", "r = 5"]),
        (f"{P}lambda", (2,), [f"{P}lambda is [2]; expected [1]"]),
        (f"{P}w_norm", (56,), [f"{P}w_norm is [56]; expected [24]"]),
        (f"{P}C", (1,), [f"{P}C belongs to no update"]),
    ],
)
def test_refused_tensors(tmp_path: Path, name: str, shape: tuple[int, ...] | None, parts: list[str]) -> None:
    case = write_case(tmp_path, config("wide"))

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
        ({"r": 4}, "r = 4"),
        ({"r": None}, "r must be a whole number above zero"),
        ({"rank_pattern": {"wide": 6}}, "r = 6"),
        ({"lambda_pattern": {"wide": "x"}}, "lambda_pattern['wide'] must be a finite number"),
        ({"bias": 3}, "bias must be none, all or"),
    ],
)
def test_refused_settings(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(write_case(tmp_path, config("wide")), **changes)
