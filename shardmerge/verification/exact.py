"""W' in float64, and how far from it a right merge may be.

Written once more, straight from the definitions, and not with the engine's code:

- ``lora``: W + s·B A; ``lora-experts``, ``lora-blocks``, ``lora-gated``: the same with an expert's or unfolded factors,
  or those of two matrices whose rows are stored in turn; ``lora-bias``:
  b + s·lb; ``dora``: m / ‖V‖ · V with V = W + s·B A. The scaling s comes from `shardmerge.verification.scaling`.

All other families have their ``apply`` run on rows in float64 (families know no dtype), with factors read by a reader
of this room. So their formula is the merge's own; what is independent is everything around it: reading, tiling,
precision, rounding.

**The bound.** A merge computes with unit roundoff u (2⁻²⁴ in float32) and rounds the result once, by half a unit of
the output's last place. What it computes may differ from the exact value by e:

- A product of rank r: (r + 4)·u·|s|·(|B||A|), in any order of its sum: r roundings of the sum, one of s, one of the
  product with it, two of factors that are stored as float64. Adding it to W: u·|W'|.
- DoRA: the error of V, and |W'|·u·(4 + n/2 + 2) for a norm of n squares. For large n that is 8·√n + 8, as roundings to
  nearest go both ways (Higham and Mary 2019, doi 10.1137/18M1226312). Where W is stored transposed the merge adds the
  squares up in float64, and only V's own error counts.
- Other families: 4·u·(|W| + |W'|) for the element's own operations, and `SUMS`·u·‖ΔW‖ of its row for the sums that
  made ΔW, whose parts may cancel. For those in `MIXES`, which sum up entries of W, ‖W‖ of the row takes the place of
  ‖ΔW‖: parts of W cancel there, and the rotation itself was computed. `COARSE` have a larger factor, each with its
  reason.
- What copies has no error at all, and neither has what no update reaches: neither goes through the compute dtype.
- What an update computes goes through it before: where its dtype holds more, u of the number.

An error that there was before an update counts on, for DoRA times m / ‖V‖, for other families at most as its row grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.spec.plans import MergePlan, TensorPlan
from shardmerge.spec.tensors import RowRange, dtype_code
from shardmerge.spec.updates import Update
from shardmerge.spec.windows import Part, locate, reaching
from shardmerge.verification.reading import Factor, Files, threads, wide
from shardmerge.verification.rows import all_rows
from shardmerge.verification.scaling import SCALED, ScaledBy

#: Unit roundoff by compute dtype, and that of the sums of its products (bf16 products are summed in float32).
_UNITS = {"F64": (2.0**-53, 2.0**-53), "F32": (2.0**-24, 2.0**-24), "BF16": (2.0**-8, 2.0**-24)}
#: What a float64 sum of our own leaves.
_OWN = 2.0**-53
#: Dtypes whose numbers are all numbers of the compute dtype.
_EXACT = {"F64": ("F64", "F32", "F16", "BF16"), "F32": ("F32", "F16", "BF16"), "BF16": ("BF16",)}

#: Families that only put other numbers in W's place.
COPIES = frozenset({"overwrite", "token-rows"})
#: Families that do nothing to a weight whose source is the plan's.
NOTHING = frozenset({"replacement", "frozen-copy"})
#: How many units the sums that make ΔW may be off, relative to its row's length. Of all families the tests know, on
#: matrices up to 768 wide, none needs more than 4; the length grows with the width as the sums' errors do.
SUMS = 16
#: Families in whose sums entries of W stand, so that errors are relative to W.
MIXES = frozenset(
    {
        "boft",  # W R, R a product of rotations
        "deft",  # B Q looks at whole columns of W
        "frod",  # W in another basis
        "glora-bias",  # W C
        "hra",  # W H, reflections
        "kasa",  # W is cut
        "miss-bat",  # W times blocks
        "oft",  # W R, rotations
        "osf",  # the smaller part of W is taken away
        "peanut",  # a network looks at W
        "psoft",  # W's subspace is rotated
        "road",  # pairs of W's rows are rotated
    }
)
#: Families with a larger factor than `SUMS`, and why.
COARSE: Mapping[str, int] = {
    # The factors of W's decomposition are rounded to W's 16 bits. Where LAPACK gives another last bit than it gave the
    # merge (another CPU, another number of threads), some of them are rounded to the other side.
    "osf": 1024,
    # For the same reason, but here it is W itself that is rounded: the larger entries of a row move by a whole unit.
    "kasa": 4096,
}


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
            if self._surveys(update):
                for rows in all_rows(tensor):
                    self._survey(tensor, update, rows)

    def rows(self, rows: RowRange) -> tuple[Tensor, Tensor]:
        """W' and the largest error that its computation may have made, both (rows, row_elements)."""
        if self._tensor is None:
            raise AssertionError("begin was not called")
        return self._updated(self._tensor, rows, None)

    # --- one update after the other -----------------------------------------------------------------------------------

    def _updated(self, tensor: TensorPlan, rows: RowRange, until: Update | None) -> tuple[Tensor, Tensor]:
        """W with all updates, or those before ``until``."""
        source = tensor.source
        value = wide(self._files.rows(source, rows, tensor.row_elements))
        error = torch.zeros_like(value)
        # What is yet to be rounded to the compute dtype, where something is computed of it.
        loose = torch.full_like(value, source.dtype not in _EXACT[self.compute_dtype], dtype=torch.bool)
        for update in self._reaching(rows):
            if update is until:
                break
            part = locate(tensor, update, rows)
            if part is not None and update.family not in NOTHING:
                self._apply(update, part, value, error, loose)
        return value, error

    def _apply(self, update: Update, part: Part, value: Tensor, error: Tensor, loose: Tensor) -> None:
        """Change ``value``, ``error`` and ``loose`` in place by one update."""
        columns = slice(part.columns.start, part.columns.stop)
        view, bound, fresh = value[:, columns], error[:, columns], loose[:, columns]
        if update.family in COPIES:
            self._copy(update, part, view, bound, fresh)
            return
        if bool(fresh.any()):
            bound += torch.where(fresh, view.abs() * self._unit, 0.0)
            fresh.fill_(False)
        if update.family not in SCALED:
            self._by_family(update, part, view, bound)
        else:
            view, bound = (of.T if part.transposed else of for of in (view, bound))
            self._add(update, part, view, bound)
            if update.family == "dora":
                self._rescale(update, part, view, bound)

    def _of(self, update: Update) -> PlainFactors:
        key = id(update)
        if key not in self._factors:
            self._factors[key] = PlainFactors(self._files, update, self._threads)
        return self._factors[key]

    # --- LoRA and DoRA ------------------------------------------------------------------------------------------------

    def _add(self, update: Update, part: Part, view: Tensor, bound: Tensor) -> None:
        """view += s·B A, in matrix orientation."""
        scaling = self._adapters[update.adapter].scaling(update)
        if update.family == "lora-bias":
            added = scaling * self._of(update).rows("bias", part.window.rows).view(-1, 1)
            size, terms = added.abs(), 0
        else:
            b, a = self._matrices(update, part)
            added = (b @ a).mul_(scaling)
            size, terms = (b.abs() @ a.abs()).mul_(abs(scaling)), b.shape[1]
        view += added
        bound += size.mul_(terms * self._summing + 4 * self._unit)
        bound += view.abs().mul_(self._unit)

    def _matrices(self, update: Update, part: Part) -> tuple[Tensor, Tensor]:
        """B (rows, r) and A (r, columns) of a window."""
        factors, window = self._of(update), part.window
        if update.family == "lora-experts":
            return self._of_expert(update, part)
        if update.family == "lora-gated":
            return self._of_two(update, part)
        if update.family == "lora-blocks":
            unfolded = {role: factors.whole(role) for role in "AB"}
            diagonal, blocks = update.setting("diagonal"), update.setting("blocks")
            unfolded[diagonal] = _block_diagonal(unfolded[diagonal].chunk(blocks))
            rows = factors.matrix_rows(window.rows)
            return unfolded["B"][rows], unfolded["A"][:, window.columns.start : window.columns.stop]
        return factors.rows("B", window.rows).flatten(1), factors.columns("A", window.columns)

    def _of_expert(self, update: Update, part: Part) -> tuple[Tensor, Tensor]:
        """A's rows e·r and following; B's columns, of PEFT every E-th from the e-th, of unsloth's r from the e·r-th."""
        factors, window, rank = self._of(update), part.window, update.rank
        first = window.expert * rank
        a = factors.plain_rows("A", RowRange(first, first + rank))[:, window.columns.start : window.columns.stop]
        b = factors.whole("B")[factors.matrix_rows(window.rows)]
        if update.setting("layout") == "unsloth":
            return b[:, first : first + rank], a
        return b[:, window.expert :: update.experts], a

    def _of_two(self, update: Update, part: Part) -> tuple[Tensor, Tensor]:
        """Gate's A above up's; B with a row of gate's, then one of up's, each beside zeros."""
        factors, window = self._of(update), part.window
        pairs = [(offset, end) for offset, end in ((0, ""), (1, "_up")) if update.has(f"A{end}")]
        a = torch.cat([factors.whole(f"A{end}") for _, end in pairs])
        b = torch.zeros(update.rows, len(a), dtype=a.dtype)
        column = 0
        for offset, end in pairs:
            one = factors.whole(f"B{end}")
            b[offset::2, column : column + one.shape[1]] = one
            column += one.shape[1]
        return b[factors.matrix_rows(window.rows)], a[:, window.columns.start : window.columns.stop]

    def _rescale(self, update: Update, part: Part, view: Tensor, bound: Tensor) -> None:
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

    def _surveys(self, update: Update) -> bool:
        if update.family == "dora":
            return update.by_columns
        return update.family not in SCALED and FAMILIES[update.family].surveys(update)

    def _survey(self, tensor: TensorPlan, update: Update, rows: RowRange) -> None:
        part = locate(tensor, update, rows)
        if part is None:
            return
        value, error = self._updated(tensor, rows, update)
        columns = slice(part.columns.start, part.columns.stop)
        view, bound = (of[:, columns].T if part.transposed else of[:, columns] for of in (value, error))
        if update.family != "dora":
            FAMILIES[update.family].survey(view, self._of(update), update, part.window, _scratch(view))
            return
        self._add(update, part, view, bound)
        sums = self._lengths.setdefault(id(update), (_zeros(update.rows), _zeros(update.rows)))
        for total, of in zip(sums, (view, bound), strict=True):
            total[part.window.rows.start : part.window.rows.stop] += of.square().sum(1)

    # --- all other families -------------------------------------------------------------------------------------------

    def _copy(self, update: Update, part: Part, view: Tensor, bound: Tensor, fresh: Tensor) -> None:
        before = view.clone()
        self._run(update, part, view)
        changed = view != before
        bound[changed] = 0.0
        fresh[changed] = update.factors[0][1].dtype not in _EXACT[self.compute_dtype]

    def _by_family(self, update: Update, part: Part, view: Tensor, bound: Tensor) -> None:
        before = view.clone()
        self._run(update, part, view)
        was, now = _lengths(before), _lengths(view)
        bound.copy_(_lengths(bound) * (now / was.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=1.0))
        size = torch.maximum(was, now) if update.family in MIXES else _lengths(view - before)
        sums = COARSE.get(update.family, SUMS)
        bound += self._unit * (4 * (before.abs() + view.abs()) + sums * size)

    def _run(self, update: Update, part: Part, view: Tensor) -> None:
        """The family's own ``apply``, on the matrix's orientation of the rows."""
        # Families may want their tile dense, or seen as the transpose of what is dense.
        dense = view.contiguous()
        tile = dense.T if part.transposed else dense
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


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


class PlainFactors:
    """The factors of one update, in float64; see `shardmerge.adapters.methods.base.Factors`."""

    def __init__(self, files: Files, update: Update, threads_of_torch: int = 1) -> None:
        self._update = update
        self._threads = threads_of_torch
        self._factors = {role: Factor(files, ref) for role, ref in update.factors}
        self._kept: dict[str, Tensor] = {}

    def whole(self, role: str) -> Tensor:
        return self._factors[role].whole()

    def as_stored(self, role: str) -> Tensor:
        return self.whole(role)

    def rows(self, role: str, rows: RowRange) -> Tensor:
        if self._update.place.shuffle is not None:
            return self.whole(role)[self.matrix_rows(rows)]
        return self._factors[role].rows(rows)

    def plain_rows(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a factor whose rows are not the matrix's."""
        return self._factors[role].rows(rows)

    def columns(self, role: str, columns: RowRange) -> Tensor:
        return self._factors[role].columns(columns)

    def kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if name not in self._kept:
            # A decomposition's bits depend on the threads; the merge makes them with all that torch takes by itself.
            with threads(self._threads):
                self._kept[name] = build()
        return self._kept[name]

    def matrix_rows(self, rows: RowRange) -> Tensor:
        """The matrix's rows at these places, which count stored rows from the place's start.

        Stored rows seen as (g, a, b) are the matrix's rows seen as (g, b, a).
        """
        place = self._update.place
        if place.shuffle is None:
            return torch.arange(rows.start, rows.stop)
        groups, outer, inner = place.shuffle
        order = torch.arange(place.rows).view(groups, inner, outer).transpose(1, 2).reshape(-1)
        return place.start + order[rows.start - place.start : rows.stop - place.start]


def is_copied(tensor: TensorPlan) -> bool:
    """Whether a tensor's numbers are those of its source, if perhaps in another dtype."""
    return all(update.family in NOTHING for update in tensor.updates)
