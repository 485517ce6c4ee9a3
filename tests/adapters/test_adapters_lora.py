"""LoRA in all its forms, against PEFT: every kind of layer, every setting, several tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.family_oracle import (
    DTYPES,
    LINEARS,
    TOKENS,
    Case,
    Mixture,
    Net,
    assert_equals_peft,
    assert_no_worse_than_peft,
    assert_same_outputs,
    assert_tiles_agree,
    exact_weights,
    merged_by_peft,
    merged_by_us,
    refusal,
    relative_errors,
    write_case,
)
from tests.support.peft_oracle import assert_same_bits, least_memory, make_config, merge_to, stored

ALL = [*LINEARS, "conv1", "conv2"]

#: What PEFT rounds once, and so must be equal bit for bit.
ONCE: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": list(LINEARS)},
    "convolutions": {"target_modules": ALL},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "patterns": {"target_modules": ALL, "rank_pattern": {"wide": 7, "conv.": 2}, "alpha_pattern": {"conv1": 3}},
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "lora_bias": {"target_modules": ["wide", "narrow", "head"], "lora_bias": True},
    "bias all": {"target_modules": ["wide"], "bias": "all"},
    "bias lora_only": {"target_modules": ["wide", "head"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": ["wide"], "modules_to_save": ["head", "norm"]},
    "tokens": {"target_modules": ["wide"], "trainable_token_indices": {"embed": [30, 1, 36]}},
}


def write(folder: Path, dtype: str = "float32", **settings: Any) -> Case:
    from peft import LoraConfig

    return write_case(folder, LoraConfig(**{"r": 5, "lora_alpha": 13, **settings}), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", ONCE)
def test_bit_for_bit(tmp_path: Path, feature: str, dtype: str) -> None:
    case = write(tmp_path, dtype, **ONCE[feature])
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


def test_mica(tmp_path: Path) -> None:
    """It trains A alone, and is plain LoRA on disk."""
    case = write(tmp_path, target_modules=list(LINEARS), init_lora_weights="mica")
    assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(tmp_path: Path, dtype: str) -> None:
    case = write(tmp_path, dtype, target_modules=["embed", "wide"])
    if dtype == "float32":
        assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))
    else:
        assert_no_worse_than_peft(case, tmp_path / "out")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_on_an_embedding(tmp_path: Path, dtype: str) -> None:
    """The norm is over the vocabulary: it is added up in float64, so the last bit may be another than PEFT's."""
    case = write(tmp_path, dtype, target_modules=["embed"], use_dora=True)
    assert_no_worse_than_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, stored(tmp_path / "out"))


class Transposed(nn.Module):
    """GPT-2's Conv1D, whose weight is (in, out), square and not."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.c_attn = Conv1D(72, 24)
        self.c_proj = Conv1D(24, 72)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.c_proj(torch.tanh(self.c_attn(self.embed(tokens)))))


@pytest.mark.parametrize("flag", [True, False], ids=["flagged", "not flagged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d(tmp_path: Path, dtype: str, flag: bool) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=5, lora_alpha=13, target_modules=["c_attn", "c_proj"], fan_in_fan_out=flag)
    case = write_case(tmp_path, config, dtype=dtype, make=Transposed)
    ours = assert_equals_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dora_on_conv1d(tmp_path: Path, dtype: str) -> None:
    """Stored transposed, a tile has a part of every output's row: the norm is added up in float64, tile by tile."""
    from peft import LoraConfig

    config = LoraConfig(r=5, lora_alpha=13, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)
    assert_no_worse_than_peft(write_case(tmp_path, config, dtype=dtype, make=Transposed), tmp_path / "out")


class Large(nn.Module):
    """Layers large enough for several tiles of the smallest buffers."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(601, 96)
        self.wide = nn.Linear(96, 700)
        self.back = Conv1D(96, 700)
        self.conv = nn.Conv1d(96, 200, 5, padding=2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.back(torch.tanh(self.wide(self.embed(tokens))))
        return torch.as_tensor(self.conv(hidden.transpose(1, 2)))


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_tiles_give_the_same_bits(tmp_path: Path, dtype: str, dora: bool) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=5, lora_alpha=13, target_modules=["embed", "wide", "back", "conv"], use_dora=dora)
    case = write_case(tmp_path, config, dtype=dtype, make=Large)
    memory = least_memory(make_config(tmp_path / "x", case.base, [case.adapter]))
    whole = merged_by_us(case, tmp_path / "whole")
    assert_same_bits(merged_by_us(case, tmp_path / "tiles", max_memory=memory), whole)
    theirs = merged_by_peft(case)
    once = ("wide.weight", "conv.weight") if dora else ("wide.weight", "conv.weight", "back.weight")
    assert_same_bits({name: whole[name] for name in once}, {name: theirs[name] for name in once})
    errors = relative_errors(case, whole, theirs, exact_weights(case))
    assert errors["embed.weight"][0] <= errors["embed.weight"][1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        return torch.as_tensor(self.attention(hidden, hidden, hidden)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_multihead_attention(tmp_path: Path, dtype: str) -> None:
    """torch's own attention keeps q, k and v as one parameter, and PEFT wraps its out_proj within the wrapper.

    PEFT adds that one's update twice, in its forward pass as in its merge, and rounds three times in 16 bits.
    """
    from peft import LoraConfig

    config = LoraConfig(r=5, lora_alpha=13, target_modules=["attention"])
    case = write_case(tmp_path, config, dtype=dtype, make=Attention)
    if dtype != "float32":
        assert_no_worse_than_peft(case, tmp_path / "out")
        return
    ours, theirs = merged_by_us(case, tmp_path / "out"), merged_by_peft(case)
    assert_same_outputs(case, ours)
    # Two sums of Δ and one of 2 Δ both leave about half a unit in the last place, float32's being 6e-8.
    errors = relative_errors(case, ours, theirs, exact_weights(case))
    assert max(errors.pop("attention.out_proj.weight")) < 1e-7
    assert_same_bits({name: ours[name] for name in errors}, {name: theirs[name] for name in errors})


# --- block-diagonal ---------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.up = nn.Linear(24, 64)
        self.down = nn.Linear(64, 24)
        self.other = nn.Linear(24, 36)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.other(self.down(torch.tanh(self.up(self.embed(tokens))))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_diagonal(tmp_path: Path, dtype: str) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=4, match_strict=False)
    config = LoraConfig(r=8, lora_alpha=13, target_modules=["up", "down", "other"], use_bdlora=blocks)
    case = write_case(tmp_path, config, dtype=dtype, make=Blocks)
    if dtype == "float32":
        assert_same_outputs(case, assert_equals_peft(case, tmp_path / "out"))
    else:
        assert_no_worse_than_peft(case, tmp_path / "out")
    for wrong in ({"nblocks": 3}, {"nblocks": 0}, {"target_modules_bd_a": "down"}, {"nblocks": None}):
        refusal(case, use_bdlora={**vars(blocks), **wrong})


# --- fused experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("target", ["up_proj", "down_proj"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_an_unknown_architecture(tmp_path: Path, dtype: str, target: str, transposed: bool) -> None:
    """Shapes tell the orientation. PEFT rounds twice, and adds up its einsum in an order of its own."""
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=13, target_modules=[], target_parameters=[f"experts.{target}"])
    case = write_case(tmp_path, config, dtype=dtype, make=lambda: Mixture(transposed))
    assert_no_worse_than_peft(case, tmp_path / "out")
    if dtype == "float32":
        assert_same_outputs(case, stored(tmp_path / "out"))


class Parallel(nn.Module):
    """Experts whose parameter is called as that of a convolution is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 40, 24) * 0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("bli,eoi->blo", hidden, self.weight)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.experts = Parallel()

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.experts(self.embed(tokens)))


class Kernel(nn.Module):
    """A convolution, whose kernels PEFT takes for experts where they are targeted as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.experts = nn.Conv1d(24, 5, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.experts(self.embed(tokens).transpose(1, 2)))


@pytest.mark.parametrize("make", [Stack, Kernel])
def test_every_row_of_a_stack_that_is_called_a_weight(tmp_path: Path, make: type[nn.Module]) -> None:
    """The name alone says a tensor of as many rows as there are experts."""
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=13, target_modules=[], target_parameters=["experts.weight"])
    case = write_case(tmp_path, config, make=make)
    ours = assert_no_worse_than_peft(case, tmp_path / "out")
    assert bool((ours["experts.weight"] != case.net.state_dict()["experts.weight"]).any(dim=2).all())
    if make is Stack:
        assert_same_outputs(case, ours)
        assert_tiles_agree(case, tmp_path / "tiles", ours)


def test_two_parameters_of_an_unknown_architecture_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=3, lora_alpha=13, target_modules=[], target_parameters=["experts.up_proj", "experts.down_proj"]
    )
    told = refusal(write_case(tmp_path, config, make=Mixture))
    assert "belongs to one of up_proj, down_proj" in told and "not known" in told


def test_square_experts_of_an_unknown_architecture_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=13, target_modules=[], target_parameters=["experts.up_proj"])
    told = refusal(write_case(tmp_path, config, make=lambda: Mixture(square=True)))
    assert "is square" in told and "architecture is not known" in told


@pytest.mark.parametrize("layout", ["peft", "unsloth"])
def test_layout_of_experts_is_what_the_config_says(tmp_path: Path, layout: str) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=["experts.up_proj"])
    case = write_case(tmp_path, config, make=Mixture)
    file = load_file(case.adapter / "adapter_model.safetensors")
    a, b = (file[f"base_model.model.experts.lora_{role}.weight"] for role in "AB")
    b = b.view(40, 3, 4).permute(2, 0, 1) if layout == "peft" else b.view(40, 4, 3).transpose(0, 1)
    wanted = stored(case.base)["experts.up_proj"].double() + 2 * (b.double() @ a.view(4, 3, 24).double())
    entry = {"path": str(case.adapter), "expert_layout": layout}
    merge_to(tmp_path / "out", case.base, entry)
    assert torch.allclose(stored(tmp_path / "out")["experts.up_proj"].double(), wanted, rtol=0, atol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


def rewrite(case: Case, changes: dict[str, Tensor | None]) -> None:
    """Put tensors into the adapter's file, or take them out."""
    file = case.adapter / "adapter_model.safetensors"
    tensors: dict[str, Any] = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


M = "base_model.model."


@pytest.mark.parametrize(
    ("settings", "changes", "part"),
    [
        ({"use_dora": True}, {f"{M}wide.lora_magnitude_vector": None}, "wide.lora_magnitude_vector is missing"),
        ({"use_dora": True}, {f"{M}wide.lora_magnitude_vector": torch.ones(57)}, "expected [56]"),
        ({}, {f"{M}wide.lora_magnitude_vector": torch.ones(56)}, "does not say use_dora"),
        ({}, {f"{M}wide.lora_B.bias": torch.ones(56)}, "does not say lora_bias"),
        ({"lora_bias": True}, {f"{M}wide.lora_B.bias": None}, "wide.lora_B.bias is missing"),
        ({"lora_bias": True}, {f"{M}wide.lora_B.bias": torch.ones(55)}, "but the bias is [56]"),
        ({"modules_to_save": ["norm"]}, {f"{M}norm.weight": torch.ones(25)}, "is [25]"),
        ({}, {f"{M}narrow.weight": torch.ones(24, 56)}, "narrow.weight belongs to no update"),
        ({}, {f"{M}narrow.bias": torch.ones(24)}, "narrow.bias belongs to no update"),
        ({}, {f"{M}wide.lora_A.weight": None}, "is there without"),
        ({}, {f"{M}wide.lora_embedding_A": torch.ones(5, 24)}, "is there without"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:40],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Tensor | None], part: str
) -> None:
    case = write(tmp_path, target_modules=["wide"], **settings)
    rewrite(case, changes)
    assert part in refusal(case)


@pytest.mark.parametrize(
    ("indices", "part"),
    [
        ({"embed": [1, 2]}, "the config names 2 tokens"),
        ({"embed": [1, 2, 37]}, "token 37 is beyond the embedding, which has 37 rows"),
        ({"embed": [1, 2, 2]}, "names a token twice"),
        ({"embed": [1, 2, -1]}, "must be a list of token numbers"),
        ({"embed": [1, 2, True]}, "must be a list of token numbers"),
        ({"embed": 3}, "must be a list of token numbers"),
        ({"wide": [1, 2, 3]}, "does not say which tokens of embed"),
        (7, "must be a list of token numbers"),
        (None, "does not say which tokens of embed"),
    ],
    ids=str,
)
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, indices: Any, part: str) -> None:
    case = write(tmp_path, **ONCE["tokens"])
    assert part in refusal(case, trainable_token_indices=indices)


def test_parameters_are_targeted_by_a_list(tmp_path: Path) -> None:
    """PEFT refuses a string; taken for a list, it would be one of letters, none of which names a parameter."""
    case = write(tmp_path, target_modules=["wide"])
    told = refusal(case, target_parameters="wide.weight")
    assert "target_parameters must be a list of strings, found 'wide.weight'" in told
    with pytest.raises(TypeError, match="must be a list"):
        merged_by_peft(case)


def test_a_convolution_of_groups_is_refused(tmp_path: Path) -> None:
    """PEFT makes A for all inputs, and fails on the merge."""
    from peft import LoraConfig

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, groups=2)

    case = write_case(tmp_path, LoraConfig(r=2, target_modules=["conv"]), make=Grouped)
    assert "several groups" in refusal(case)
    with pytest.raises(NotImplementedError):
        merged_by_peft(case)


def test_outputs_of_the_network_depend_on_every_layer() -> None:
    """Else `assert_same_outputs` would prove nothing of a layer."""
    net = Net().eval()
    before = net(TOKENS)
    for name, parameter in net.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.5 * torch.rand_like(parameter))
            assert not torch.allclose(net(TOKENS), before), name
            parameter.copy_(kept)
