"""W' in float64, and how far a correct merge may be from it.

LoRA and its relatives are implemented a second time here, from their definitions: W + s·B A, with B and A from
`shardmerge.verification.formulas` and s from `shardmerge.verification.scaling`; and for DoRA m / ‖V‖ · V of that V.

Of all other families the merge's own ``apply`` runs, on rows in float64 and with factors that this package reads. Their
formula is not checked by a second implementation; reading, tiling, precision and rounding are.

**The bound.** A merge computes with unit roundoff u (2⁻²⁴ in float32) and rounds the result once, by half a unit in the
last place of the output's dtype. Before that rounding, the computed value may differ from the exact one by e:

- A product of rank r: (r + 4)·u·|s|·(|B||A|), in any order of its sum: r roundings of the sum, one of s, one of the
  product with it, two of factors that are stored as float64. Adding it to W: u·|W'|.
- DoRA: the error of V, and |W'|·u·(4 + n/2 + 2) for a norm of n squares. For large n it is 8·√n + 8 instead of n/2 + 2,
  since errors of rounding to nearest cancel (Higham and Mary 2019, doi 10.1137/18M1226312). Where W is stored
  transposed the merge sums the squares in float64, and only V's own error counts.
- Other families: 4·u·(|W| + |W'|) for operations on single elements; and, for the sums that made ΔW, ``sum_units`` of
  the family times u·‖ΔW‖ of the row, since terms of a sum may cancel. Where a family ``mixes_weight``, entries of W are
  terms of the sums, and ‖W‖ of the row replaces ‖ΔW‖: then parts of W cancel, and the rotation itself was computed.
- The base that ``base_rounding`` rounds has no error: `shardmerge.verification.base_rounding` computes the same bits.
- A copy has no error, and neither has a row that no update reaches: neither goes through the compute dtype.
- A weight that an update computes with is first rounded to the compute dtype: u·|W| where its own dtype is wider.

An error from before an update is carried on: for DoRA times m / ‖V‖, for other families at most as the row grows.
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
from shardmerge.verification.base_rounding import RoundedBase
from shardmerge.verification.decoders import numbers, source_of
from shardmerge.verification.formulas import FORMULAS, PlainFactors
from shardmerge.verification.reading import Files
from shardmerge.verification.rows import all_rows
from shardmerge.verification.scaling import ScaledBy

#: Unit roundoff by compute dtype: of an operation, and of a sum of products (bf16 products are summed in float32).
_UNITS = {"F64": (2.0**-53, 2.0**-53), "F32": (2.0**-24, 2.0**-24), "BF16": (2.0**-8, 2.0**-24)}
#: Unit roundoff of the float64 sums made here.
_OWN = 2.0**-53
#: Dtypes that convert to the compute dtype without rounding.
_EXACT = {"F64": ("F64", "F32", "F16", "BF16"), "F32": ("F32", "F16", "BF16"), "BF16": ("BF16",)}


class Exact:
    """Compute rows of touched tensors, one tensor after the other."""

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
        self._rounded: dict[int, RoundedBase] = {}

    def begin(self, tensor: TensorPlan) -> None:
        """Select a tensor, and run the passes over all of its rows that some updates need first."""
        self._tensor, self._reaching = tensor, reaching(tensor)
        self._factors, self._lengths, self._rounded = {}, {}, {}
        for update in tensor.updates:
            if self._needs_prepass(update):
                for rows in all_rows(tensor):
                    self._prepass(tensor, update, rows)

    def rows(self, rows: RowRange) -> tuple[Tensor, Tensor]:
        """W' and the largest error that its computation may have made, both (rows, row_elements)."""
        assert self._tensor is not None, "begin was not called"
        return self._updated(self._tensor, rows, None)

    def _updated(self, tensor: TensorPlan, rows: RowRange, until: Update | None) -> tuple[Tensor, Tensor]:
        """W with all updates, or those before ``until``."""
        value = numbers(self._files, source_of(tensor), rows)
        error = torch.zeros_like(value)
        # Numbers that are not rounded to the compute dtype yet: an update that computes with them does that first.
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
        if not FAMILIES[update.family].is_of_adapter:
            view.copy_(self._round(update).rows(view, part.window.rows.start))
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
        """Scale rows to their trained lengths."""
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

    def _round(self, update: Update) -> RoundedBase:
        key = id(update)
        if key not in self._rounded:
            self._rounded[key] = RoundedBase(update)
        return self._rounded[key]

    def _needs_prepass(self, update: Update) -> bool:
        if not FAMILIES[update.family].is_of_adapter:
            return self._round(update).must_see_all
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
        if not FAMILIES[update.family].is_of_adapter:
            self._round(update).see(view, part.window.rows.start)
            return
        if update.family not in FORMULAS:
            FAMILIES[update.family].prepass(view, self._of(update), update, part.window, view.new_empty(view.shape))
            return
        self._add(update, part, view, bound)
        zeros = torch.zeros(2, update.rows, dtype=torch.float64)
        sums = self._lengths.setdefault(id(update), (zeros[0], zeros[1]))
        for total, of in zip(sums, (view, bound), strict=True):
            total[part.window.rows.start : part.window.rows.stop] += of.square().sum(1)

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
        # Families expect a tile that is contiguous, or whose transpose is.
        dense = view.contiguous()
        tile = part.orientation.view(dense)
        FAMILIES[update.family].apply(tile, self._of(update), update, part.window, tile.new_empty(tile.shape))
        if dense.data_ptr() != view.data_ptr():
            view.copy_(dense)


def _lengths(values: Tensor) -> Tensor:
    """‖·‖ of every stored row, (rows, 1); of a vector, the norm of the whole."""
    if values.shape[1] == 1:
        return values.square().sum().sqrt().view(1, 1).expand(len(values), 1)
    return values.square().sum(1, keepdim=True).sqrt()


def _does_nothing(update: Update) -> bool:
    """Whether an update leaves a weight as the plan's source has it."""
    family = FAMILIES[update.family]
    return family.is_source or not family.changes_weight


def is_copied(tensor: TensorPlan) -> bool:
    """Whether a tensor holds the numbers of its source, perhaps in another plain dtype."""
    return tensor.decoding is None and all(map(_does_nothing, tensor.updates))
