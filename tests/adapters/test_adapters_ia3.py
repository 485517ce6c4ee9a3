"""(IA)³ against PEFT: layers of every kind, feedforward or not, biases, bits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.family_oracle import (
    DTYPES,
    Swapped,
    Tall,
    assert_equals_peft,
    assert_same_outputs,
    assert_tiles_agree,
    change_tensors,
    refusal,
    write_case,
)


class Convolved(nn.Module):
    """Convolutions that (IA)³ knows, two of them of several groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.flat = nn.Conv2d(4, 12, (3, 2))
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.square = nn.Conv2d(18, 18, 1)
        self.deep = nn.Conv3d(2, 6, (1, 2, 3), bias=False)
        self.deep_groups = nn.Conv3d(6, 4, 1, groups=2)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.flat(self.embed(tokens).view(len(tokens), 4, 6, -1))  # (batch, 12, 4, length - 1)
        seen = self.square(torch.tanh(self.grouped(torch.tanh(seen))))  # (batch, 18, 4, length - 1)
        seen = self.deep(torch.tanh(seen).view(len(tokens), 2, 9, 4, -1))
        return torch.as_tensor(self.deep_groups(torch.tanh(seen)))


def config(*targets: str, forward: Any = (), **settings: Any) -> Any:
    from peft import IA3Config

    named = list(forward) if isinstance(forward, tuple) else forward
    return IA3Config(target_modules=list(targets), feedforward_modules=named, **settings)


CONVOLUTIONS = ("flat", "grouped", "square", "deep", "deep_groups")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forward", [(), ("narrow", "conv2"), ("wide", "square", "narrow", "conv2", "head")])
def test_bits_are_pefts(tmp_path: Path, dtype: str, forward: tuple[str, ...]) -> None:
    settings = config("wide", "square", "narrow", "conv2", "head", forward=forward)
    case = write_case(tmp_path, settings, dtype=dtype)
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forward", [(), CONVOLUTIONS])
def test_convolutions(tmp_path: Path, dtype: str, forward: tuple[str, ...]) -> None:
    case = write_case(tmp_path, config(*CONVOLUTIONS, forward=forward), dtype=dtype, make=Convolved)
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


@pytest.mark.parametrize("make", [Tall, Swapped])
@pytest.mark.parametrize("forward", [(), ("wide", "tall", "narrow", "conv")])
def test_tiles(tmp_path: Path, make: type[nn.Module], forward: tuple[str, ...]) -> None:
    targets = [name for name in ("wide", "tall", "narrow", "conv") if hasattr(make(), name)]
    settings = config(*targets, forward=tuple(name for name in forward if name in targets))
    case = write_case(tmp_path, settings, make=make)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert_same_outputs(case, ours)
    assert_tiles_agree(case, tmp_path / "tiled", ours)


class Square(nn.Module):
    """A Conv1D that is square, so that only the config can tell it."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.square = Conv1D(24, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.square(self.embed(tokens)))


@pytest.mark.parametrize("forward", [(), ("square",)])
def test_square_conv1d_is_told_by_the_config(tmp_path: Path, forward: tuple[str, ...]) -> None:
    case = write_case(tmp_path, config("square", forward=forward, fan_in_fan_out=True), make=Square)
    assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))


def test_feedforward_modules_may_be_an_expression(tmp_path: Path) -> None:
    from peft import IA3Config

    settings = IA3Config(target_modules=r"wide|narrow", feedforward_modules=r"nar.*")
    case = write_case(tmp_path / "one", settings)
    ours = assert_equals_peft(case, tmp_path / "out")
    assert torch.equal(ours["narrow.bias"], case.net.state_dict()["narrow.bias"])
    assert not torch.equal(ours["wide.bias"], case.net.state_dict()["wide.bias"])


def test_modules_to_save(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("wide", forward=(), modules_to_save=["head"]), dtype="bfloat16")
    assert_equals_peft(case, tmp_path / "out")


KEY = "base_model.model.wide.ia3_l"


def _rename(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.wide.ia3_m"] = tensors[KEY].clone()


def _resize(*shape: int) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[KEY] = torch.ones(shape)

    return change


@pytest.mark.parametrize(
    ("change", "changes", "parts"),
    [
        (_resize(1, 56), {}, [KEY, "[1, 56]", "(out, 1)", "wide is not feedforward"]),
        (_resize(56, 2), {}, [KEY, "[56, 2]"]),
        (_resize(56), {}, [KEY, "[56]"]),
        (_resize(55, 1), {}, [KEY, "[55]", "[56]", "every output of wide"]),
        (_resize(1, 56, 1, 1), {}, [KEY, "4 dimensions", "wide.weight is [56, 24]"]),
        (_rename, {}, ["ia3_m belongs to no update"]),
        (None, {"feedforward_modules": ["wide"]}, [KEY, "wide is feedforward"]),
        (None, {"feedforward_modules": "("}, ["feedforward_modules is not a regular expression"]),
        (None, {"feedforward_modules": {"a": 1}}, ["feedforward_modules must be a string or a list of strings"]),
        (None, {"feedforward_modules": [1]}, ["feedforward_modules must be"]),
        (None, {"fan_in_fan_out": "yes"}, ["fan_in_fan_out must be true or false"]),
        (None, {"target_modules": ["narrow"]}, ["target_modules do not cover wide"]),
        (None, {"new_setting": 1}, ["'new_setting' is unknown"]),
    ],
)
def test_refusals(tmp_path: Path, change: Any, changes: dict[str, Any], parts: list[str]) -> None:
    case = write_case(tmp_path, config("wide", forward=()))
    if change is not None:
        change_tensors(case, change)
    text = refusal(case, **changes)
    for part in parts:
        assert part in text


def test_a_convolution_needs_the_config_to_say_what_its_numbers_are_for(tmp_path: Path) -> None:
    case = write_case(tmp_path, config("square", forward=()), make=Convolved)
    assert "feedforward_modules" in refusal(case, feedforward_modules=None)


def test_weight_has_no_meaning(tmp_path: Path) -> None:
    import shardmerge

    case = write_case(tmp_path, config("wide", forward=()))
    with pytest.raises(shardmerge.PlanError, match="weight 2 has no meaning"):
        shardmerge.plan(
            {
                "base": str(case.base),
                "adapters": [{"path": str(case.adapter), "weight": 2}],
                "output": {"path": str(tmp_path / "out")},
            }
        )
