"""What ``init_lora_weights`` does to the base's weights: most values nothing, some move them.

An initialisation that takes the first B A out of W trains B A beside W - s · B₀ A₀, so W + s · B A is not what was
trained. PEFT does it again when it loads the adapter (pissa, olora), cannot (corda, whose first B A come from data), or
does not (lora_ga, whose come from gradients). LoftQ puts a quantised W in its place, and again when the adapter is
loaded. Source: `LoraLayer.update_layer` and what it calls, peft/tuners/lora/layer.py, 0.21.2; the names are compared as
it compares them.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

from shardmerge.adapters.formats.checks import MISSING

_PLAIN = frozenset({"eva", "orthogonal"})
#: Those that PEFT takes in any case.
_PLAIN_IN_ANY_CASE = frozenset({"gaussian", "mica"})
_PISSA = re.compile(r"pissa(_niter_\d+)?")
_BASE = (
    "give as base the weights that the training had beside the factors, and name init_lora_weights in the adapter's "
    "ignore_keys"
)
_CONVERT = (
    "Convert the adapter with PEFT where it was trained (save_pretrained with "
    f"path_initial_model_for_weight_conversion), which sets init_lora_weights to true; or {_BASE}"
)


def initialisation_problems(key: str, value: Any) -> list[str]:
    """A check of ``init_lora_weights``: the messages about one that moves the base, and about an unknown one."""
    if value is MISSING or value is None or isinstance(value, bool):
        return []
    if not isinstance(value, str):
        return [_unknown(key, value)]
    if value in _PLAIN or value.lower() in _PLAIN_IN_ANY_CASE:
        return []
    if value == "loftq":
        return [
            f"{key}: 'loftq' puts quantised weights in the place of the base's, in training and whenever PEFT loads "
            "the adapter, so that these weights plus s·B·A are not what was trained. No conversion undoes that: "
            f"{_BASE} (PEFT's unload() returns them once it has loaded the adapter on this base)"
        ]
    if _PISSA.fullmatch(value) or value.startswith("corda") or value.lower() == "olora" or value == "lora_ga":
        return [
            f"{key}: {value!r:.80} takes the first B·A out of the base's weights, so that these weights plus s·B·A are "
            f"not what was trained. {_CONVERT}"
        ]
    return [_unknown(key, value)]


def _unknown(key: str, value: Any) -> str:
    return (
        f"{key}: {reprlib.repr(value)} is an initialisation that is unknown to this version, and to PEFT 0.21.2, which "
        "does not load it; whether it moves the base's weights is not known"
    )
