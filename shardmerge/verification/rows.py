"""Choose the rows of a touched tensor that are computed again.

Rows are those of the stored tensor. The sample has at least one row of every run (an expert's rows, or those of one of
several modules that are stored as one tensor), and the first and the last of the tensor. Where a family updates groups
of rows together, the sample consists of whole groups.
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

#: float64 numbers in a window; a larger group of rows is one window.
ELEMENTS = 1 << 17


def all_rows(tensor: TensorPlan, together: int = 1) -> list[RowRange]:
    """All rows, in windows of whole groups; a window is within one run.

    ``together`` is the number of rows that a codec stores as one unit; the last of a run may have fewer.
    """
    most = max(1, ELEMENTS // max(1, tensor.row_elements))
    windows = []
    for run, unit in _runs(tensor, together):
        step = max(1, most // unit) * unit
        windows += [RowRange(at, min(at + step, run.stop)) for at in range(run.start, run.stop, step)]
    return windows


def sampled(tensor: TensorPlan, count: int, seed: int, together: int = 1) -> list[RowRange]:
    """At least ``count`` rows, in windows of whole groups; the same for the same seed and name.

    Adjacent groups of a run are one window. A vector is taken whole: it is small, and an update may show only in its
    length.
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
    """Runs of rows of the same matrices, each with the number of rows that are updated or stored together."""
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
