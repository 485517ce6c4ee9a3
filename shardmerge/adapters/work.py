"""What work a tensor needs: whether it goes through tiles, in which dtype, and what every update must be given of it.

Updates are of three sorts. What *computes* works in the compute dtype. What *copies* (a tensor or rows of an adapter)
or *compares* (a frozen copy) has numbers as they are stored: on their way into the output they are rounded once at
most, whatever the compute dtype is, and so are elements of the base that no update reaches. So where not every element
is computed, a tile is kept in a dtype that holds all of them, and what computes is given its part in its own.

One capability says what can be worked on at all: a family's ``weights``. It is asked when an update is matched (see
`adapters.methods.base.check_dtypes`), and `needs_work` then asks nothing more: what an update is to change is worked
on. `missing` is how the engine proves that all of it was.
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
    """Whether an update is done in that the adapter's tensor is what the output is made of."""
    if not FAMILIES[update.family].is_source:
        return False
    whole = update.factors[0][1]
    return (whole.uri, whole.offset, whole.dtype) == (tensor.source.uri, tensor.source.offset, tensor.source.dtype)


def needs_work(tensor: TensorPlan) -> bool:
    """Whether a tensor goes through a float, rather than as bytes."""
    is_plain = tensor.encoding is None and tensor.decoding is None
    if tensor.source.dtype != tensor.out.dtype if is_plain else not encoder(tensor).keeps(tensor):
        return True
    if any(not FAMILIES[update.family].is_source for update in tensor.updates):
        return True
    # A whole tensor of an adapter's is looked at, as it may hold NaN. Numbers that are not floats cannot.
    return bool(tensor.updates) and tensor.source.dtype in FLOAT_DTYPES


# --- the dtype --------------------------------------------------------------------------------------------------------


def decoded_dtype(tensor: TensorPlan) -> str:
    """The dtype that holds what the source's values are."""
    return tensor.source.dtype if tensor.decoding is None else decoder(tensor).values


def tile_dtype(tensor: TensorPlan, compute_dtype: str) -> str:
    """What a tile of the tensor is kept in.

    Where its dtype is only converted, or its values only compared, F32 holds all of what the three float dtypes can.
    """
    if not any(FAMILIES[update.family].changes_weight for update in tensor.updates):
        return _widest("F32", *(["F64"] if decoded_dtype(tensor) == "F64" else []))
    widest = _widest(compute_dtype, "F32", *_copied_dtypes(tensor))
    if widest == compute_dtype or not is_computed_everywhere(tensor):
        return widest
    return compute_dtype


def narrow_dtype(tensor: TensorPlan, compute_dtype: str) -> str | None:
    """What updates that compute are given their part of a tile in, where that is not the tile's own dtype."""
    computes = any(FAMILIES[update.family].computes for update in tensor.updates)
    return compute_dtype if computes and tile_dtype(tensor, compute_dtype) != compute_dtype else None


def dtype_for(update: Update, tensor: TensorPlan, compute_dtype: str) -> str:
    """What an update has its factors in."""
    return compute_dtype if FAMILIES[update.family].computes else tile_dtype(tensor, compute_dtype)


def is_computed_everywhere(tensor: TensorPlan) -> bool:
    """Whether updates that compute reach every element, and no others do."""
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
    """The dtypes of numbers that may come into the output as they are stored."""
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


# --- what must be done ------------------------------------------------------------------------------------------------


def elements_for(tensor: TensorPlan, update: Update) -> int:
    """How many elements of the output are at an update's place, by the plan and not by the tiles."""
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
    """What the plan lists for a tensor and was not done; empty where all was.

    ``done`` says how many elements an update was given.
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
