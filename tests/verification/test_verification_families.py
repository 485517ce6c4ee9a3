"""`shardmerge verify` and families: that the bounds are tight enough to find an update that is a hundredth off.

That they are wide enough, every row of `tests.end_to_end.test_conformance` shows.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge.verification.findings import TOUCHED
from tests.support import zoo
from tests.support.conformance import FAMILIES, Row, merged, row
from tests.support.peft_oracle import stored
from tests.support.tampering import forge_checksums, wrong
from tests.support.zoo import BF16, F32, lora

ALL = "all-linear"
ROWS = (
    row("llama", "LoRA", lora(ALL)),
    row("llama", "LoRA", lora(ALL), BF16),
    row("llama", "DoRA", lora(ALL, use_dora=True)),
    row("gpt2", "DoRA", lora("c_attn", "c_proj", use_dora=True)),
    row("llama-biased", "lora_bias", lora(ALL, lora_bias=True)),
    row("mixtral", "experts", lora("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    row("qwen2.5-vl", "Conv3d", lora("patch_embed.proj")),
    # Of LN tuning whole tensors are replaced, so that their bytes are compared.
    *(each for each in FAMILIES if each.feature != "LN tuning"),
)


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * row.slow, id=str(row)) for row in ROWS])
def test_an_update_that_is_a_hundredth_off_is_found(row: Row, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(merged(row), output)
    base = stored(zoo.base_folder(row.model, row.dtype))
    touched = set()
    for path in output.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            off = tensor.double() + 0.01 * (tensor.double() - base[name].double())
            if not off.to(tensor.dtype).equal(tensor):
                touched.add(name)
                tensors[name] = off.to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    forge_checksums(output)
    report = wrong(output, rows=None)
    found = {problem.tensor for problem in report.problems if problem.kind == TOUCHED}
    assert touched and report.counts[TOUCHED] == len(touched) and found <= touched


def test_bounds_do_not_depend_on_which_rows_are_looked_at() -> None:
    for each in ROWS[:6]:
        for seed in range(3):
            assert shardmerge.verify(merged(each), rows=2, seed=seed).raise_for_status().complete
    assert all(each.dtype in (F32, BF16) for each in ROWS[:6])
