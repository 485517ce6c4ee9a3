"""A whole difference: W' = W + s · D, D of W's shape; s is the adapter's weight in our config, as there is no α.

Trainers that tune small layers whole beside the factors of others keep how they changed: norms, biases, embeddings of
patches. Source: LyCORIS, lycoris/modules/full.py and norms.py; ComfyUI, comfy/lora.py.
"""

from __future__ import annotations

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, Family, add_scaled, window_of
from shardmerge.adapters.tables import register
from shardmerge.spec.updates import Parameter, Update, Window


@register
class Difference(Family):
    """W + s · D, by rows or by columns."""

    name = "difference"
    by_rows = frozenset({"difference"})
    neutral_if_zero = frozenset({"difference"})
    by_column_windows = True
    rows_are_independent = True
    adds = True

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """D is as the module keeps W in memory, a Conv1D's (in, out)."""
        return update.changed(transposes=bool(parameter.is_transposed))

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        difference = update.factor("difference")
        if difference.shape == shape and shape:
            return []
        return [
            f"{difference.name} is {list(difference.shape)}, but {update.module}'s {update.parameter} is {list(shape)}"
        ]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        scratch.copy_(window_of(factors, "difference", update, window))
        add_scaled(tile, scratch, update.scaling)
