"""MLX's adapters: (in, r) and (r, out), a scale that is not divided by the rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import shardmerge
from shardmerge import PlanError
from shardmerge.adapters.registry import FORMATS, detect_format
from tests.support.builders import (
    Q0,
    VOCAB,
    Place,
    content,
    llama_tensors,
    random_tensor,
    read_tensors,
    refs_of,
    shape_of,
    write_base,
    write_json,
)

EMBED = "model.embed_tokens"
SCALE = 20.0


def pair(module: str, rank: int = 8) -> dict[str, Tensor]:
    out, into = (32, VOCAB) if module == EMBED else shape_of(module)
    return {
        f"{module}.lora_a": random_tensor((into, rank), 5, std=0.1),
        f"{module}.lora_b": random_tensor((rank, out), 6, std=0.1),
    }


def make(folder: Path, tensors: dict[str, Tensor], **config: Any) -> dict[str, Any]:
    write_base(folder / "base", aux={})
    (folder / "adapters").mkdir()
    save_file(tensors, folder / "adapters" / "adapters.safetensors")
    save_file(tensors, folder / "adapters" / "0000100_adapters.safetensors")
    told = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 8, "scale": SCALE, "dropout": 0.0},
        "model": "mlx-community/some-model",
        "num_layers": 16,
        **config,
    }
    (folder / "adapters" / "adapter_config.json").write_text(json.dumps(told))
    return {
        "base": str(folder / "base"),
        "adapters": [str(folder / "adapters")],
        "output": {"path": str(folder / "merged")},
    }


@pytest.mark.parametrize("module", [Q0, "model.layers.1.mlp.gate_proj", EMBED])
def test_lora(tmp_path: Path, module: str) -> None:
    tensors = pair(module)
    shardmerge.merge(make(tmp_path, tensors))
    merged, base = read_tensors(tmp_path / "merged"), llama_tensors()
    a, b = tensors.values()
    delta = (a @ b) * SCALE if module == EMBED else (b.T @ a.T) * SCALE
    for name, tensor in base.items():
        wanted = tensor + delta if name == f"{module}.weight" else tensor
        if module == EMBED and name == f"{module}.weight":
            # Computed as the transpose's product, which may differ in a last bit.
            assert torch.allclose(merged[name], wanted, rtol=0, atol=1e-6)
        else:
            assert torch.equal(merged[name], wanted), name


def test_dora(tmp_path: Path) -> None:
    tensors = {**pair(Q0), f"{Q0}.m": random_tensor((32,), 7).abs() + 0.5}
    shardmerge.merge(make(tmp_path, tensors, fine_tune_type="dora"))
    a, b, m = tensors.values()
    updated = llama_tensors()[f"{Q0}.weight"] + (b.T @ a.T) * SCALE
    wanted = (m / torch.linalg.norm(updated, dim=1))[:, None] * updated
    assert torch.equal(read_tensors(tmp_path / "merged")[f"{Q0}.weight"], wanted)


def test_full_fine_tune(tmp_path: Path) -> None:
    tensors = {f"{Q0}.weight": random_tensor((32, 32), 8), "model.norm.weight": random_tensor((32,), 9)}
    shardmerge.merge(make(tmp_path, tensors, fine_tune_type="full"))
    merged = read_tensors(tmp_path / "merged")
    for name, tensor in {**llama_tensors(), **tensors}.items():
        assert torch.equal(merged[name], tensor), name


def test_full_fine_tune_of_gpt2(tmp_path: Path) -> None:
    """MLX keeps as (out, in) what GPT-2 has as (in, out), and PEFT as the module has it."""
    module = "transformer.h.0.attn.c_proj"
    place = Place(tmp_path)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    write_base(place.base, {f"{module}.weight": random_tensor((32, 32), 1)}, shards=1, config=config)
    place.adapter.mkdir()
    write_json(place.adapter / "adapter_config.json", {"fine_tune_type": "full"})
    save_file({f"{module}.weight": random_tensor((32, 32), 2)}, place.adapter / "adapters.safetensors")
    shardmerge.merge(place.config())
    assert torch.equal(read_tensors(place.output)[f"{module}.weight"], random_tensor((32, 32), 2).T)


@pytest.mark.parametrize(
    ("tensors", "config", "part"),
    [
        ({f"{Q0}.lora_a": torch.ones(32, 8)}, {}, f"{Q0}.lora_a is there without {Q0}.lora_b"),
        ({**pair(Q0), f"{Q0}.lora_b": torch.ones(4, 32)}, {}, "of one rank"),
        ({**pair(Q0), f"{Q0}.m": torch.ones(32)}, {}, "fine_tune_type is not dora"),
        (pair(Q0), {"fine_tune_type": "dora"}, f"{Q0}.lora_a is there without {Q0}.m"),
        (pair(Q0), {"lora_parameters": {}}, "lora_parameters.scale must be a finite number"),
        (pair(Q0), {"lora_parameters": [1]}, "lora_parameters.scale must be a finite number"),
        (pair(Q0), {"fine_tune_type": "other"}, "fine_tune_type must be lora, dora or full"),
        ({**pair(Q0), "strange": torch.ones(2)}, {}, "strange belongs to no update"),
        (
            {"model.layers.0.ghost.lora_a": torch.ones(3, 2), "model.layers.0.ghost.lora_b": torch.ones(2, 3)},
            {},
            "ghost",
        ),
    ],
    ids=["half", "ranks", "length", "no length", "no scale", "no mapping", "type", "leftover", "nowhere"],
)
def test_refusals(tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], part: str) -> None:
    with pytest.raises(PlanError) as raised:
        shardmerge.plan(make(tmp_path, tensors, **config))
    (problem,) = raised.value.problems
    assert part in problem


def test_format_is_detected() -> None:
    refs = refs_of({"x.lora_a": (2, 2), "x.lora_b": (2, 2)})
    assert detect_format(refs, {"lora_parameters": {"scale": 1.0}}).name == "mlx"
    assert detect_format(refs, {"fine_tune_type": "full"}).name == "mlx"
    assert detect_format(refs, {"peft_type": "LORA"}).name == "peft"
    claims = FORMATS["mlx"].claim(content(refs, {"lora_parameters": {"scale": 1}}))
    assert [(update.rank, update.scaling) for update in claims.updates] == [(2, 1.0)]
