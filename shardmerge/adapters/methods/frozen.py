"""A frozen copy of a base tensor inside an adapter file: W' = W, if the copy equals W.

Training scripts that wrap a layer often save the wrapped layer's own weight with the factors, and PEFT does so with
embeddings. It is no update, but it says which base the adapter was trained on, so it must agree with the base that is
merged into; of PEFT's that is asked of every adapter but the first (`shardmerge.planning.several`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from shardmerge.adapters.methods.base import Factors, Family, ModuleUpdate
from shardmerge.errors import FormatError
from shardmerge.spec.updates import Update, Window

if TYPE_CHECKING:
    from torch import Tensor


class FrozenCopy(Family):
    """Stops the merge where the copy and the base differ."""

    name: ClassVar[str] = "frozen-copy"
    changes_weight: ClassVar[bool] = False
    computes: ClassVar[bool] = False
    by_rows: ClassVar[frozenset[str]] = frozenset({"copy"})
    by_column_windows: ClassVar[bool] = True
    rows_are_independent: ClassVar[bool] = True
    order: ClassVar[int] = 0

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        copy = update.factor("copy")
        if copy.shape != shape:
            return [
                f"{copy.name}: a frozen copy of {update.module}.{update.parameter}, but it is {list(copy.shape)} and "
                f"the base's is {list(shape)}; the adapter was trained on another base"
            ]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        import torch

        if update.experts:
            copy = factors.whole("copy")[window.expert].view(update.rows, update.columns)
            copy = copy[window.rows.start : window.rows.stop]
        else:
            copy = factors.rows("copy", window.rows).reshape(len(window.rows), update.columns)
        copy = copy[:, window.columns.start : window.columns.stop]
        # A copy in a narrower dtype than the base's can only agree within that dtype's rounding.
        narrow = getattr(torch, {"F16": "float16", "BF16": "bfloat16"}.get(update.factor("copy").dtype, "float64"))
        if not torch.equal(scratch.copy_(tile).to(narrow), copy.to(narrow)):
            raise FormatError(
                f"{update.factor('copy').name}: the adapter's copy of {update.target} differs from the base's in rows "
                f"{window.rows.start} to {window.rows.stop - 1}: it was trained on another base, or it trained this "
                "weight too"
            )
