"""W' = W + s · L R, where L (out, k) and R (k, in) are made of a method's factors: L row by row, R whole.

What PVeRA, Uni-LoRA, TinyLoRA, DEFT, PEANuT and PSOFT have in common. As LoRA's, the product comes before the scale.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from shardmerge.adapters.base import Factors, Family
from shardmerge.spec import MIN_TILE_ROWS, RowRange, Update, Window, even_rows

if TYPE_CHECKING:
    from torch import Tensor


class Factored(Family):
    """A family whose update is a product."""

    by_column_windows: ClassVar[bool] = True

    @abstractmethod
    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        """These rows of L."""

    @abstractmethod
    def right(self, factors: Factors, update: Update) -> Tensor:
        """R; kept while the weight is worked on."""

    @abstractmethod
    def inner(self, update: Update) -> int:
        """k."""

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        import torch

        right = factors.kept("right", lambda: self.right(factors, update))
        if len(window.columns) < update.columns:
            right = right[:, window.columns.start : window.columns.stop].contiguous()
        torch.mm(self.left(factors, update, window.rows), right, out=scratch)
        tile.add_(scratch.mul_(update.scaling) if update.scaling != 1 else scratch)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # R, and what it is made of on the way or its columns; L of all rows at most, made in two steps.
        return self.inner(update) * (3 * update.columns + 2 * update.rows) * itemsize


class Surveyed(Factored):
    """W' = W + s · L f(V W), where V (k, out) looks at whole columns of W: R is made of what it sees.

    Where tiles are rows, a first pass adds up V W in float64. Where W is stored transposed, tiles have whole columns.
    """

    @abstractmethod
    def view(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        """These columns of V."""

    @abstractmethod
    def made(self, seen: Tensor, factors: Factors, update: Update, columns: RowRange) -> Tensor:
        """These columns of R, in the dtype of the factors, of the same columns of V W, which are float64."""

    def surveys(self, update: Update) -> bool:
        return not update.by_columns

    def survey(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        import torch

        shape = (self.inner(update), update.columns)
        seen = factors.kept("seen", lambda: torch.zeros(shape, dtype=torch.float64, device=tile.device))
        self._look(seen, tile, factors, update, window.rows)

    def _look(self, seen: Tensor, tile: Tensor, factors: Factors, update: Update, rows: RowRange) -> None:
        view = self.view(factors, update, rows)
        for part in even_rows(len(tile), max(1, len(tile) // MIN_TILE_ROWS)):
            seen += view[:, part.start : part.stop].double() @ tile[part.start : part.stop].double()

    def right(self, factors: Factors, update: Update) -> Tensor:
        import torch

        seen = factors.kept("seen", lambda: torch.zeros(0))  # there since the first pass
        return self.made(seen, factors, update, RowRange(0, update.columns))

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        import torch

        if not update.by_columns:
            super().apply(tile, factors, update, window, scratch)
            return
        seen = torch.zeros(self.inner(update), tile.shape[1], dtype=torch.float64, device=tile.device)
        self._look(seen, tile, factors, update, window.rows)
        right = self.made(seen, factors, update, window.columns)
        torch.mm(self.left(factors, update, window.rows), right, out=scratch)
        tile.add_(scratch.mul_(update.scaling) if update.scaling != 1 else scratch)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        slab = 2 * MIN_TILE_ROWS * update.columns * 8
        return super().kept_bytes(update, itemsize) + 2 * self.inner(update) * update.columns * 8 + slab
