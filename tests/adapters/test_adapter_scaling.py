"""Ranks and scalings of an adapter, from its files alone, against the layers that real PEFT builds from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.config.schema import AdapterConfig
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.sources.source import open_source
from tests.support.builders import HIDDEN, INTERMEDIATE, LAYERS, peft_config, write_json

peft = pytest.importorskip("peft")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN // 2, bias=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))


class Model(nn.Module):
    """Has the module names of a Llama, and none of its sums."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return x


def peft_reads(folder: Path, config: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Write an adapter of ``config``, with the tensors that PEFT makes for it; PEFT's rank and scaling by module."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", {**config, "task_type": None})  # no language model's methods here
    model = peft.get_peft_model(Model(), peft.LoraConfig.from_pretrained(folder))
    save_file(peft.get_peft_model_state_dict(model), folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def we_read(folder: Path) -> dict[str, ModuleUpdate]:
    adapter = open_adapter(open_source(str(folder)))
    claims = adapter.claims(AdapterConfig(path=str(folder)))
    assert claims.problems == []
    assert claims.leftovers(adapter.tensors) == []
    assert all(update.fits for update in claims.updates)
    return {update.module: update for update in claims.updates}


Q0, Q1, V0 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha is no multiple": {"r": 3, "lora_alpha": 7},
    "alpha is a fraction": {"lora_alpha": 0.5},
    "alpha is zero, but patterns": {"lora_alpha": 0, "alpha_pattern": {".*": 5}},
    "alpha is negative": {"lora_alpha": -8},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "rank_pattern of a whole name": {"rank_pattern": {Q0: 2}},
    "rank_pattern of an end": {"rank_pattern": {"0.self_attn.q_proj": 2}},
    "rank_pattern of part of a segment": {"rank_pattern": {"proj": 2, "_proj": 3}},
    "rank_pattern of nothing there": {"rank_pattern": {"o_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3.5}},
    "patterns match independently": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {Q0: 5, "v_proj": 3}},
    "patterns with rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"gate_proj": 1}},
    "first key wins": {"rank_pattern": {"q_proj": 2, Q0: 6}, "alpha_pattern": {Q0: 6, "q_proj": 2}},
    "order of the file, not of the alphabet": {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 6}},
    "regex": {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {r".*\.(q|v)_proj": 5}},
    "regex from the start": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    "regex of alternatives": {"rank_pattern": {"q_proj|gate_proj": 2}},
    "regex with an end": {"rank_pattern": {"q_proj$": 2}},
    "regex whose dot is any character": {"rank_pattern": {"layers.0.self.attn.q_proj": 2}},
    "targets as a regex": {"target_modules": r".*\.(q_proj|gate_proj)"},
    "targets by whole name": {"target_modules": [Q0, V0]},
    "targets by layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "targets with exceptions": {"exclude_modules": ["v_proj"]},
}


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_rank_and_scaling_are_those_of_peft(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = peft_config(target_modules=["q_proj", "v_proj", "gate_proj"])
    expected = peft_reads(tmp_path / "adapter", {**config, **changes})
    assert expected
    updates = we_read(tmp_path / "adapter")
    assert {name: (update.rank, update.scaling) for name, update in updates.items()} == expected
    for update in updates.values():
        factors = dict(update.factors)
        assert factors["A"].shape[0] == factors["B"].shape[1] == update.rank


def test_the_order_of_patterns_matters_here(tmp_path: Path) -> None:
    """The cases above would not tell an order from the other if PEFT did not."""
    ranks = []
    for number, patterns in enumerate(({"q_proj": 2, Q0: 6}, {Q0: 6, "q_proj": 2})):
        folder = tmp_path / str(number)
        peft_reads(folder, peft_config(target_modules=["q_proj"], rank_pattern=patterns))
        updates = we_read(folder)
        ranks.append((updates[Q0].rank, updates[Q1].rank))
    assert ranks == [(2, 2), (6, 2)]


@pytest.mark.parametrize("initialisation", ["gaussian", "orthogonal", True, False], ids=str)
def test_what_peft_saves_itself(tmp_path: Path, initialisation: object) -> None:
    """Its own save_pretrained, with every key that this version of PEFT writes into the config."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=initialisation)
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path)
    updates = we_read(tmp_path)
    assert {name: (update.rank, update.scaling) for name, update in updates.items()} == {Q0: (4, 1.5), Q1: (4, 1.5)}
