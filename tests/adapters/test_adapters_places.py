"""Methods of PEFT where a matrix is not stored as the module has it: GPT-2's (in, out), and rows of a larger tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge import PlanError
from tests.support.builders import slow_but
from tests.support.peft_oracle import assert_same_bits, make_config, merge_to, stored
from tests.support.zoo import Adapter, adapter_folder, base_folder, lora, merged_by_peft, peft

#: Of GPT-2 one module is square, and PEFT writes the flag that tells.
GPT2 = ("c_attn", "c_proj", "c_fc")
SPLIT = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")

CONV1D = {
    "ia3": peft("IA3Config", *GPT2, feedforward_modules=["c_fc"]),
    "adalora": peft("AdaLoraConfig", *GPT2, init_r=5, total_step=9),
    "vera": peft("VeraConfig", *GPT2, r=7),
    "vera-seeded": peft("VeraConfig", *GPT2, r=7, save_projection=False),
    "randlora": peft("RandLoraConfig", *GPT2, r=6),
    "randlora-seeded": peft("RandLoraConfig", *GPT2, r=6, save_projection=False),
    "vblora": peft("VBLoRAConfig", *GPT2, num_vectors=30, vector_length=4),
}
ROWS = {
    "ia3": peft("IA3Config", *SPLIT, feedforward_modules=["down_proj", "up_proj"]),
    "loha": peft("LoHaConfig", *SPLIT, r=4, init_weights=False),
    "lokr": peft("LoKrConfig", *SPLIT, r=4, init_weights=False),
    "adalora": peft("AdaLoraConfig", *SPLIT, init_r=5, total_step=9),
    "vera": peft("VeraConfig", *SPLIT, r=7),
    "vera-seeded": peft("VeraConfig", *SPLIT, r=7, save_projection=False),
    "randlora": peft("RandLoraConfig", *SPLIT, r=6),
    "randlora-seeded": peft("RandLoraConfig", *SPLIT, r=6, save_projection=False),
    "vblora": peft("VBLoRAConfig", *SPLIT, num_vectors=30, vector_length=4),
    "miss": peft("MissConfig", *SPLIT, r=6),
    "bat": peft("MissConfig", *SPLIT, r=4, init_weights="bat"),
    "shira": peft("ShiraConfig", *SPLIT, r=5, random_seed=1),
    "delora": peft("DeloraConfig", *SPLIT, r=5),
}


def _check(model: str, adapter: Adapter, output: Path) -> None:
    merge_to(output, base_folder(model), adapter_folder(model, adapter))
    ours, theirs = stored(output), stored(merged_by_peft(model, adapter))
    assert_same_bits(ours, {name: theirs[name] for name in ours})
    base = stored(base_folder(model))
    assert any(not ours[name].equal(base[name]) for name in ours)


@pytest.mark.parametrize("model", slow_but(["gpt2", "gpt2-bare"], "gpt2"))
@pytest.mark.parametrize("method", CONV1D)
def test_matrices_stored_transposed(tmp_path: Path, method: str, model: str) -> None:
    _check(model, CONV1D[method], tmp_path / "out")


@pytest.mark.parametrize("method", ROWS)
def test_rows_of_a_larger_tensor(tmp_path: Path, method: str) -> None:
    _check("nomic-bert", ROWS[method], tmp_path / "out")


def test_the_targets_are_parts_of_tensors() -> None:
    names: Any = stored(base_folder("nomic-bert")).keys()
    assert any("Wqkv" in name for name in names) and not any("q_proj" in name for name in names)


def test_a_saved_part_that_would_undo_another_adapter(tmp_path: Path) -> None:
    """Between the two updates of the one part may lie updates of other parts."""
    first = adapter_folder("nomic-bert", lora("q_proj", "k_proj", "v_proj"))
    second = adapter_folder("nomic-bert", lora("o_proj", modules_to_save=["k_proj"]))
    base = base_folder("nomic-bert")
    with pytest.raises(PlanError, match=r"replaces encoder\.layers\.0\.attn\.Wqkv\.weight whole, which would undo"):
        shardmerge.plan(make_config(tmp_path / "out", base, [first, second]))
    shardmerge.plan(make_config(tmp_path / "out", base, [second, first]))
    other = adapter_folder("nomic-bert", lora("q_proj", "v_proj"))
    shardmerge.plan(make_config(tmp_path / "out", base, [other, second]))


@pytest.mark.parametrize(("also", "accepted"), [("v_proj", True), ("Wqkv", False)])
def test_a_part_is_replaced_once(tmp_path: Path, also: str, accepted: bool) -> None:
    """A file may speak of a part, and of the stored tensor by its own name."""
    weights = {
        "layers.0.self_attn.k_proj": torch.ones(40, 40),
        "layers.0.self_attn.v_proj": torch.ones(40, 40),
        "encoder.layers.0.attn.Wqkv": torch.ones(120, 40),
    }
    folder = tmp_path / "adapter"
    folder.mkdir()
    chosen = {name: weight for name, weight in weights.items() if name.endswith(("k_proj", also))}
    save_file(
        {f"base_model.model.{name}.weight": weight for name, weight in chosen.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 5, "lora_alpha": 13, "modules_to_save": ["k_proj", also]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    config = make_config(tmp_path / "out", base_folder("nomic-bert"), [folder])
    if accepted:
        shardmerge.merge(config)
        found = stored(tmp_path / "out")["encoder.layers.0.attn.Wqkv.weight"]
        assert found[40:].eq(1).all() and not found[:40].eq(1).any()
    else:
        with pytest.raises(PlanError, match=r"both update encoder\.layers\.0\.attn\.Wqkv\.weight"):
            shardmerge.plan(config)
