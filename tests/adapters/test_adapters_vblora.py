"""VB-LoRA against PEFT: logits or only the weights of the topk vectors, bits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import shardmerge
from tests.support.family_oracle import (
    DTYPES,
    Swapped,
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

LAYERS = ("wide", "square", "narrow")


def config(*targets: str, **settings: Any) -> Any:
    from peft import VBLoRAConfig

    return VBLoRAConfig(
        target_modules=list(targets),
        **{"r": 3, "num_vectors": 20, "vector_length": 8, "topk": 2, "init_vector_bank_bound": 0.5, **settings},
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_bits_are_pefts(tmp_path: Path, dtype: str, top: bool, most: int) -> None:
    case = write_case(tmp_path, config(*LAYERS, save_only_topk_weights=top, topk=most), dtype=dtype)
    names = load_file(case.adapter / "adapter_model.safetensors").keys()
    assert any(name.endswith("_topk_indices") for name in names) == top
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


@pytest.mark.parametrize("count", [300, 40_000])
def test_indices_of_any_width(tmp_path: Path, count: int) -> None:
    case = write_case(tmp_path, config("wide", save_only_topk_weights=True, num_vectors=count))
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    dtype = torch.int16 if count < 1 << 15 else torch.int32
    assert tensors["base_model.model.wide.vblora_logits_A_topk_indices"].dtype == dtype
    assert_equals_peft(case, tmp_path / "out")


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize(("make", "targets"), [(Tall, ("tall", "wide")), (Swapped, ("wide", "narrow"))])
def test_tiles(tmp_path: Path, make: type[nn.Module], targets: tuple[str, ...], top: bool) -> None:
    case = write_case(tmp_path, config(*targets, save_only_topk_weights=top), make=make)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


def test_biases_and_modules_to_save(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide", bias="vblora_only", modules_to_save=["head"]), dtype="bfloat16")
    ours = assert_equals_peft(case, tmp_path / "out")
    assert not torch.equal(ours["wide.bias"], case.net.state_dict()["wide.bias"])


P = "base_model.model.wide.vblora_logits_"


def _change(name: str, tensor: Tensor | None) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


def test_weights_that_are_more_than_one_leave_nothing_for_the_last(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide", save_only_topk_weights=True))
    change_tensors(case, _change(f"{P}A_topk_weights", torch.full((3, 3, 1), 1.0 + 1e-6)))
    assert torch.isnan(merged_by_peft(case)["wide.weight"]).any()
    merged = merged_by_us(case, tmp_path / "out")
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())
    one = {name: tensor.double() for name, tensor in load_file(case.adapter / "adapter_model.safetensors").items()}
    bank, first = one["base_model.vblora_vector_bank"], one[f"{P}A_topk_indices"][..., 0].long()
    a = bank[first].reshape(3, -1)
    last = one[f"{P}B_topk_weights"]
    vectors = bank[one[f"{P}B_topk_indices"].long()]
    b = (torch.cat([last, 1 - last], -1).unsqueeze(-1) * vectors).sum(-2).transpose(1, 2).reshape(-1, 3)
    wanted = case.net.state_dict()["wide.weight"].double() + b @ a
    torch.testing.assert_close(merged["wide.weight"].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [20, -1])
def test_an_index_beyond_the_bank_stops_the_merge(tmp_path: Path, value: int) -> None:
    case = write_case(tmp_path, config("wide", save_only_topk_weights=True))
    change_tensors(case, _change(f"{P}B_topk_indices", torch.full((7, 3, 2), value, dtype=torch.int16)))
    with pytest.raises(shardmerge.FormatError, match="expected whole numbers from 0 to 19"):
        merged_by_us(case, tmp_path / "out")


@pytest.mark.parametrize(
    ("top", "name", "tensor", "parts"),
    [
        (False, f"{P}B", None, [f"{P}A is there without {P}B"]),
        (True, f"{P}B_topk_weights", None, [f"is there without {P}B_topk_weights"]),
        (True, f"{P}A", torch.ones(3, 3, 20), [f"{P}A is there beside"]),
        (False, "base_model.vblora_vector_bank", None, ["vblora_vector_bank is missing"]),
        (False, "base_model.vblora_vector_bank", torch.ones(19, 8), ["is [19, 8]; expected [20, 8]"]),
        (False, f"{P}A", torch.ones(3, 4, 20), [f"{P}A is [3, 4, 20]; expected [3, 3, 20]"]),
        (False, f"{P}A", torch.ones(3), [f"{P}A is [3]; expected three dimensions"]),
        (False, f"{P}B", torch.ones(7, 4, 20), [f"{P}B is [7, 4, 20]; expected [7, 3, 20]"]),
        (True, f"{P}B_topk_weights", torch.ones(7, 3, 2), ["topk_weights is [7, 3, 2]; expected [7, 3, 1]"]),
        (True, f"{P}A_topk_indices", torch.ones(3, 3, 1, dtype=torch.uint8), ["is [3, 3, 1]; expected [3, 3, 2]"]),
        (False, f"{P}A", torch.ones(3, 3, 20, dtype=torch.int32), [f"{P}A is stored as I32"]),
        (False, f"{P}C", torch.ones(3), [f"{P}C belongs to no update"]),
    ],
)
def test_refused_tensors(tmp_path: Path, top: bool, name: str, tensor: Tensor | None, parts: list[str]) -> None:
    case = write_case(tmp_path, config("wide", save_only_topk_weights=top))
    change_tensors(case, _change(name, tensor))
    text = refusal(case)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("top", "changes", "part"),
    [
        (False, {"r": 4}, "with r = 4"),
        (False, {"topk": 21}, "topk is 21, but num_vectors is 20"),
        (False, {"topk": 0}, "topk must be a whole number above zero"),
        (False, {"vector_length": "8"}, "vector_length must be a whole number above zero"),
        (True, {"save_only_topk_weights": False}, "does not say save_only_topk_weights"),
        (True, {"topk": 3}, "with r = 3 and topk = 3"),
    ],
)
def test_refused_settings(tmp_path: Path, top: bool, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(write_case(tmp_path, config("wide", save_only_topk_weights=top)), **changes)


def test_vectors_must_divide_the_matrix(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide"))
    change_tensors(case, _change("base_model.vblora_vector_bank", torch.ones(20, 5)))
    assert "vectors of 5 numbers" in refusal(case, vector_length=5)
