"""Memory does not grow with the weight: the peak of a merge, whatever the method, above that of importing torch.

The weight, (16384, 2048) in bfloat16, takes 67 MB, and its update in float32 twice that: who makes it whole exceeds the
bound. A few do, and say so in the plan.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardmerge
from shardmerge.adapters.registry import METHODS
from tests.support.builders import run_python
from tests.support.family_oracle import Case, write_case
from tests.support.peft_oracle import make_config

OUT, IN = 16384, 2048
#: What a merge may take above the interpreter with torch in it.
BOUND = 128 << 20
#: Every number of their update depends on all of the weight or of a spectrum as large.
WHOLE = ("FOURIERFT", "FROD", "OSF", "PSOFT", "WAVEFT")

#: A config of every method, for a layer of this size.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA": ("LoraConfig", {"r": 64}),
    "LORA, DoRA": ("LoraConfig", {"r": 64, "use_dora": True}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LOHA": ("LoHaConfig", {"r": 16}),
    "LOKR": ("LoKrConfig", {"r": 16}),
    "ADALORA": ("AdaLoraConfig", {"init_r": 16, "total_step": 10}),
    "VERA": ("VeraConfig", {"r": 64}),
    "RANDLORA": ("RandLoraConfig", {"r": 64}),
    "VBLORA": ("VBLoRAConfig", {"r": 4, "num_vectors": 64, "vector_length": 256}),
    "MISS": ("MissConfig", {"r": 64}),
    "SHIRA": ("ShiraConfig", {"r": 16}),
    "DELORA": ("DeloraConfig", {"r": 16}),
    "HRA": ("HRAConfig", {"r": 8}),
    "OFT": ("OFTConfig", {"oft_block_size": 32, "r": 0}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "ROAD": ("RoadConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 256}),
    "HIRA": ("HiraConfig", {"r": 16}),
    "GRALORA": ("GraloraConfig", {"r": 16}),
    "GLORA": ("GloraConfig", {"r": 4}),
    "PVERA": ("PveraConfig", {"r": 64}),
    "UNILORA": ("UniLoraConfig", {"r": 4, "theta_d_length": 256, "save_indices": True}),
    "TINYLORA": ("TinyLoraConfig", {"r": 2}),
    "DEFT": ("DeftConfig", {"r": 16}),
    "PEANUT": ("PeanutConfig", {"r": 16}),
}
FAST: tuple[str, ...] = ()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(hidden))


def _peak(program: str, *arguments: Path) -> int:
    """The most memory that a Python program has had resident, in bytes."""
    told = run_python("-c", f"{program}\nprint(open('/proc/self/status').read())", *arguments)
    assert told.returncode == 0, told.stderr
    found = re.search(r"VmHWM:\s+(\d+) kB", told.stdout)
    assert found, told.stdout
    return int(found[1]) * 1024


@cache
def peak_of_torch() -> int:
    return _peak("import torch")


def write(folder: Path, method: str) -> Case:
    import peft

    kind, settings = CONFIGS[method]
    config = getattr(peft, kind)(target_modules=["layer"], **settings)
    return write_case(folder, config, dtype="bfloat16", make=Wide, scale=0.01)


def test_every_method_that_goes_by_rows_is_here() -> None:
    here = {name.partition(",")[0] for name in CONFIGS}
    small = {"TRAINABLE_TOKENS", "LN_TUNING", "BEFT"}  # rows and vectors, whatever the weight
    assert here | small | set(WHOLE) | set(OTHERS) == set(METHODS)


#: Methods that a row of their own would add nothing to.
OTHERS = ("BONE", "SUPERTUNING")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in CONFIGS]
)
def test_peak_is_within_the_bound(tmp_path: Path, method: str) -> None:
    case = write(tmp_path, method)
    config = make_config(tmp_path / "out", case.base, [case.adapter])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert shardmerge.plan(config).memory.total < BOUND
    peak = _peak("import json, sys, shardmerge\nshardmerge.merge(json.load(open(sys.argv[1])))", file)
    assert peak - peak_of_torch() < BOUND
