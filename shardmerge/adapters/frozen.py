"""A frozen copy of a base tensor inside an adapter file: W' = W, if the copy equals W.

Training scripts that wrap a layer often save the wrapped layer's own weight with the factors. It is no update, but it
says which base the adapter was trained on, so it must agree with the base that is merged into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from shardmerge.adapters.base import Factors, Family, ModuleUpdate
from shardmerge.errors import FormatError
from shardmerge.spec import FACTOR_DTYPES, FLOAT_DTYPES, RowRange, TensorRef, Update

if TYPE_CHECKING:
    from torch import Tensor


class FrozenCopy(Family):
    """Stops the merge where the copy and the base differ."""

    name: ClassVar[str] = "frozen-copy"
    changes_weight: ClassVar[bool] = False

    def check(self, update: ModuleUpdate, weight: TensorRef) -> list[str]:
        copy = dict(update.factors)["copy"]
        if copy.shape != weight.shape or weight.dtype not in FLOAT_DTYPES or copy.dtype not in FACTOR_DTYPES:
            mine, its = (f"{ref.dtype} {list(ref.shape)}" for ref in (copy, weight))
            return [
                f"{copy.name}: a frozen copy of {weight.name}, but it is {mine} and the base's is {its}; the adapter "
                "was trained on another base"
            ]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, rows: RowRange, scratch: Tensor) -> None:
        import torch

        copy = factors.rows("copy", rows).reshape(tile.shape)
        # A copy in a narrower dtype than the base's can only agree within that dtype's rounding.
        narrow = getattr(torch, {"F16": "float16", "BF16": "bfloat16"}.get(update.factor("copy").dtype, "float64"))
        if not torch.equal(scratch.copy_(tile).to(narrow), copy.to(narrow)):
            raise FormatError(
                f"{update.factor('copy').name}: the adapter's copy of {update.target} differs from the base's in rows "
                f"{rows.start} to {rows.stop - 1}: it was trained on another base, or it trained this weight too"
            )
