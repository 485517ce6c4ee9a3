"""LoRA: W' = W + s · B A, and DoRA: W' = m / ‖W + s · B A‖ · (W + s · B A), the norm taken of each output's row.

W is (out, in), A (r, in), B (out, r), m (out); s = α / r, or α / √r with rsLoRA. On a convolution A is (r, in, k…) and
B (out, r, 1…), and everything is seen as matrices, kernels flattened. On an embedding, whose W is (V, D), A is (r, V)
and B (D, r), and B A is Wᵀ's update; m is (D).
LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024,
arXiv:2402.09353.

The scale is applied after the product and the sum is made in the compute dtype, so the result is rounded once. That is
what PEFT's default ``merge_and_unload`` computes, bit for bit. Scaling a factor first, or a fused multiply-add, would
round differently.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate, shown
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, Family, add_scaled, misshaped, oriented
from shardmerge.spec.tensors import MIN_TILE_ROWS, Orientation, RowRange, TensorRef, even_rows, transposed_if
from shardmerge.spec.updates import Parameter, Settings, Update, Window


class Lora(Family):
    """W + s · B A, by rows or by columns."""

    name = "lora"
    by_rows = frozenset({"B"})
    by_columns = frozenset({"A"})
    neutral_if_zero = frozenset({"B"})
    by_column_windows = True
    rows_are_independent = True
    adds = True
    scales_by_alpha = True
    stacks_vectors = True

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """See `oriented`. An embedding that only its shape shows to be one is assumed not to be square."""
        made = (update.factor("B").shape[0], update.factor("A").shape[-1])
        if update.orientation is Orientation.UNKNOWN and made[0] != made[1]:
            return update.changed(orientation=transposed_if(made == parameter.shape[::-1]))
        return oriented(update.changed(orientation=update.orientation.assumed), parameter, *made)

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        a, b = update.factor("A"), update.factor("B")
        if len(shape) < 2:
            return [f"{update.module}.{update.parameter}, {list(shape)} is not a matrix, so LoRA cannot update it"]
        made = (b.shape[0], *a.shape[1:])
        if _without_ones(made) != _without_ones(shape):
            return [
                f"{update.module}: the update is {made} from {a.name} and {b.name}, but the weight "
                f"{update.module}.{update.parameter} is {shape}"
            ]
        return []

    def product(self, factors: Factors, update: Update, window: Window, out: Tensor) -> None:
        """The window of B A, into ``out``."""
        torch.mm(self.b(factors, update, window.rows), self.a(factors, update, window.columns), out=out)

    def a(self, factors: Factors, update: Update, columns: RowRange) -> Tensor:
        """Columns of A, (r, columns)."""
        if len(columns) == update.columns:
            return _matrix(factors.whole("A"))
        return factors.columns("A", columns)

    def b(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        """Rows of B, (rows, r)."""
        return _matrix(factors.rows("B", rows))

    def add(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        """Add the window of s · B A."""
        self.product(factors, update, window, scratch)
        add_scaled(tile, scratch, update.scaling)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        self.add(tile, factors, update, window, scratch)


def _matrix(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 2 else factor.flatten(1)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a convolution of one point as that of a Linear layer, as which LoRA may store it."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


class Dora(Lora):
    """LoRA, after which rows are scaled to a trained length.

    Where W is stored transposed a tile has a part of every row, so a first pass adds up the squares, in float64: there
    the last bit can differ from PEFT's float32 norm, which is the less exact of the two.
    """

    name = "dora"
    stacks_vectors = False
    by_rows = frozenset({"B", "magnitude"})
    neutral_if_zero = frozenset()
    adds = False

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        lengths = (update.factor("magnitude"), (shape[0],), "a length for every output")
        return super().check(update, shape) or misshaped(*lengths)

    def needs_prepass(self, update: Update) -> bool:
        return update.by_columns

    def prepass(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        self.add(tile, factors, update, window, scratch)
        squares = factors.kept("squares", lambda: torch.zeros(update.rows, dtype=torch.float64, device=tile.device))
        part = scratch.copy_(tile).double().square_().sum(dim=1)
        squares[window.rows.start : window.rows.stop] += part

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return update.rows * 8 if self.needs_prepass(update) else 0

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        self.add(tile, factors, update, window, scratch)
        if self.needs_prepass(update):
            squares = factors.kept("squares", lambda: torch.zeros(0))
            norm = squares[window.rows.start : window.rows.stop].sqrt().to(tile.dtype)
        elif len(update.shape) == 2:
            norm = torch.linalg.norm(tile, dim=1)
        else:
            norm = tile.view(tile.shape[0], *update.shape[1:]).norm(p=2, dim=tuple(range(1, len(update.shape))))
        factor = factors.rows("magnitude", window.rows) / norm
        tile.mul_(factor.view(-1, 1))


@dataclass(frozen=True, slots=True)
class BlockSettings(Settings):
    """The number of blocks, and the factor that has them, A or B."""

    blocks: int
    diagonal: str


class LoraBlocks(Lora):
    """BD-LoRA: one factor is block-diagonal, and only its blocks are stored, one below the other.

    A, of n blocks, is stored as (r, in / n), its i-th r / n rows being those of columns i · in / n and following; B as
    (out, r / n), its i-th out / n rows being those of columns i · r / n and following.
    Source: peft/tuners/lora/variants.py, BdLoraLinearVariant.
    """

    name = "lora-blocks"
    builds = True
    stacks_vectors = False
    by_columns = frozenset()

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        of = BlockSettings.of(update)
        blocks, diagonal = of.blocks, of.diagonal
        stored = update.factor(diagonal)
        whole = (stored.shape[0], stored.shape[1] * blocks)
        if whole[0] % blocks:
            return [f"{stored.name} is {list(stored.shape)}, whose rows are not {blocks} blocks"]
        unfolded = tuple(
            (role, dataclasses.replace(ref, shape=whole) if role == diagonal else ref) for role, ref in update.factors
        )
        return super().check(dataclasses.replace(update, factors=unfolded), shape)

    def a(self, factors: Factors, update: Update, columns: RowRange) -> Tensor:
        whole, of = factors.whole("A"), BlockSettings.of(update)
        if of.diagonal == "A":
            whole = factors.kept("A", lambda: _unfolded(whole, 0, len(whole), of.blocks))
        return whole[:, columns.start : columns.stop]

    def b(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        part, of = factors.rows("B", rows), BlockSettings.of(update)
        if of.diagonal == "B":
            return _unfolded(part, rows.start, update.rows, of.blocks)
        return part

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return update.rank * update.columns * itemsize if BlockSettings.of(update).diagonal == "A" else 0


def _unfolded(part: Tensor, first: int, rows: int, blocks: int) -> Tensor:
    """Rows of a block-diagonal matrix, made of the same rows of its stored blocks."""
    width = part.shape[1]
    whole = part.new_zeros(part.shape[0], blocks, width)
    for block in range(blocks):
        start, stop = (max(0, edge * rows // blocks - first) for edge in (block, block + 1))
        whole[start:stop, block] = part[start:stop]
    return whole.view(part.shape[0], blocks * width)


class LoraBias(Family):
    """b' = b + s · lb: the bias of lora_B, trained with ``lora_bias``."""

    name = "lora-bias"
    scales_by_alpha = True
    by_rows = frozenset({"bias"})
    neutral_if_zero = frozenset({"bias"})
    rows_are_independent = True
    adds = True

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        bias = update.factor("bias")
        return [] if bias.shape == shape else [f"{bias.name} is {list(bias.shape)}, but the bias is {list(shape)}"]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        bias = factors.rows("bias", window.rows)
        tile.add_((bias * update.scaling).view(-1, 1))


def add_product(out: Tensor, b: Tensor, a: Tensor) -> None:
    """Add B A to ``out``, some rows at a time: at most twice `MIN_TILE_ROWS`."""
    for rows in even_rows(len(out), max(1, len(out) // MIN_TILE_ROWS)):
        out[rows.start : rows.stop] += b[rows.start : rows.stop] @ a


def pair_problem(a: TensorRef, b: TensorRef) -> str:
    """The problem of the dimensions of A and B, whatever the weight; empty where they may be a pair."""
    if len(a.shape) >= 2 and len(b.shape) == len(a.shape) and {1}.issuperset(b.shape[2:]):
        return ""
    shapes = "(r, in) and (out, r), or of a convolution (r, in, k…) and (out, r, 1…)"
    return f"{shown(a, b)} are not factors: expected {shapes}"


def scaling_of(alpha: float, rank: int, rslora: bool) -> float:
    """α / r, or α / √r."""
    return alpha / (math.sqrt(rank) if rslora else rank)
