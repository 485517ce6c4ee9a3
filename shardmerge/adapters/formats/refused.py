"""Methods of PEFT that have no merge: why, and the way out."""

from __future__ import annotations

from collections.abc import Mapping

_BESIDE = "keep the adapter beside the base and load both with PEFT"
_PROMPT = (
    "it trains virtual tokens or what attention sees of them, not weights, so there is nothing to merge; " + _BESIDE
)

#: ``peft_type`` → the reason.
REFUSED_TYPES: Mapping[str, str] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "it adds gated attention over trained prompts to layers, so no weight is equal to it; "
    f"{_BESIDE}",
    "XLORA": "it mixes several LoRA adapters by a classifier that looks at every token; merge one of them, or a "
    "fixed mix",
    "POLY": "it mixes skills by the task that every input names when it runs, so no one weight is equal to it "
    f"for all tasks; {_BESIDE}",
    "SHADOW": "it runs a second, smaller model beside the base, which changes what goes from layer to layer, so "
    f"no weight is equal to it; {_BESIDE}",
    "LILY": f"a router mixes shared matrices anew for every input, so no weight is equal to it; {_BESIDE}",
    "ADAMSS": "which rows each of its subspaces has is not in its files: when PEFT loads it, scikit-learn's k-means "
    "groups them anew by W's singular vectors, and nothing in the files shows whether they are the groups of the "
    "training; merge it with PEFT, and with the scikit-learn of the training",
}
