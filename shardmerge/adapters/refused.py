"""Methods of PEFT that have no merge: why, and the way out."""

from __future__ import annotations

from collections.abc import Mapping

_PROMPT = (
    "it trains virtual tokens or what attention sees of them, not weights, so there is nothing to merge; keep the "
    "adapter beside the base and load both with PEFT"
)

#: ``peft_type`` → the reason.
REFUSED_TYPES: Mapping[str, str] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "it adds gated attention over trained prompts to layers; there is no weight that this is equal to",
    "XLORA": "it mixes several LoRA adapters by a classifier that looks at every token; merge one of them, or a fixed mix",
    "POLY": "it mixes skills by task when it runs; no single weight is equal to it",
    "SHADOW": "it runs a second, small model beside the base; no weight is equal to it",
    "LILY": "it routes every input among shared matrices; no single weight is equal to it",
}
