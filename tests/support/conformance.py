"""Rows of the conformance table: a model, a feature of adapters, a dtype; and the merge of a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import shardmerge
from tests.support import zoo
from tests.support.peft_oracle import _new_folder as new_folder
from tests.support.peft_oracle import make_config
from tests.support.zoo import F32, Adapter, peft


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    feature: str
    adapter: Adapter
    dtype: str
    oracle: str = "peft"
    rounds: str = "once"
    exact: bool = True
    tied: str = "untie"
    #: Where the checkpoint's naming has an untied head, if not where transformers puts one that it did not load.
    head: str = "lm_head.weight"
    why: str = ""
    slow: bool = False

    def __str__(self) -> str:
        name = f"{self.model}-{self.feature}-{self.dtype}".replace(" ", "_")
        return f"{name}-as_peft" if self.tied == "peft" else name


def row(model: str, feature: str, adapter: Adapter, dtype: str = F32, **options: Any) -> Row:
    return Row(model, feature, adapter, dtype, **options)


#: One row each; their own tests are elsewhere.
FAMILIES = (
    row("llama", "IA3", peft("IA3Config", "k_proj", "down_proj", feedforward_modules=["down_proj"])),
    row("llama", "LoHa", peft("LoHaConfig", "q_proj", "o_proj", r=5, alpha=13)),
    row("llama", "LoKr", peft("LoKrConfig", "q_proj", "o_proj", r=5, alpha=13, decompose_both=True)),
    row("llama", "AdaLoRA", peft("AdaLoraConfig", "q_proj", "o_proj", init_r=5, lora_alpha=13, total_step=10)),
    row("llama", "VeRA", peft("VeraConfig", "q_proj", "o_proj", r=6)),
    row("llama", "RandLoRA", peft("RandLoraConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama", "VB-LoRA", peft("VBLoRAConfig", "q_proj", "o_proj", r=4, num_vectors=8, vector_length=4), slow=True),
    row("llama", "MiSS", peft("MissConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama", "SHiRA", peft("ShiraConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama", "DeLoRA", peft("DeloraConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama", "HRA", peft("HRAConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama", "OFT", peft("OFTConfig", "q_proj", "o_proj", r=0, oft_block_size=4)),
    row("llama", "BOFT", peft("BOFTConfig", "q_proj", "o_proj", boft_block_size=4)),
    row("llama", "RoAd", peft("RoadConfig", "q_proj", "o_proj", group_size=8), slow=True),
    row("llama", "C3A", peft("C3AConfig", "q_proj", "o_proj", block_size=4), exact=False, why="PEFT's FFT", slow=True),
    row("llama", "HiRA", peft("HiraConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama", "GraLoRA", peft("GraloraConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama", "GLoRA", peft("GloraConfig", "q_proj", "o_proj", r=4), slow=True),
    row("llama-biased", "BEFT", peft("BeftConfig", "v_proj"), slow=True),
    row("llama", "LN tuning", peft("LNTuningConfig", "input_layernorm"), slow=True),
    row("llama", "FourierFT", peft("FourierFTConfig", "q_proj", "o_proj", n_frequency=30), slow=True),
    row("llama", "WaveFT", peft("WaveFTConfig", "q_proj", "o_proj", n_frequency=30), slow=True),
)


@cache
def merged(row: Row) -> Path:
    """What shardmerge makes of a row."""
    base, adapter = zoo.base_folder(row.model, row.dtype), zoo.adapter_folder(row.model, row.adapter, row.dtype)
    output = new_folder("merged") / "out"
    config = make_config(output, base, [adapter])
    shardmerge.merge(config if row.tied == "untie" else {**config, "tied": row.tied})
    return output
