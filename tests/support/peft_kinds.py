"""Every method of PEFT that the package merges: its config's class and the least settings that it needs."""

from __future__ import annotations

from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from shardmerge.adapters.registry import METHODS

#: What a method needs besides its targets; those of layers of another kind have their own.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "total_step": 10},
    "C3A": {"block_size": 8},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 10},
    "FROD": {"sparse_rate": 0.05, "progressbar": False},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "OSF": {"effective_rank": 6},
    "PSOFT": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"r": 2, "u": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "UNILORA": {"r": 4, "save_indices": True},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 10},
}

#: The methods whose tests are quick; the others' are run with the slow ones.
QUICK = ("LORA", "IA3", "LOHA", "ROAD", "VERA", "LN_TUNING")

KINDS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value in METHODS}


def of_every_method(*but: str) -> pytest.MarkDecorator:
    kinds = [kind for kind in KINDS if kind not in but]
    slow = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in kinds]
    return pytest.mark.parametrize("kind", slow)
