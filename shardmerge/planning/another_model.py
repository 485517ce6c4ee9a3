"""Detect an adapter that was trained on another model, to report that before single tensors.

Each update fits, finds a parameter of another shape, or finds none. Layer numbers beyond the base's show a deeper
model. Where most updates do not fit, the adapter has the sizes or the names of another model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.registry import FAMILIES
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.model_config import whole_number

_LAYER = re.compile(r"\.(\d{1,6})(?=\.)")
#: Updates that must not fit before anything is said: one or two may be slips.
_LEAST = 3


@dataclass(slots=True)
class Fit:
    """How the updates of one adapter fit the base."""

    fitting: list[ModuleUpdate] = field(default_factory=list)
    #: With the shape that the base has, in the orientation of the update's factors.
    misshaped: list[tuple[ModuleUpdate, tuple[int, ...]]] = field(default_factory=list)
    absent: list[ModuleUpdate] = field(default_factory=list)

    def add(self, update: ModuleUpdate, shape: tuple[int, ...], is_wrong: bool) -> None:
        if is_wrong and FAMILIES[update.family].check(update, shape):
            self.misshaped.append((update, shape))
        else:
            self.fitting.append(update)


def another_model(fit: Fit, checkpoint: Checkpoint, trained_on: str | None) -> list[str]:
    """The problem as one message; empty where nothing indicates another model."""
    problem = _deeper(fit, checkpoint) or _most_misfit(fit, checkpoint)
    says = f"; it says that it was trained on {trained_on}" if trained_on else ""
    return [f"{problem}: this base is another model than it was trained on{says}"] if problem else []


def _most_misfit(fit: Fit, checkpoint: Checkpoint) -> str:
    wrong = len(fit.misshaped) + len(fit.absent)
    total = wrong + len(fit.fitting)
    if wrong < _LEAST or wrong * 2 <= total:
        return ""
    if len(fit.absent) >= len(fit.misshaped):
        kind = f", a {checkpoint.model_type} model," if checkpoint.model_type else ""
        count = "none" if len(fit.absent) == total else f"only {total - len(fit.absent)}"
        example = f" ({fit.absent[0].module:.200}, …)"
        return f"{count} of the {total} weights that it updates is in the base{kind} by its name{example}"
    return _sizes(fit.misshaped, checkpoint.config) or (
        f"{len(fit.misshaped)} of the {total} weights that it updates have another shape in the base"
    )


def _sizes(misshaped: Iterable[tuple[ModuleUpdate, tuple[int, ...]]], config: Mapping[str, Any]) -> str:
    """The hidden sizes of the two models, as far as A, (r, in), of LoRA beside a weight (out, in) shows them."""
    ours = whole_number(config, "hidden_size")
    factors = [(shape, update.factor("A").shape) for update, shape in misshaped if update.has("A")]
    inputs = [(shape[-1], of_a[-1]) for shape, of_a in factors if len(shape) == len(of_a) == 2]
    found = Counter(theirs for here, theirs in inputs if here == ours and theirs != here)
    if ours is None or not found:
        return ""
    return f"its hidden size is {found.most_common(1)[0][0]}, the base's is {ours}"


def _deeper(fit: Fit, checkpoint: Checkpoint) -> str:
    """Where all that have no place are of layers that the base has not, and all else fits."""
    if not fit.absent or fit.misshaped:
        return ""
    layers = whole_number(checkpoint.config, "num_hidden_layers")
    numbers = [int(match[1]) for update in fit.absent if (match := _LAYER.search(f".{update.module}."))]
    if layers is None or len(numbers) < len(fit.absent) or min(numbers) < layers:
        return ""
    return f"it updates layer {max(numbers)}, the base's last is {layers - 1}"
