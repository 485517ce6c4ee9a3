"""Tensors as pieces of stored tensors, and the operations of transformers' conversions on them.

No data is read: a `View` maps every row of a tensor to where it is stored, and an operation rearranges that map.
What a `Region` cannot express is refused with the reason, and never approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardmerge.spec.tensors import Orientation
from shardmerge.spec.updates import Region


class RefusalError(Exception):
    """Why the regions of a parameter cannot be determined."""


class Piece(NamedTuple):
    """Rows [start, start + rows) of a tensor (of a member of it, if it is a stack) and where they are stored."""

    tensor: str
    rows: int
    start: int = 0
    stored_start: int = 0
    #: The member of the stack that these rows belong to; None: the piece has the rows of all members.
    member: int | None = None
    #: The member of the stored tensor that has them; None: the stored tensor is a matrix, or all of it is meant.
    slot: int | None = None
    orientation: Orientation = Orientation.SAME
    shuffle: tuple[int, int, int] | None = None


class View(NamedTuple):
    """A tensor made of pieces: (rows, …), or a stack (E, rows, …) of such tensors."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    stacked: bool = False

    @property
    def row_axis(self) -> int:
        return int(self.stacked)

    @property
    def rows(self) -> int:
        return self.shape[self.row_axis] if self.shape else 1


def _is_row_axis(view: View, axis: int) -> bool:
    return bool(view.shape) and axis % len(view.shape) == view.row_axis


def stored(name: str, shape: tuple[int, ...], stacked: bool) -> View:
    """A view of a whole stored tensor."""
    axis = int(stacked)
    return View(shape, (Piece(name, shape[axis] if len(shape) > axis else 1),), stacked)


def stack(views: Sequence[View]) -> View:
    """(rows, …) of E experts → (E, rows, …)."""
    if not views:
        raise RefusalError("it has no experts")
    if any(view.shape != views[0].shape for view in views):
        raise RefusalError("its experts differ in shape")
    if any(view.stacked for view in views):
        raise RefusalError("its experts are stacked already")
    pieces = tuple(piece._replace(member=i) for i, view in enumerate(views) for piece in view.pieces)
    return View((len(views), *views[0].shape), pieces, True)


def unstack(view: View, member: int) -> View:
    """(E, rows, …) → one expert's (rows, …)."""
    if not view.stacked:
        raise RefusalError("it is not a stack of experts")
    if not 0 <= member < view.shape[0]:
        raise RefusalError(f"there is no expert {member}, there are {view.shape[0]}")
    pieces = tuple(
        piece._replace(slot=member) if piece.member is None else piece._replace(member=None)
        for piece in view.pieces
        if piece.member in (None, member)
    )
    return View(view.shape[1:], pieces, False)


def transpose(view: View, axis: int, other: int) -> View:
    """Swap the two dimensions of a matrix, or of every matrix of a stack."""
    rows = view.row_axis
    if sorted((axis, other)) != [rows, rows + 1] or len(view.shape) != rows + 2:
        raise RefusalError("it is transposed along dimensions that are not those of a matrix")
    shape = (*view.shape[:rows], view.shape[rows + 1], view.shape[rows])
    pieces = []
    for piece in view.pieces:
        if piece.rows != view.rows or piece.shuffle or piece.stored_start:
            raise RefusalError("it is stored in parts that are transposed")
        pieces.append(piece._replace(rows=shape[rows], orientation=piece.orientation.then(Orientation.TRANSPOSED)))
    return View(shape, tuple(pieces), view.stacked)


def concatenate(views: Sequence[View], axis: int) -> View:
    """Join tensors along their rows."""
    first = views[0]
    if len(views) == 1:
        return first
    rows = first.row_axis
    others = {(view.shape[:rows], view.shape[rows + 1 :], view.stacked) for view in views}
    if len(others) > 1:
        raise RefusalError("its parts do not fit together")
    if not _is_row_axis(first, axis):
        raise RefusalError("its parts are joined along a dimension other than its rows")
    pieces: list[Piece] = []
    start = 0
    for view in views:
        pieces += [piece._replace(start=piece.start + start) for piece in view.pieces]
        start += view.rows
    return View((*first.shape[:rows], start, *first.shape[rows + 1 :]), tuple(pieces), first.stacked)


def split(view: View, sizes: Sequence[int], axis: int) -> list[View]:
    """Cut a tensor along its rows into parts of the given sizes."""
    rows = view.row_axis
    if not _is_row_axis(view, axis):
        raise RefusalError("it is cut along a dimension other than its rows")
    if sum(sizes) != view.rows:
        raise RefusalError(f"its {view.rows} rows cannot be cut into its parts")
    parts = []
    start = 0
    for size in sizes:
        pieces = [cut for piece in view.pieces if (cut := _cut(piece, start, start + size))]
        parts.append(View((*view.shape[:rows], size, *view.shape[rows + 1 :]), tuple(pieces), view.stacked))
        start += size
    return parts


def chunk(view: View, count: int, axis: int) -> list[View]:
    """Cut a tensor along its rows into equal parts."""
    if view.rows % count:
        raise RefusalError(f"its {view.rows} rows cannot be cut into {count} equal parts")
    return split(view, [view.rows // count] * count, axis)


def _cut(piece: Piece, low: int, high: int) -> Piece | None:
    """The part of a piece that is in rows [low, high), counted from low; None where there is none."""
    first, last = max(piece.start, low), min(piece.start + piece.rows, high)
    if first >= last:
        return None
    offset, rows, shuffle = first - piece.start, last - first, piece.shuffle
    if shuffle and rows != piece.rows:
        group = shuffle[1] * shuffle[2]
        if offset % group or rows % group:
            raise RefusalError("its rows are interleaved with those of another parameter")
        shuffle = (rows // group, shuffle[1], shuffle[2])
    return piece._replace(start=first - low, rows=rows, stored_start=piece.stored_start + offset, shuffle=shuffle)


def shuffle(view: View, groups: int, a: int, b: int, axis: int) -> View:
    """Reorder rows: the tensor's rows seen as (groups, a, b) become the result's seen as (groups, b, a)."""
    if not _is_row_axis(view, axis):
        raise RefusalError("it is reordered along a dimension other than its rows")
    if min(groups, a, b) <= 0 or groups * a * b != view.rows:
        raise RefusalError(f"its {view.rows} rows cannot be reordered in {groups} groups of {a} × {b}")
    pieces = []
    for piece in view.pieces:
        if piece.start % (a * b) or piece.rows % (a * b):
            raise RefusalError("it is stored in parts that are reordered together")
        mine = (piece.rows // (a * b), a, b)
        if piece.shuffle is None:
            pieces.append(piece._replace(shuffle=None if a == 1 or b == 1 else mine))
        elif piece.shuffle == (mine[0], b, a):
            pieces.append(piece._replace(shuffle=None))
        else:
            raise RefusalError("its rows are reordered twice")
    return View(view.shape, tuple(pieces), view.stacked)


def regions(view: View) -> tuple[Region, ...]:
    """The regions of a view, by expert and row; adjacent pieces are joined."""
    joined: list[Piece] = []
    for piece in sorted(view.pieces, key=lambda piece: (-1 if piece.member is None else piece.member, piece.start)):
        before = joined[-1] if joined else None
        if before and _follows(before, piece):
            joined[-1] = before._replace(rows=before.rows + piece.rows, shuffle=_joined_shuffle(before, piece))
        else:
            joined.append(piece)
    if any(piece.member is not None and piece.slot is not None for piece in joined):
        raise RefusalError("its experts are picked from a stack and stacked again")
    return tuple(
        Region(
            tensor=piece.tensor,
            rows=piece.rows,
            start=piece.start,
            stored_start=piece.stored_start,
            expert=piece.slot if piece.member is None else piece.member,
            orientation=piece.orientation,
            shuffle=piece.shuffle,
        )
        for piece in joined
    )


def _follows(before: Piece, piece: Piece) -> bool:
    adjacent = (before.start + before.rows, before.stored_start + before.rows) == (piece.start, piece.stored_start)
    return adjacent and _kept(before) == _kept(piece)


def _kept(piece: Piece) -> object:
    """The fields that joined pieces have in common."""
    return piece.tensor, piece.member, piece.slot, piece.orientation, piece.shuffle and piece.shuffle[1:]


def _joined_shuffle(before: Piece, piece: Piece) -> tuple[int, int, int] | None:
    if before.shuffle is None or piece.shuffle is None:
        return None
    return (before.shuffle[0] + piece.shuffle[0], *before.shuffle[1:])
