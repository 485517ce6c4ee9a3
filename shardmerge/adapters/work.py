"""The work that a tensor needs: whether it goes through tiles, in which dtype, and how much of it each update changes.

Some updates *compute*, in the compute dtype. Others *copy* a tensor or rows of an adapter, or *compare* a frozen copy:
their numbers, and those that no update reaches, are rounded once at most, whatever the compute dtype is. So where not
every element is computed, a tile is kept in a dtype that holds all of them, and updates that compute get a copy of
their part.

Whether a weight can be updated at all is checked when an update is matched (`adapters.methods.base.check_dtypes`). By
`missing` the engine proves that every update was applied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.registry import decoder, encoder
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, FACTOR_DTYPES, FLOAT_DTYPES, Orientation, RowRange
from shardmerge.spec.updates import Update
from shardmerge.spec.windows import boundaries, locate, reaching


def is_source(tensor: TensorPlan, update: Update) -> bool:
    """Whether the plan has applied an update by taking the adapter's tensor as the source."""
    if not FAMILIES[update.family].is_source:
        return False
    whole = update.factors[0][1]
    return (whole.uri, whole.offset, whole.dtype) == (tensor.source.uri, tensor.source.offset, tensor.source.dtype)


def needs_work(tensor: TensorPlan) -> bool:
    """Whether a tensor goes through tiles, rather than as bytes."""
    is_plain = tensor.encoding is None and tensor.decoding is None
    if tensor.source.dtype != tensor.out.dtype if is_plain else not encoder(tensor).keeps(tensor):
        return True
    for update in tensor.updates:
        if not FAMILIES[update.family].is_source:
            return True
    # An adapter's whole tensor may hold NaN. Numbers that are not floats cannot.
    return bool(tensor.updates) and tensor.source.dtype in FLOAT_DTYPES


def decoded_dtype(tensor: TensorPlan) -> str:
    """The dtype of the source's decoded values."""
    return tensor.source.dtype if tensor.decoding is None else decoder(tensor).values


def tile_dtype(tensor: TensorPlan, compute_dtype: str) -> str:
    """The dtype of a tensor's tiles. Where values are only converted or compared, F32 holds all but F64."""
    if not any(FAMILIES[update.family].changes_weight for update in tensor.updates):
        return _widest("F32", *(["F64"] if decoded_dtype(tensor) == "F64" else []))
    widest = _widest(compute_dtype, "F32", *_copied_dtypes(tensor))
    if widest == compute_dtype or not is_computed_everywhere(tensor):
        return widest
    return compute_dtype


def narrow_dtype(tensor: TensorPlan, compute_dtype: str) -> str | None:
    """The dtype of the parts of a tile that updates compute with, where it is not the tile's."""
    computes = any(FAMILIES[update.family].computes for update in tensor.updates)
    return compute_dtype if computes and tile_dtype(tensor, compute_dtype) != compute_dtype else None


def dtype_for(update: Update, tensor: TensorPlan, compute_dtype: str) -> str:
    """The dtype of an update's factors."""
    return compute_dtype if FAMILIES[update.family].computes else tile_dtype(tensor, compute_dtype)


def is_computed_everywhere(tensor: TensorPlan) -> bool:
    """Whether updates that compute reach every element, and other updates none."""
    if any(not FAMILIES[update.family].computes and not is_source(tensor, update) for update in tensor.updates):
        return False
    of = reaching(tensor)
    runs = (RowRange(start, start + 1) for start, stop in itertools.pairwise(boundaries(tensor)) if start < stop)
    return all(_covers(tensor, of(run), run) for run in runs)


def _covers(tensor: TensorPlan, updates: Iterable[Update], row: RowRange) -> bool:
    """Whether updates that compute reach all columns of a row."""
    parts = (locate(tensor, update, row) for update in updates if FAMILIES[update.family].computes)
    at = 0
    for part in sorted((part.columns for part in parts if part is not None), key=lambda part: part.start):
        if part.start > at:
            return False
        at = max(at, part.stop)
    return at >= tensor.row_elements


def _copied_dtypes(tensor: TensorPlan) -> list[str]:
    """The dtypes of numbers that may be copied to the output."""
    copying = [FAMILIES[update.family] for update in tensor.updates]
    factors = [
        ref.dtype
        for family, update in zip(copying, tensor.updates, strict=True)
        if family.changes_weight and not family.computes and not family.is_source
        for _, ref in update.factors
    ]
    return [dtype for dtype in (decoded_dtype(tensor), *factors) if dtype in FACTOR_DTYPES]


def _widest(*dtypes: str) -> str:
    return max(dtypes, key=lambda dtype: DTYPE_BITS[dtype])


def elements_for(tensor: TensorPlan, update: Update) -> int:
    """How many elements of the output are in an update's region, by the plan and not by the tiles."""
    region, width = update.region, tensor.row_elements
    first, last = tensor.first_row, tensor.first_row + tensor.rows
    if region.orientation is Orientation.TRANSPOSED and tensor.row_dims == 1:
        return (last - first) * region.rows
    if tensor.row_dims == 1:
        return _common(region.stored_start, region.stored_start + region.rows, first, last) * width
    experts, height = tensor.source.shape[:2]
    begin, end, columns = region.stored_start, region.stored_start + region.rows, width
    if region.orientation is Orientation.TRANSPOSED:
        begin, end, columns = 0, height, region.rows
    chosen = range(experts) if region.expert is None else (region.expert,)
    return sum(_common(e * height + begin, e * height + end, first, last) for e in chosen) * columns


def _common(start: int, stop: int, first: int, last: int) -> int:
    return max(0, min(stop, last) - max(start, first))


def missing(tensor: TensorPlan, done: Callable[[Update], int]) -> str:
    """The first update of a tensor that was not applied to all of its region, for a message; empty if there is none.

    ``done``: the number of elements that an update was applied to.
    """
    for update in tensor.updates:
        if is_source(tensor, update):
            continue
        expected, found = elements_for(tensor, update), done(update)
        if found != expected or FAMILIES[update.family].is_source:
            return (
                f"{tensor.source.name}: the plan has {update.family} of {update.module} for {expected:,} of its "
                f"{math.prod(tensor.out.shape):,} elements, and {found:,} were given to it"
            )
    return ""
