"""VeRA and RandLoRA against PEFT: projections in the file or from the seed, bits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.family_oracle import (
    DTYPES,
    LINEARS,
    Swapped,
    Tall,
    assert_equals_peft,
    assert_no_worse_than_peft,
    assert_same_outputs,
    assert_tiles_agree,
    change_tensors,
    merged_by_us,
    refusal,
    write_case,
)


def vera(*targets: str, **settings: Any) -> Any:
    from peft import VeraConfig

    return VeraConfig(target_modules=list(targets), **{"r": 6, "projection_prng_key": 5, **settings})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("saved", [True, False])
def test_vera(tmp_path: Path, dtype: str, saved: bool) -> None:
    case = write_case(tmp_path, vera(*LINEARS, save_projection=saved), dtype=dtype)
    assert ("base_model.vera_A" in load_file(case.adapter / "adapter_model.safetensors")) == saved
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(("make", "targets"), [(Tall, ("tall", "wide")), (Swapped, ("wide", "narrow"))])
def test_tiles_of_vera(tmp_path: Path, make: type[nn.Module], targets: tuple[str, ...], saved: bool) -> None:
    case = write_case(tmp_path, vera(*targets, save_projection=saved), make=make)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


def test_biases_and_modules_to_save(tmp_path: Path) -> None:
    case = write_case(tmp_path, vera("wide", "narrow", bias="all", modules_to_save=["head"]), dtype="bfloat16")
    ours = assert_equals_peft(case, tmp_path / "out")
    assert not torch.equal(ours["wide.bias"], case.net.state_dict()["wide.bias"])


# --- RandLoRA ---------------------------------------------------------------------------------------------------------


def randlora(*targets: str, **settings: Any) -> Any:
    from peft import RandLoraConfig

    return RandLoraConfig(
        target_modules=list(targets), **{"r": 5, "randlora_alpha": 12, "projection_prng_key": 5, **settings}
    )


BASES = [{}, {"sparse": True}, {"very_sparse": True, "sparse": True}]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("bases", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_randlora(tmp_path: Path, dtype: str, bases: dict[str, Any], saved: bool) -> None:
    case = write_case(tmp_path, randlora(*LINEARS, save_projection=saved, **bases), dtype=dtype)
    if dtype == "float32":
        assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))
    else:
        # PEFT rounds the update and then the sum.
        assert_no_worse_than_peft(case, tmp_path / "out")


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(("make", "targets"), [(Tall, ("tall", "wide")), (Swapped, ("wide", "narrow"))])
def test_tiles_of_randlora(tmp_path: Path, make: type[nn.Module], targets: tuple[str, ...], saved: bool) -> None:
    case = write_case(tmp_path, randlora(*targets, save_projection=saved, r=32), make=make)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


P = "base_model.model."


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        (f"{P}wide.vera_lambda_d", None, ["is there without", "vera_lambda_d"]),
        (f"{P}wide.vera_lambda_d", (5,), ["vera_lambda_d [5]", "r = 6"]),
        (f"{P}wide.vera_lambda_b", (55,), ["vera_lambda_b is [55]; expected [56]"]),
        (f"{P}wide.vera_lambda_b", (56, 1), ["vera_lambda_b [56, 1]"]),
        ("base_model.vera_A", None, ["base_model.vera_A is missing", "save_projection"]),
        ("base_model.vera_A", (6, 23), ["vera_A is [6, 23]", "expected [6, 24]"]),
        ("base_model.vera_A", (7, 24), ["vera_A is [7, 24]", "expected [6, 24]"]),
        ("base_model.vera_B", (55, 6), ["vera_B is [55, 6]", "expected [56, 6]"]),
        ("base_model.vera_C", (55, 6), ["vera_C belongs to no update"]),
    ],
)
def test_refused_tensors_of_vera(tmp_path: Path, name: str, shape: tuple[int, ...] | None, parts: list[str]) -> None:
    case = write_case(tmp_path, vera("wide"))
    _change(case, name, shape)
    text = refusal(case)
    for part in parts:
        assert part in text


def _change(case: Any, name: str, shape: tuple[int, ...] | None) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.ones(shape)

    change_tensors(case, change)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"r": 5}, "r = 5"),
        ({"r": True}, "r must be a whole number above zero"),
        ({"save_projection": "no"}, "save_projection must be true or false"),
        ({"projection_prng_key": 1.5}, "projection_prng_key must be a whole number"),
        ({"projection_prng_key": 1 << 64}, "projection_prng_key must be a whole number"),
    ],
)
def test_refused_settings_of_vera(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(write_case(tmp_path, vera("wide")), **changes)


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [
        (f"{P}wide.randlora_gamma", None, ["is there without", "randlora_gamma"]),
        (f"{P}wide.randlora_lambda", (5, 4), ["randlora_lambda is [5, 4]; expected [5, 5]"]),
        (f"{P}wide.randlora_gamma", (5, 56), ["randlora_gamma is [5, 56]; expected [5, 24]"]),
        (f"{P}wide.randlora_A", (5, 1, 23), ["randlora_A is [5, 1, 23]; expected [5, 1, 24] or wider"]),
        (f"{P}wide.randlora_B", (56, 4, 5), ["randlora_B is [56, 4, 5]; expected [56, 5, 5] or larger"]),
        (f"{P}wide.randlora_C", (1,), ["randlora_C belongs to no update"]),
    ],
)
def test_refused_tensors_of_randlora(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, parts: list[str]
) -> None:
    case = write_case(tmp_path, randlora("wide"))
    _change(case, name, shape)
    text = refusal(case)
    for part in parts:
        assert part in text


def test_bases_may_be_there_once_for_all_modules(tmp_path: Path) -> None:
    case = write_case(tmp_path, randlora("wide", "narrow"))
    ours = assert_equals_peft(case, tmp_path / "out")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "." in name.removeprefix("base_model.") and name[-2:] in ("_A", "_B")]:
            del tensors[name]

    change_tensors(case, change)
    assert "base_model.randlora_A" in load_file(case.adapter / "adapter_model.safetensors")
    again = merged_by_us(case, tmp_path / "again")
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    _change(case, "base_model.randlora_A", None)
    assert "base_model.randlora_A is missing, but save_projection" in refusal(case)


def test_a_seeded_adapter_on_a_module_that_the_base_lacks(tmp_path: Path) -> None:
    case = write_case(tmp_path, vera("wide", save_projection=False))
    _change(case, f"{P}other.vera_lambda_b", (9,))
    _change(case, f"{P}other.vera_lambda_d", (6,))
    assert "other.weight, which is not in the base" in refusal(case, target_modules=["wide", "other"])
