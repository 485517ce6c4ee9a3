"""W' = W + s · L R, where L (out, k) and R (k, in) are made of a method's factors: L row by row, R whole.

VeRA, PVeRA, Uni-LoRA, TinyLoRA, DEFT, PEANuT and PSOFT have this form. The product comes before the scale, as in LoRA.
"""

from __future__ import annotations

from abc import abstractmethod

from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import PART_ROWS, Factors, Family, add_scaled, parts_of
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Update, Window


class Factored(Family):
    """A family whose update is a product."""

    builds = True
    by_column_windows = True

    @abstractmethod
    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        """These rows of L."""

    @abstractmethod
    def right(self, factors: Factors, update: Update) -> Tensor:
        """R, kept for the weight."""

    def inner(self, update: Update) -> int:
        """k."""
        return update.rank

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        right = factors.kept("right", lambda: self.right(factors, update))
        if len(window.columns) < update.columns:
            right = right[:, window.columns.start : window.columns.stop].contiguous()
        for part, rows in parts_of(window.rows):
            torch.mm(self.left(factors, update, rows), right, out=scratch[part])
        add_scaled(tile, scratch, update.scaling)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # R, what it is made of, and a part of its columns; some rows of L, made in two steps.
        return self.inner(update) * (3 * update.columns + 3 * 2 * PART_ROWS) * itemsize


class TwoPass(Factored):
    """W' = W + s · L f(V W), where V is (k, out): R is made of V W.

    Where tiles are rows, a first pass adds up V W. Where W is stored transposed, tiles have whole columns. All of it is
    computed in float64 and rounded once.
    """

    @abstractmethod
    def view(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        """These columns of V."""

    @abstractmethod
    def made(self, seen: Tensor, factors: Factors, update: Update, columns: RowRange) -> Tensor:
        """These columns of R, in float64, of the same columns of V W, which are float64, too."""

    def needs_prepass(self, update: Update) -> bool:
        return not update.by_columns

    def prepass(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        shape = (self.inner(update), update.columns)
        seen = factors.kept("seen", lambda: torch.zeros(shape, dtype=torch.float64, device=tile.device))
        self._look(seen, tile, factors, update, window.rows)

    def _look(self, seen: Tensor, tile: Tensor, factors: Factors, update: Update, rows: RowRange) -> None:
        for part, these in parts_of(rows):
            seen += self.view(factors, update, these).double() @ tile[part].double()

    def right(self, factors: Factors, update: Update) -> Tensor:
        seen = factors.kept("seen", lambda: torch.zeros(0))  # there since the first pass
        return self.made(seen, factors, update, RowRange(0, update.columns))

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        if update.by_columns:
            seen = torch.zeros(self.inner(update), tile.shape[1], dtype=torch.float64, device=tile.device)
            self._look(seen, tile, factors, update, window.rows)
            right = self.made(seen, factors, update, window.columns)
        else:
            right = factors.kept("right", lambda: self.right(factors, update))
        for part, rows in parts_of(window.rows):
            product = self.left(factors, update, rows).double() @ right
            tile[part] = product.mul_(update.scaling).add_(tile[part])

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # V W and R; some rows of the tile and of the product, twice; some columns of V, and rows of L.
        columns, inner = update.columns, self.inner(update)
        return 8 * (4 * inner * columns + 2 * PART_ROWS * (3 * columns + 4 * inner))
