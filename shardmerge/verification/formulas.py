"""B and A of the updates that add s · B A, by the family's name, from their definitions.

No code of the families is called, so a mistake there cannot repeat itself here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.adapters.methods.lora import BlockSettings
from shardmerge.adapters.methods.lora_experts import ExpertSettings
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Update, Window
from shardmerge.verification.reading import Factor, Files, threads


class PlainFactors:
    """The factors of one update, in float64; see `shardmerge.adapters.methods.base.Factors`."""

    def __init__(self, files: Files, update: Update, threads_of_torch: int = 1) -> None:
        self._update = update
        self._threads = threads_of_torch
        self._factors = {role: Factor(files, ref) for role, ref in update.factors}
        self._kept: dict[str, Tensor] = {}

    def whole(self, role: str) -> Tensor:
        return self._factors[role].whole()

    def as_stored(self, role: str) -> Tensor:
        return self.whole(role)

    def rows(self, role: str, rows: RowRange) -> Tensor:
        if self._update.region.shuffle is not None:
            return self.whole(role)[self.matrix_rows(rows)]
        return self._factors[role].rows(rows)

    def plain_rows(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a factor whose rows are not the matrix's."""
        return self._factors[role].rows(rows)

    def columns(self, role: str, columns: RowRange) -> Tensor:
        return self._factors[role].columns(columns)

    def kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if name not in self._kept:
            # The bits of a decomposition depend on the number of threads; the merge uses torch's default.
            with threads(self._threads):
                self._kept[name] = build()
        return self._kept[name]

    def matrix_rows(self, rows: RowRange) -> Tensor:
        """The matrix's rows that these rows, counted from the start of the update's place, hold.

        Stored rows viewed as (g, a, b) are the matrix's rows viewed as (g, b, a).
        """
        region = self._update.region
        if region.shuffle is None:
            return torch.arange(rows.start, rows.stop)
        groups, outer, inner = region.shuffle
        order = torch.arange(region.rows).view(groups, inner, outer).transpose(1, 2).reshape(-1)
        return region.start + order[rows.start - region.start : rows.stop - region.start]


def _matrices(factors: PlainFactors, update: Update, window: Window) -> tuple[Tensor, Tensor]:
    return factors.rows("B", window.rows).flatten(1), factors.columns("A", window.columns)


def _of_blocks(factors: PlainFactors, update: Update, window: Window) -> tuple[Tensor, Tensor]:
    """One of A and B is block-diagonal; its blocks are stored one below the other."""
    settings, unfolded = BlockSettings.of(update), {role: factors.whole(role) for role in "AB"}
    blocks = unfolded[settings.diagonal].chunk(settings.blocks)
    unfolded[settings.diagonal] = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    rows = factors.matrix_rows(window.rows)
    return unfolded["B"][rows], unfolded["A"][:, window.columns.start : window.columns.stop]


def _of_expert(factors: PlainFactors, update: Update, window: Window) -> tuple[Tensor, Tensor]:
    """Expert e of E: A's rows from e·r; B's columns e, e + E, … in PEFT's layout, and from e·r in unsloth's."""
    rank = update.rank
    first = window.expert * rank
    a = factors.plain_rows("A", RowRange(first, first + rank))[:, window.columns.start : window.columns.stop]
    b = factors.whole("B")[factors.matrix_rows(window.rows)]
    if ExpertSettings.of(update).layout == "unsloth":
        return b[:, first : first + rank], a
    return b[:, window.expert :: update.experts], a


def _of_two(factors: PlainFactors, update: Update, window: Window) -> tuple[Tensor, Tensor]:
    """A of gate above A of up; the rows of B are of gate and up in turn, each padded with zeros."""
    pairs = [(offset, end) for offset, end in ((0, ""), (1, "_up")) if update.has(f"A{end}")]
    a = torch.cat([factors.whole(f"A{end}") for _, end in pairs])
    b = torch.zeros(update.rows, len(a), dtype=a.dtype)
    column = 0
    for offset, end in pairs:
        one = factors.whole(f"B{end}")
        b[offset::2, column : column + one.shape[1]] = one
        column += one.shape[1]
    return b[factors.matrix_rows(window.rows)], a[:, window.columns.start : window.columns.stop]


def _of_bias(factors: PlainFactors, update: Update, window: Window) -> tuple[Tensor, Tensor]:
    """The bias, as a product with 1."""
    bias = factors.rows("bias", window.rows).view(-1, 1)
    return bias, torch.ones(1, 1, dtype=bias.dtype)


@dataclass(frozen=True, slots=True)
class Formula:
    """B A of a family."""

    #: B (rows, r) and A (r, columns) of a window of the matrix.
    matrices: Callable[[PlainFactors, Update, Window], tuple[Tensor, Tensor]]
    #: Whether the elements of B A are sums, which have rounding errors.
    sums: bool = True
    #: Whether rows are then scaled to a trained length, as in DoRA.
    rescales: bool = False


FORMULAS: Mapping[str, Formula] = {
    "lora": Formula(_matrices),
    "dora": Formula(_matrices, rescales=True),
    "lora-blocks": Formula(_of_blocks),
    "lora-experts": Formula(_of_expert),
    "lora-gated": Formula(_of_two),
    "lora-bias": Formula(_of_bias, sums=False),
}
