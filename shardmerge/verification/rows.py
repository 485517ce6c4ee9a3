"""Chooses the rows of a touched tensor that are computed again.

Rows are those of the stored tensor. Of every run of rows (an expert's, those of one of several modules that are stored
as one tensor) at least one is taken, and of the whole tensor the first and the last. Some families update groups of
rows together; then whole groups are taken.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator

from shardmerge.adapters.registry import FAMILIES
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.windows import boundaries, locate, reaching

#: float64 numbers that are worked on at a time; a group of rows that is larger is worked on whole.
ELEMENTS = 1 << 17


def all_rows(tensor: TensorPlan, together: int = 1) -> list[RowRange]:
    """Every row, in windows within a run that hold whole groups.

    ``together`` are rows that a codec stores as one; the last of a run may be fewer.
    """
    most = max(1, ELEMENTS // max(1, tensor.row_elements))
    windows = []
    for run, unit in _runs(tensor, together):
        step = max(1, most // unit) * unit
        windows += [RowRange(at, min(at + step, run.stop)) for at in range(run.start, run.stop, step)]
    return windows


def sampled(tensor: TensorPlan, count: int, seed: int, together: int = 1) -> list[RowRange]:
    """``count`` rows or some more, in windows of whole groups; the same for the same seed and name.

    Those of a run that follow each other are one window: a small tensor, of which all rows are taken, is one. A vector
    is taken whole: it is small, and what is added to it may show only in its length.
    """
    if tensor.row_elements == 1:
        return all_rows(tensor, together)
    runs = list(_runs(tensor, together))
    groups = [-(-len(run) // unit) for run, unit in runs]
    ends = list(itertools.accumulate(groups))
    total = ends[-1] if ends else 0
    chooser = random.Random(f"{seed}:{tensor.source.name}")
    rows_each = max((unit for _, unit in runs), default=1)
    wanted = math.ceil(count / rows_each)
    chosen = {0, total - 1} if total else set()
    chosen |= {end - chooser.randint(1, size) for end, size in zip(ends, groups, strict=True) if size}
    others = chooser.sample(range(total), min(total, wanted))
    while others and len(chosen) < wanted:
        chosen.add(others.pop())
    most = max(1, ELEMENTS // tensor.row_elements) if tensor.row_elements else 1
    windows: list[RowRange] = []
    for index in sorted(chosen):
        number = bisect.bisect_right(ends, index)
        run, unit = runs[number]
        start = run.start + (index - (ends[number] - groups[number])) * unit
        stop = min(start + unit, run.stop)
        if windows and run.start < start == windows[-1].stop and stop - windows[-1].start <= most:
            windows[-1] = RowRange(windows[-1].start, stop)
        else:
            windows.append(RowRange(start, stop))
    return windows


def _runs(tensor: TensorPlan, together: int) -> Iterator[tuple[RowRange, int]]:
    """Runs of rows that belong to the same matrices, and how many rows of each are updated or stored together."""
    if not tensor.rows:
        return
    of = reaching(tensor)
    for start, stop in itertools.pairwise(boundaries(tensor)):
        here = RowRange(start, start + 1)
        units = [
            FAMILIES[update.family].row_unit(update)
            for update in of(here)
            if not update.by_columns and locate(tensor, update, here)
        ]
        unit = math.lcm(*units)
        is_whole = (stop - start) % unit == 0
        yield RowRange(start, stop), math.lcm(unit, together) if is_whole else stop - start
