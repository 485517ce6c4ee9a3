"""B and A of the updates that add s · B A, by the family's name: straight from the definitions.

No code of the families is called: a mistake there must not repeat itself here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
            # A decomposition's bits depend on the threads; the merge makes them with all that torch takes by itself.
            with threads(self._threads):
                self._kept[name] = build()
        return self._kept[name]

    def matrix_rows(self, rows: RowRange) -> Tensor:
        """The matrix's rows at these places, which count stored rows from the place's start.

        Stored rows seen as (g, a, b) are the matrix's rows seen as (g, b, a).
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
    """One of the two is block-diagonal; its blocks are stored one below the other."""
    of, unfolded = BlockSettings.of(update), {role: factors.whole(role) for role in "AB"}
    unfolded[of.diagonal] = _block_diagonal(unfolded[of.diagonal].chunk(of.blocks))
    rows = factors.matrix_rows(window.rows)
    return unfolded["B"][rows], unfolded["A"][:, window.columns.start : window.columns.stop]


def _of_expert(factors: PlainFactors, update: Update, window: Window) -> tuple[Tensor, Tensor]:
    """A's rows e·r and following; B's columns, of PEFT every E-th from the e-th, of unsloth's r from the e·r-th."""
    rank = update.rank
    first = window.expert * rank
    a = factors.plain_rows("A", RowRange(first, first + rank))[:, window.columns.start : window.columns.stop]
    b = factors.whole("B")[factors.matrix_rows(window.rows)]
    if ExpertSettings.of(update).layout == "unsloth":
        return b[:, first : first + rank], a
    return b[:, window.expert :: update.experts], a


def _of_two(factors: PlainFactors, update: Update, window: Window) -> tuple[Tensor, Tensor]:
    """Gate's A above up's; B with a row of gate's, then one of up's, each beside zeros."""
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
    """The vector itself, which nothing is multiplied with."""
    bias = factors.rows("bias", window.rows).view(-1, 1)
    return bias, torch.ones(1, 1, dtype=bias.dtype)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


@dataclass(frozen=True, slots=True)
class Formula:
    """How a family's B A is made."""

    #: B (rows, r) and A (r, columns) of a window of the matrix.
    matrices: Callable[[PlainFactors, Update, Window], tuple[Tensor, Tensor]]
    #: Whether the elements of B A are sums, which have errors of their own.
    sums: bool = True
    #: Whether rows are brought to a trained length afterwards, as DoRA does it.
    rescales: bool = False


FORMULAS: Mapping[str, Formula] = {
    "lora": Formula(_matrices),
    "dora": Formula(_matrices, rescales=True),
    "lora-blocks": Formula(_of_blocks),
    "lora-experts": Formula(_of_expert),
    "lora-gated": Formula(_of_two),
    "lora-bias": Formula(_of_bias, sums=False),
}
