"""Methods of PEFT where a matrix is not stored as the module has it: GPT-2's (in, out), and rows of a larger tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.peft_oracle import assert_same_bits, merge_to, stored
from tests.zoo import Adapter, adapter_folder, base_folder, merged_by_peft, peft

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


@pytest.mark.parametrize("model", ["gpt2", "gpt2-bare"])
@pytest.mark.parametrize("method", CONV1D)
def test_matrices_stored_transposed(tmp_path: Path, method: str, model: str) -> None:
    _check(model, CONV1D[method], tmp_path / "out")


@pytest.mark.parametrize("method", ROWS)
def test_rows_of_a_larger_tensor(tmp_path: Path, method: str) -> None:
    _check("nomic-bert", ROWS[method], tmp_path / "out")


def test_the_targets_are_parts_of_tensors() -> None:
    names: Any = stored(base_folder("nomic-bert")).keys()
    assert any("Wqkv" in name for name in names) and not any("q_proj" in name for name in names)
