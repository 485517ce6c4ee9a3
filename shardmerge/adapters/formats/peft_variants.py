"""Variants of LoRA: the settings that choose them, and what they save that is no part of the update.

Source: peft/tuners/lora/variants.py, 0.21.
"""

from __future__ import annotations

from shardmerge.adapters.formats.checks import Config

#: Variants, by the setting, → what they save that only training reads: PEFT's merge leaves it out, and so does its
#: forward pass then. MonteCLoRA draws perturbations, VeLoRA compresses what the backward pass needs.
TRAINING_STATE = {"monteclora_config": "lora_monteclora_sampler", "velora_config": "lora_velora_embed"}
#: Settings that choose a variant of LoRA, of which an adapter is one at most.
_VARIANTS = ("use_dora", "use_bdlora", "kasa_config", *TRAINING_STATE)


def variants(config: Config) -> list[str]:
    """The variants that an adapter is of, by the settings that choose them. A config without settings counts."""
    chosen = [name for name in _VARIANTS if config.get(name) not in (None, False)]
    return [*chosen, *(["init_lora_weights: mica"] if config.get("init_lora_weights") == "mica" else [])]
