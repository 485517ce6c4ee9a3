"""LoHa and LoKr against PEFT: layers of every kind, every way to decompose, bits, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.family_oracle import (
    Net,
    Tall,
    assert_equals_peft,
    assert_same_outputs,
    assert_tiles_agree,
    change_tensors,
    refusal,
    write_case,
)

LAYERS = ("wide", "square", "narrow", "conv1", "conv2", "grouped", "point", "large", "head")


class Grouped(Net):
    """With a convolution of several groups, one of a single point, and a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(24, 24, 3, padding=1, groups=4)
        self.point = nn.Conv2d(6, 6, 1)
        self.large = nn.Conv2d(24, 100, (2, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(super().forward(tokens) + self._others(tokens))

    def _others(self, tokens: Tensor) -> Tensor:
        hidden = self.grouped(self.norm(self.embed(tokens)).transpose(1, 2)).unsqueeze(2)  # (batch, 24, 1, length)
        return torch.as_tensor(self.large(hidden.expand(-1, -1, 3, -1)).mean() + self.point(hidden[:, :6]).mean())


def loha(*targets: str, **settings: Any) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(target_modules=list(targets), **{"r": 4, "alpha": 5, "init_weights": False, **settings})


def lokr(*targets: str, **settings: Any) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(target_modules=list(targets), **{"r": 3, "alpha": 7, "init_weights": False, **settings})


WAYS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "loha": (loha, {}),
    "loha-effective": (loha, {"use_effective_conv2d": True}),
    "loha-patterns": (loha, {"rank_pattern": {"conv.": 2, "wide": 7}, "alpha_pattern": {"^square": 3}}),
    "lokr": (lokr, {}),
    "lokr-effective": (lokr, {"use_effective_conv2d": True, "r": 2}),
    "lokr-both": (lokr, {"decompose_both": True, "r": 2}),
    "lokr-both-effective": (lokr, {"decompose_both": True, "use_effective_conv2d": True, "r": 2}),
    "lokr-whole": (lokr, {"r": 40}),
    "lokr-factor": (lokr, {"decompose_factor": 2, "r": 4}),
    "lokr-one": (lokr, {"decompose_factor": 1, "r": 4}),
    "lokr-lycoris": (lokr, {"init_weights": "lycoris", "r": 40}),
    "lokr-patterns": (lokr, {"rank_pattern": {"conv.": 1, "wide": 2}, "alpha_pattern": {"^square": 3}}),
}


NARROW = ("loha", "loha-effective", "lokr", "lokr-both-effective", "lokr-whole")


@pytest.mark.parametrize(
    ("way", "dtype"),
    [*((way, "float32") for way in WAYS), *((way, dtype) for way in NARROW for dtype in ("bfloat16", "float16"))],
)
def test_bits_are_pefts(tmp_path: Path, way: str, dtype: str) -> None:
    make, settings = WAYS[way]
    case = write_case(tmp_path, make(*LAYERS, **settings), make=Grouped, dtype=dtype)
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


def test_the_ways_are_all_there(tmp_path: Path) -> None:
    """The adapters of this file have factors of every kind, for matrices and for both kinds of convolution."""
    seen: set[tuple[str, int]] = set()
    for way in ("loha", "loha-effective", "lokr-effective", "lokr-both", "lokr-whole"):
        make, settings = WAYS[way]
        case = write_case(tmp_path / way, make(*LAYERS, **settings), make=Grouped)
        for name in load_file(case.adapter / "adapter_model.safetensors"):
            kind = {"conv1": 1, "conv2": 2, "large": 2}.get(name.split(".")[2], 0)
            seen.add((name.rpartition(".")[2], kind))
    assert {("hada_w1_a", kind) for kind in range(3)} <= seen
    assert {("hada_t1", 1), ("hada_t2", 2), ("lokr_t2", 1), ("lokr_t2", 2)} <= seen
    assert {("lokr_w1", kind) for kind in range(3)} | {("lokr_w2", kind) for kind in range(3)} <= seen
    assert {("lokr_w1_a", 0), ("lokr_w1_a", 2), ("lokr_w2_a", 0), ("lokr_w2_a", 1), ("lokr_w2_a", 2)} <= seen


@pytest.mark.parametrize(
    "way", ["loha", "loha-effective", "lokr", "lokr-effective", "lokr-both", "lokr-whole", "lokr-one"]
)
def test_tiles(tmp_path: Path, way: str) -> None:
    make, settings = WAYS[way]
    case = write_case(tmp_path, make("tall", "wide", "conv", **settings), make=Tall)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


class Convolutions(nn.Module):
    """Convolutions of several tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 16)
        self.one = nn.Conv1d(16, 400, 5)
        self.two = nn.Conv2d(16, 160, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.one(self.embed(tokens).transpose(1, 2)))  # (batch, 400, length - 4)
        return torch.as_tensor(self.two(hidden.reshape(len(tokens), 16, 25, -1)))


@pytest.mark.parametrize("way", ["loha", "loha-effective", "lokr", "lokr-both-effective", "lokr-whole", "lokr-one"])
def test_tiles_of_convolutions(tmp_path: Path, way: str) -> None:
    make, settings = WAYS[way]
    case = write_case(tmp_path, make("one", "two", **settings), make=Convolutions)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


class Large(nn.Module):
    """A matrix whose w2 is large enough to be made row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 576)
        self.tall = nn.Linear(576, 2 * 517)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.tall(self.embed(tokens)))


@pytest.mark.parametrize("factor", [1, 2])
def test_a_large_second_factor_is_made_row_by_row(tmp_path: Path, factor: int) -> None:
    from shardmerge.adapters.methods import lokr as module

    case = write_case(tmp_path, lokr("tall", decompose_factor=factor, r=5), make=Large)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEPT_WHOLE_BYTES", 1 << 18)
        ours = assert_equals_peft(case, tmp_path / "out")
        assert_tiles_agree(case, tmp_path / "tiled", ours)


def _drop(name: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"base_model.model.{name}"]

    return change


def _put(name: str, *shape: int) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{name}"] = torch.ones(shape)

    return change


TUCKER = {"use_effective_conv2d": True, "r": 1}


@pytest.mark.parametrize(
    ("config", "change", "parts"),
    [
        (loha("wide"), _drop("wide.hada_w2_a"), ["is there without", "wide.hada_w2_a"]),
        (loha("wide"), _put("wide.hada_w1_a", 55, 4), ["wide.hada_w1_a is [55, 4]; expected [56, 4]", "(out, r)"]),
        (loha("wide"), _put("wide.hada_w1_a", 56, 3), ["wide.hada_w1_a is [56, 3]; expected [56, 4]"]),
        (loha("wide"), _put("wide.hada_w2_b", 4, 25), ["wide.hada_w2_b is [4, 25]; expected [4, 24]"]),
        (loha("wide"), _put("wide.hada_t1", 4, 4, 1, 1), ["wide.hada_t1 is there without", "hada_t2"]),
        (loha("wide"), _put("wide.hada_t3", 4, 4), ["wide.hada_t3 belongs to no update"]),
        (loha("conv2", **TUCKER), _put("conv2.hada_t1", 1, 1, 3, 4), ["t1 is [1, 1, 3, 4]; expected [1, 1, 3, 5]"]),
        (loha("conv1", **TUCKER), _put("conv1.hada_w1_a", 18, 1), ["hada_w1_a is [18, 1]; expected [1, 18]"]),
        (lokr("wide"), _drop("wide.lokr_w1"), ["is there without base_model.model.wide.lokr_w1"]),
        (lokr("wide", r=1), _drop("wide.lokr_w2_b"), ["lokr_w2_a is there without", "wide.lokr_w2_b"]),
        (lokr("conv2", **TUCKER), _drop("conv2.lokr_w2_a"), ["is there without", "conv2.lokr_w2_a"]),
        (lokr("wide", r=1), _put("wide.lokr_w2", 7, 4), ["lokr_w2 is there beside", "lokr_w2_a"]),
        (lokr("wide"), _put("wide.lokr_w1", 7, 5), ["make an update of [56, 30]", "wide.weight is [56, 24]"]),
        (lokr("wide"), _put("wide.lokr_w1", 7), ["lokr_w1 is [7]; expected 2 dimensions"]),
        (lokr("wide", r=1), _put("wide.lokr_w2_b", 2, 6), ["has rank 2, but adapter_config.json says 1 for wide"]),
        (lokr("conv1", r=40), _put("conv1.lokr_w2", 6, 18, 1), ["lokr_w2 is [6, 18, 1]; expected [6, 18, 3]"]),
        (lokr("conv2", **TUCKER), _put("conv2.lokr_t2", 1, 1, 5, 3), ["t2 is [1, 1, 5, 3]; expected [1, 1, 3, 5]"]),
    ],
)
def test_refused_tensors(tmp_path: Path, config: Any, change: Any, parts: list[str]) -> None:
    case = write_case(tmp_path, config)
    change_tensors(case, change)
    text = refusal(case)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("make", [loha, lokr])
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"r": 0}, "r must be a whole number above zero"),
        ({"alpha": "much"}, "alpha must be a finite number"),
        ({"alpha": None}, "alpha must be a finite number"),
        ({"rank_pattern": {"wide": 1.5}}, "rank_pattern['wide'] must be"),
        ({"rank_pattern": {"wide": 9}}, "wide"),
        ({"alpha_pattern": ["a"]}, "alpha_pattern must map"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"use_effective_conv2d": 1}, "use_effective_conv2d must be true or false"),
        ({"unheard_of": True}, "'unheard_of' is unknown"),
    ],
)
def test_refused_settings(tmp_path: Path, make: Any, changes: dict[str, Any], part: str) -> None:
    case = write_case(tmp_path, make("wide", r=1))
    assert part in refusal(case, **changes)


def test_a_weight_scales_the_update(tmp_path: Path) -> None:
    """Twice α is twice the update."""
    for make in (loha, lokr):
        case = write_case(tmp_path / make.__name__, make("wide", "conv1"))
        entry = {"path": str(case.adapter), "weight": 2}
        ours = _merged(tmp_path / f"{make.__name__}-1", case.base, entry)
        file = case.adapter / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "alpha": config["alpha"] * 2}))
        again = _merged(tmp_path / f"{make.__name__}-2", case.base, str(case.adapter))
        assert all(torch.equal(ours[name], again[name]) for name in ours)


def _merged(output: Path, base: Path, entry: Any) -> dict[str, Tensor]:
    from tests.support.peft_oracle import merge_to, stored

    merge_to(output, base, entry)
    return stored(output)
