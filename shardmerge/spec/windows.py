"""Rows of a stored tensor ↔ the part of a module's matrix that they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Orientation, RowRange
from shardmerge.spec.updates import Update, Window


@dataclass(frozen=True, slots=True)
class Position:
    """What an update changes of a tile, all its rows and these columns, and the window of the matrix that this is."""

    window: Window
    columns: RowRange
    #: Of the window against the tile.
    orientation: Orientation


def locate(tensor: TensorPlan, update: Update, rows: RowRange) -> Position | None:
    """Where an update acts on stored rows, which must be within one segment; None if it does not."""
    turns = update.orientation is Orientation.TRANSPOSED
    region, first, expert = update.region, rows.start, update.region.expert or 0
    if tensor.row_dims == 2:
        expert, first = divmod(rows.start, tensor.source.shape[1])
        if region.expert is not None and expert != region.expert:
            return None
    stop = first + rows.stop - rows.start
    if region.orientation is Orientation.TRANSPOSED:
        matrix_rows, matrix_columns = RowRange(region.start, region.start + region.rows), RowRange(first, stop)
        columns = RowRange(region.stored_start, region.stored_start + region.rows)
    else:
        if not region.stored_start <= first < region.stored_start + region.rows:
            return None
        shift = region.start - region.stored_start
        matrix_rows = RowRange(first + shift, stop + shift)
        matrix_columns = columns = RowRange(0, update.rows if turns else update.columns)
    if turns:
        matrix_rows, matrix_columns = matrix_columns, matrix_rows
    return Position(Window(matrix_rows, matrix_columns, expert), columns, region.orientation.then(update.orientation))


def reaching(tensor: TensorPlan) -> Callable[[RowRange], tuple[Update, ...]]:
    """A function that returns the updates that may reach rows of a tensor (of one expert), in their order.

    An adapter may have an update for every expert: to try each on every tile would take the square of their number.
    """
    if tensor.row_dims == 1:
        return lambda rows: tensor.updates
    experts, height = tensor.source.shape[:2]
    of = [
        tuple(update for update in tensor.updates if update.region.expert in (None, expert))
        for expert in range(experts)
    ]
    return lambda rows: of[rows.start // height]


def boundaries(tensor: TensorPlan) -> list[int]:
    """Stored rows at which a part of some matrix begins or ends, with the first and the end of the output's."""
    rows = height = tensor.all_rows
    if tensor.row_dims == 2:
        height = tensor.source.shape[1]
    within = {0}
    for update in tensor.updates:
        region = update.region
        if region.orientation is not Orientation.TRANSPOSED:
            within |= {region.stored_start, region.stored_start + region.rows}
    within = {row for row in within if row < height}
    first, last = tensor.first_row, tensor.first_row + tensor.rows
    inner = {start + row for start in range(0, rows, height or 1) for row in within}
    return [first, *sorted(row for row in inner if first < row < last), last]
