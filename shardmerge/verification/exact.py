"""W' in float64, and how far from it a right merge may be.

LoRA and its kin are written once more, straight from the definitions and not with the engine's code: W + s·B A, with B
and A from `shardmerge.verification.formulas` and s from `shardmerge.verification.scaling`; and for DoRA m / ‖V‖ · V of
that V.

All other families have their ``apply`` run on rows in float64 (families know no dtype), with factors read by a reader
of this package. So their formula is the merge's own; what is independent is everything around it: reading, tiling,
precision, rounding.

**The bound.** A merge computes with unit roundoff u (2⁻²⁴ in float32) and rounds the result once, by half a unit of
the output's last place. What it computes may differ from the exact value by e:

- A product of rank r: (r + 4)·u·|s|·(|B||A|), in any order of its sum: r roundings of the sum, one of s, one of the
  product with it, two of factors that are stored as float64. Adding it to W: u·|W'|.
- DoRA: the error of V, and |W'|·u·(4 + n/2 + 2) for a norm of n squares. For large n that is 8·√n + 8, as roundings to
  nearest go both ways (Higham and Mary 2019, doi 10.1137/18M1226312). Where W is stored transposed the merge adds the
  squares up in float64, and only V's own error counts.
- Other families: 4·u·(|W| + |W'|) for the element's own operations, and for the sums that made ΔW, whose parts may
  cancel, as many units of ‖ΔW‖ of its row as the family's ``sum_units`` says. Where a family ``mixes_weight``, sums
  have entries of W as terms, and ‖W‖ of the row takes the place of ‖ΔW‖: parts of W cancel there, and the rotation
  itself was computed.
- What copies has no error at all, and neither has what no update reaches: neither goes through the compute dtype.
- What an update computes goes through it before: where its dtype holds more, u of the number.

An error that there was before an update counts on, for DoRA times m / ‖V‖, for other families at most as its row grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import decoded_dtype
from shardmerge.spec.plans import MergePlan, TensorPlan
from shardmerge.spec.tensors import RowRange, dtype_code
from shardmerge.spec.updates import Update
from shardmerge.spec.windows import Position, locate, reaching
from shardmerge.verification.decoders import numbers, source_of
from shardmerge.verification.formulas import FORMULAS, PlainFactors
from shardmerge.verification.reading import Files
from shardmerge.verification.rows import all_rows
from shardmerge.verification.scaling import ScaledBy

#: Unit roundoff by compute dtype, and that of the sums of its products (bf16 products are summed in float32).
_UNITS = {"F64": (2.0**-53, 2.0**-53), "F32": (2.0**-24, 2.0**-24), "BF16": (2.0**-8, 2.0**-24)}
#: What a float64 sum of our own leaves.
_OWN = 2.0**-53
#: Dtypes whose numbers are all numbers of the compute dtype.
_EXACT = {"F64": ("F64", "F32", "F16", "BF16"), "F32": ("F32", "F16", "BF16"), "BF16": ("BF16",)}


class Exact:
    """Computes rows of one touched tensor after the other."""

    def __init__(self, files: Files, plan: MergePlan, adapters: Sequence[ScaledBy]) -> None:
        self._files = files
        self._adapters = adapters
        self._threads = torch.get_num_threads()
        self.compute_dtype = dtype_code(plan.compute_dtype)
        unit, summing = _UNITS[self.compute_dtype]
        self._unit, self._summing = unit + _OWN, summing + _OWN
        self._tensor: TensorPlan | None = None
        self._reaching: Callable[[RowRange], Sequence[Update]] = lambda rows: ()
        self._factors: dict[int, PlainFactors] = {}
        self._lengths: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, tensor: TensorPlan) -> None:
        """Work on a tensor from here on. What needs to see all of its rows first does so now."""
        self._tensor, self._reaching = tensor, reaching(tensor)
        self._factors, self._lengths = {}, {}
        for update in tensor.updates:
            if self._needs_prepass(update):
                for rows in all_rows(tensor):
                    self._prepass(tensor, update, rows)

    def rows(self, rows: RowRange) -> tuple[Tensor, Tensor]:
        """W' and the largest error that its computation may have made, both (rows, row_elements)."""
        assert self._tensor is not None, "begin was not called"
        return self._updated(self._tensor, rows, None)

    # --- one update after the other -----------------------------------------------------------------------------------

    def _updated(self, tensor: TensorPlan, rows: RowRange, until: Update | None) -> tuple[Tensor, Tensor]:
        """W with all updates, or those before ``until``."""
        value = numbers(self._files, source_of(tensor), rows)
        error = torch.zeros_like(value)
        # What is yet to be rounded to the compute dtype, where something is computed of it.
        loose = torch.full_like(value, decoded_dtype(tensor) not in _EXACT[self.compute_dtype], dtype=torch.bool)
        for update in self._reaching(rows):
            if update is until:
                break
            part = locate(tensor, update, rows)
            if part is not None and not _does_nothing(update):
                self._apply(update, part, value, error, loose)
        return value, error

    def _apply(self, update: Update, part: Position, value: Tensor, error: Tensor, loose: Tensor) -> None:
        """Change ``value``, ``error`` and ``loose`` in place by one update."""
        columns = slice(part.columns.start, part.columns.stop)
        view, bound, fresh = value[:, columns], error[:, columns], loose[:, columns]
        if not FAMILIES[update.family].computes:
            self._copy(update, part, view, bound, fresh)
            return
        if bool(fresh.any()):
            bound += torch.where(fresh, view.abs() * self._unit, 0.0)
            fresh.fill_(False)
        if (formula := FORMULAS.get(update.family)) is None:
            self._by_family(update, part, view, bound)
        else:
            view, bound = (part.orientation.view(of) for of in (view, bound))
            self._add(update, part, view, bound)
            if formula.rescales:
                self._rescale(update, part, view, bound)

    def _of(self, update: Update) -> PlainFactors:
        key = id(update)
        if key not in self._factors:
            self._factors[key] = PlainFactors(self._files, update, self._threads)
        return self._factors[key]

    # --- LoRA and DoRA ------------------------------------------------------------------------------------------------

    def _add(self, update: Update, part: Position, view: Tensor, bound: Tensor) -> None:
        """view += s·B A, in matrix orientation."""
        scaling, formula = self._adapters[update.adapter].scaling(update), FORMULAS[update.family]
        b, a = formula.matrices(self._of(update), update, part.window)
        added = (b @ a).mul_(scaling)
        size, terms = (b.abs() @ a.abs()).mul_(abs(scaling)), b.shape[1] if formula.sums else 0
        view += added
        bound += size.mul_(terms * self._summing + 4 * self._unit)
        bound += view.abs().mul_(self._unit)

    def _rescale(self, update: Update, part: Position, view: Tensor, bound: Tensor) -> None:
        """Bring rows to their trained lengths."""
        rows = part.window.rows
        if id(update) in self._lengths:
            squares, wrong = (of[rows.start : rows.stop] for of in self._lengths[id(update)])
            sums = 1.0
        else:
            squares, wrong = view.square().sum(1), bound.square().sum(1)
            count = view.shape[1]
            sums = min(count / 2 + 2, 8 * math.sqrt(count) + 8)
        length = squares.sqrt()
        factor = (self._of(update).rows("magnitude", rows).flatten() / length).view(-1, 1)
        relative = (wrong.sqrt() / length + (sums + 4) * self._unit).view(-1, 1)
        view *= factor
        bound *= factor.abs()
        bound += view.abs() * relative

    # --- families that look at everything first -----------------------------------------------------------------------

    def _needs_prepass(self, update: Update) -> bool:
        if (formula := FORMULAS.get(update.family)) is not None:
            return formula.rescales and update.by_columns
        return FAMILIES[update.family].needs_prepass(update)

    def _prepass(self, tensor: TensorPlan, update: Update, rows: RowRange) -> None:
        part = locate(tensor, update, rows)
        if part is None:
            return
        value, error = self._updated(tensor, rows, update)
        columns = slice(part.columns.start, part.columns.stop)
        view, bound = (part.orientation.view(of[:, columns]) for of in (value, error))
        if update.family not in FORMULAS:
            FAMILIES[update.family].prepass(view, self._of(update), update, part.window, _scratch(view))
            return
        self._add(update, part, view, bound)
        sums = self._lengths.setdefault(id(update), (_zeros(update.rows), _zeros(update.rows)))
        for total, of in zip(sums, (view, bound), strict=True):
            total[part.window.rows.start : part.window.rows.stop] += of.square().sum(1)

    # --- all other families -------------------------------------------------------------------------------------------

    def _copy(self, update: Update, part: Position, view: Tensor, bound: Tensor, fresh: Tensor) -> None:
        before = view.clone()
        self._run(update, part, view)
        changed = view != before
        bound[changed] = 0.0
        fresh[changed] = update.factors[0][1].dtype not in _EXACT[self.compute_dtype]

    def _by_family(self, update: Update, part: Position, view: Tensor, bound: Tensor) -> None:
        before = view.clone()
        self._run(update, part, view)
        was, now = _lengths(before), _lengths(view)
        bound.copy_(_lengths(bound) * (now / was.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=1.0))
        family = FAMILIES[update.family]
        size = torch.maximum(was, now) if family.mixes_weight else _lengths(view - before)
        bound += self._unit * (4 * (before.abs() + view.abs()) + family.sum_units * size)

    def _run(self, update: Update, part: Position, view: Tensor) -> None:
        """The family's own ``apply``, on the matrix's orientation of the rows."""
        # Families may want their tile dense, or seen as the transpose of what is dense.
        dense = view.contiguous()
        tile = part.orientation.view(dense)
        FAMILIES[update.family].apply(tile, self._of(update), update, part.window, _scratch(tile))
        if dense.data_ptr() != view.data_ptr():
            view.copy_(dense)


def _scratch(tile: Tensor) -> Tensor:
    return torch.empty(tile.shape, dtype=tile.dtype)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def _lengths(values: Tensor) -> Tensor:
    """‖·‖ of every stored row, (rows, 1); of a vector, that of the whole."""
    if values.shape[1] == 1:
        return values.square().sum().sqrt().view(1, 1).expand(len(values), 1)
    return values.square().sum(1, keepdim=True).sqrt()


def _does_nothing(update: Update) -> bool:
    """Whether an update leaves a weight whose source is the plan's as it is."""
    family = FAMILIES[update.family]
    return family.is_source or not family.changes_weight


def is_copied(tensor: TensorPlan) -> bool:
    """Whether a tensor's numbers are those of its source, plainly stored, if perhaps in another dtype."""
    return tensor.decoding is None and all(map(_does_nothing, tensor.updates))
