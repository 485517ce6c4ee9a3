"""A frozen copy of a base tensor inside an adapter file: W' = W, if the copy equals W.

Training scripts that wrap a layer often save the wrapped layer's own weight with the factors, and PEFT does so with
embeddings. It is not an update, but it shows which base the adapter was trained on, so it must agree with the base that
is merged into; of PEFT's that is asked of every adapter but the first (`shardmerge.planning.several`).
"""

from __future__ import annotations

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Effect, Factors, Family, window_of
from shardmerge.adapters.tables import register
from shardmerge.errors import FormatError
from shardmerge.spec.updates import Update, Window


@register
class FrozenCopy(Family):
    """Stops the merge where the copy and the base differ."""

    name = "frozen-copy"
    effect = Effect.COMPARES
    by_rows = frozenset({"copy"})
    by_column_windows = True
    rows_are_independent = True

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        copy = update.factor("copy")
        if copy.shape != shape:
            return [
                f"{copy.name}: a frozen copy of {update.module}.{update.parameter}, but it is {list(copy.shape)} and "
                f"the base's is {list(shape)}; the adapter was trained on another base"
            ]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        copy = window_of(factors, "copy", update, window)
        # A copy in a narrower dtype than the base's can only agree within that dtype's rounding.
        narrow = getattr(torch, {"F16": "float16", "BF16": "bfloat16"}.get(update.factor("copy").dtype, "float64"))
        if not torch.equal(scratch.copy_(tile).to(narrow), copy.to(narrow)):
            raise FormatError(
                f"{update.factor('copy').name}: the adapter's copy of {update.target} differs from the base's in rows "
                f"{window.rows.start} to {window.rows.stop - 1}: it was trained on another base, or it trained this "
                "weight too"
            )
