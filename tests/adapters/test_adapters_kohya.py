"""Kohya's and diffusers' LoRA files: names without dots, alpha in the file, several models in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.adapters.registry import FORMATS, detect_format
from tests.support.builders import content, random_tensor, read_tensors, refs_of, write_base

UNET: dict[str, tuple[int, ...]] = {
    "down_blocks.0.attentions.0.proj_in.weight": (24, 20, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (24, 20),
    "down_blocks.0.resnets.0.conv1.weight": (24, 8, 3, 3),
    "mid_block.attentions.0.proj_in.weight": (24, 20),
    "conv_in.bias": (24,),
}


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: random_tensor(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def factors(
    key: str, shape: tuple[int, ...], rank: int, alpha: float | None, *, old: bool = False
) -> dict[str, Tensor]:
    """down and up of a weight, and alpha where there is one."""
    ends = (".lora.down.weight", ".lora.up.weight") if old else (".lora_down.weight", ".lora_up.weight")
    found = {
        key + ends[0]: random_tensor((rank, *shape[1:]), 70, std=0.3),
        key + ends[1]: random_tensor((shape[0], rank, *(1 for _ in shape[2:])), 71, std=0.3),
    }
    if alpha is not None:
        found[key + ".alpha"] = torch.tensor(alpha)
    return found


def expected(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    return weight + ((up.flatten(1) @ down.flatten(1)) * scaling).view(weight.shape)


def make(folder: Path, adapter: dict[str, Tensor], **entry: Any) -> dict[str, Any]:
    write_base(folder / "base", tensors_of(UNET), shards=1, config={"_class_name": "UNet2DConditionModel"}, aux={})
    save_file(adapter, folder / "lora.safetensors")
    return {
        "base": str(folder / "base"),
        "adapters": [{"path": str(folder / "lora.safetensors"), **entry}],
        "output": {"path": str(folder / "merged")},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_flattened_names_find_their_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(UNET.items()):
        if len(shape) > 1:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            adapter |= factors(key, shape, 4, 2.0 + number)
    adapter = {name: tensor.to(dtype) for name, tensor in adapter.items()}
    shardmerge.merge(make(tmp_path, adapter))
    merged, base = read_tensors(tmp_path / "merged"), tensors_of(UNET)
    for number, (name, shape) in enumerate(UNET.items()):
        if len(shape) == 1:
            assert torch.equal(merged[name], base[name])
            continue
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        down, up = (adapter[f"{key}.lora_{role}.weight"].float() for role in ("down", "up"))
        assert torch.equal(merged[name], expected(base[name], down, up, (2.0 + number) / 4)), name


def test_a_name_may_be_the_end_of_the_base_s(tmp_path: Path) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = factors("lora_unet_transformer_blocks_0_attn1_to_q", (24, 20), 4, None)
    shardmerge.merge(make(tmp_path, adapter))
    down, up = adapter.values()
    merged, base = read_tensors(tmp_path / "merged"), tensors_of(UNET)
    assert torch.equal(merged[f"{name}.weight"], expected(base[f"{name}.weight"], down, up, 1.0))


def test_a_name_that_may_be_several_is_refused(tmp_path: Path) -> None:
    config = make(tmp_path, factors("lora_unet_attentions_0_proj_in", (24, 20), 4, None))
    with pytest.raises(PlanError, match=r"may be any of down_blocks.*, mid_block"):
        shardmerge.plan(config)


def test_a_name_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    config = make(tmp_path, factors("lora_unet_up_blocks_0_proj_in", (24, 20), 4, None))
    with pytest.raises(
        PlanError, match=r"lora_unet_up_blocks_0_proj_in\.lora_down\.weight updates up_blocks_0_proj_in"
    ):
        shardmerge.plan(config)


def test_dotted_names_of_older_diffusers(tmp_path: Path) -> None:
    adapter = factors("unet.mid_block.attentions.0.proj_in", (24, 20), 4, None, old=True)
    shardmerge.merge(make(tmp_path, adapter))
    down, up = adapter.values()
    name = "mid_block.attentions.0.proj_in.weight"
    merged, base = read_tensors(tmp_path / "merged"), tensors_of(UNET)
    assert torch.equal(merged[name], expected(base[name], down, up, 1.0))


def test_a_point_convolution_takes_factors_of_a_linear_layer(tmp_path: Path) -> None:
    name = "down_blocks.0.attentions.0.proj_in"
    adapter = factors("lora_unet_" + name.replace(".", "_"), (24, 20), 4, 8.0)
    shardmerge.merge(make(tmp_path, adapter))
    down, up, _ = adapter.values()
    merged, base = read_tensors(tmp_path / "merged"), tensors_of(UNET)
    assert torch.equal(merged[f"{name}.weight"], expected(base[f"{name}.weight"], down, up, 2.0))


def test_several_models_in_one_file_are_taken_one_at_a_time(tmp_path: Path) -> None:
    unet = factors("lora_unet_mid_block_attentions_0_proj_in", (24, 20), 4, 4.0)
    adapter = {**unet, **factors("lora_te_text_model_encoder_layers_0_mlp_fc1", (24, 20), 4, 4.0)}
    config = make(tmp_path, adapter)
    with pytest.raises(PlanError, match=r"several models \(lora_te_, lora_unet_\); merge them one at a time"):
        shardmerge.plan(config)
    config["adapters"][0]["prefix"] = "lora_unet_"
    shardmerge.merge(config)
    name = "mid_block.attentions.0.proj_in.weight"
    down, up, _ = unet.values()
    assert torch.equal(read_tensors(tmp_path / "merged")[name], expected(tensors_of(UNET)[name], down, up, 1.0))
    config["adapters"][0]["prefix"] = "lora_vae_"
    with pytest.raises(PlanError, match="no tensor's name begins with prefix 'lora_vae_'"):
        shardmerge.plan({**config, "output": {"path": str(tmp_path / "other")}})


@pytest.mark.parametrize(
    ("alpha", "given", "scaling"),
    [
        (2.0, {}, 0.5),
        (None, {}, 1.0),
        (0.0, {"alpha": 12.0}, 3.0),
        (2.0, {"alpha": 12.0}, 3.0),
        (2.0, {"scaling": 0.25}, 0.25),
    ],
    ids=["in the file", "missing", "ours for zero", "ours", "our scaling"],
)
def test_scaling(alpha: float | None, given: dict[str, float], scaling: float) -> None:
    shapes = {"m.lora_down.weight": (4, 20), "m.lora_up.weight": (24, 4), **({} if alpha is None else {"m.alpha": ()})}
    refs = refs_of(shapes)
    numbers = {} if alpha is None else {"m.alpha": alpha}
    claims = FORMATS["kohya"].claim(content(refs, None, given.get("alpha"), given.get("scaling"), numbers))
    assert claims.problems == [] and claims.leftovers(refs) == []
    assert [(update.scaling, update.rank) for update in claims.updates] == [(scaling, 4)]


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        ({"m.lora_down.weight": (4, 20)}, "m.lora_down.weight is there without m.lora_up.weight"),
        ({"m.alpha": ()}, "m.alpha is there without m.lora_down.weight"),
        ({"m.lora_down.weight": (4, 20), "m.lora_up.weight": (24, 5)}, "of one rank"),
        ({"m.lora_down.weight": (4,), "m.lora_up.weight": (24, 4)}, "of one rank"),
        ({"m.lora_down.weight": (4, 20, 3), "m.lora_up.weight": (24, 4, 2)}, "of one rank"),
        ({"m.lora_down.weight": (4, 20), "m.lora_up.weight": (24, 4), "m.alpha": (2,)}, "expected one number"),
    ],
    ids=["half", "alpha alone", "ranks", "vector", "kernel in up", "two alphas"],
)
def test_what_does_not_fit(shapes: dict[str, tuple[int, ...]], part: str) -> None:
    refs = refs_of(shapes)
    claims = FORMATS["kohya"].claim(content(refs))
    (problem,) = claims.problems
    assert part in problem
    assert claims.leftovers(refs) == []


def test_an_alpha_of_zero_is_asked_about() -> None:
    """kohya's modules take it for a scale of 1, its merge and other loaders for 0."""
    refs = refs_of({"m.lora_down.weight": (4, 20), "m.lora_up.weight": (24, 4), "m.alpha": ()})
    claims = FORMATS["kohya"].claim(content(refs, numbers={"m.alpha": 0.0}))
    (problem,) = claims.problems
    assert "m.alpha holds 0" in problem and "give alpha (or scaling)" in problem


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "I64"])
def test_alpha_is_read_in_any_dtype(tmp_path: Path, dtype: str) -> None:
    torch_dtype = getattr(
        torch, {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64"}[dtype]
    )
    adapter = factors("lora_unet_mid_block_attentions_0_proj_in", (24, 20), 4, 6.0)
    adapter = {name: tensor.to(torch_dtype) if name.endswith(".alpha") else tensor for name, tensor in adapter.items()}
    plan = shardmerge.plan(make(tmp_path, adapter))
    assert [update.scaling for _, update in plan.updates()] == [1.5]


def test_format_is_detected() -> None:
    assert detect_format(refs_of({"lora_unet_x.lora_down.weight": (1,)}), None).name == "kohya"
    assert detect_format(refs_of({"unet.x.lora.down.weight": (1,)}), None).name == "kohya"
    assert detect_format(refs_of({"x.lora_A.weight": (1,)}), None).name == "peft"
