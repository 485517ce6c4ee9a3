"""Refuse values that an output cannot hold: numbers that are not finite, or that its dtype rounds to infinity.

A codec calls this only for a tile that it may be unable to encode.

An infinity may be intended, as in a mask. It stays where the base holds the same one and nothing was computed of it:
in a tensor without an update, in rows that no update reaches, and in an adapter's whole tensor, as PEFT saves what the
base had. A new infinity is refused, and so is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.registry import encoder
from shardmerge.errors import NonFiniteError
from shardmerge.execution.jobs import Tile
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import TensorRef

#: Reads elements of a tensor, before the updates: the first, and how many.
ReadElements = Callable[[TensorRef, int, int], Tensor]


def check(tile: Tensor, tensor: TensorPlan, of: Tile, read: ReadElements) -> None:
    """Raise `NonFiniteError` for a value of an updated tile that the output cannot hold."""
    codec, rows = encoder(tensor), of.rows
    wrong = ~(tile.abs() < codec.largest(tensor))
    if not tensor.updates:
        # What is not finite in the base stays; only a number must not become an infinity.
        wrong &= torch.isfinite(tile)
    elif codec.holds_infinity and bool(torch.isinf(tile).any()):
        wrong &= ~_of_the_base(tile, tensor, of, read).to(wrong.device)
    if not bool(wrong.any()):
        return
    row, column = (int(index) for index in wrong.nonzero()[0])
    at = (rows.start + row) * tensor.row_elements + column
    value, was = float(tile[row, column]), float(read(tensor.source, at, 1)[0])
    raise NonFiniteError(_explain(tensor, rows.start + row, column, value, was))


def _of_the_base(tile: Tensor, tensor: TensorPlan, of: Tile, read: ReadElements) -> Tensor:
    """Where a tile holds an infinity that the base holds too, and that no update has computed."""
    base = tensor.base or tensor.source
    first, count = of.rows.start * tensor.row_elements, tile.numel()
    there = min(count, max(0, math.prod(base.shape) - first))  # a resized tensor has rows that the base has not
    same = torch.zeros(count, dtype=torch.bool)
    if there:
        same[:there] = read(base, first, there).to(tile.dtype) == tile.reshape(-1)[:there].cpu()
    same = same.view(tile.shape) & torch.isinf(tile).cpu()
    for update, position in of.positions:
        if FAMILIES[update.family].computes:
            same[:, position.columns.start : position.columns.stop] = False
    return same


def _explain(tensor: TensorPlan, row: int, column: int, value: float, was: float) -> str:
    where = f"{tensor.source.name}, row {row}, column {column}"
    if not tensor.updates or len(tensor.source.shape) > 2:
        element = _unravel(row * tensor.row_elements + column, tensor.source.shape)
        where = f"{tensor.source.name}, element {list(element)}"
    what = "the merged value" if tensor.updates else "the value"
    if not math.isfinite(was) and any(FAMILIES[update.family].is_source for update in tensor.updates):
        return f"{where}: the adapter's own tensor holds {was} there; the merge was stopped"
    if not math.isfinite(was):
        return f"{where}: the base itself holds {was} there; the work was stopped"
    if math.isfinite(value):
        kind, hint = encoder(tensor).too_large(tensor, value)
        return f"{where}: {what} is {value:g}, more than {kind} can hold; the work was stopped. {hint}"
    return f"{where}: {what} is {value} (the base's is {was:g}); the work was stopped. No output dtype holds it"


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    position: list[int] = []
    for size in reversed(shape):
        index, remainder = divmod(index, size)
        position.insert(0, remainder)
    return tuple(position)
