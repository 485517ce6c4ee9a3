"""The seam of an adapter family: what an update does to a weight, and its traits.

A family's ``apply`` changes a window of a module's matrix in place. So families that rescale, multiply or rotate fit as
well as those that add a delta. Families do no I/O: `Factors` reads lazily. `shardmerge.adapters.registry` registers a
family by its name, which only its own module compares.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import ClassVar, Protocol

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import (
    FACTOR_DTYPES,
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    Orientation,
    RowRange,
    TensorRef,
    even_rows,
    transposed_if,
)
from shardmerge.spec.updates import Parameter, Update, Window


class Factors(Protocol):
    """The factors of an update, in the compute dtype and on the compute device."""

    def whole(self, role: str) -> Tensor:
        """The whole factor, read once for a weight."""

    def as_stored(self, role: str) -> Tensor:
        """The whole factor in the dtype of its file, on the CPU."""

    def rows(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a factor whose first dimension is the matrix's rows; only these are in memory."""

    def columns(self, role: str, columns: RowRange) -> Tensor:
        """Columns of a factor (r, columns) whose last dimension is the matrix's columns; only these are in memory."""

    def kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        """The result of ``build``, which is called once for a weight."""


class Effect(IntEnum):
    """What a family does to a weight. Of one adapter's updates of a weight, the smaller comes first."""

    #: Compares the weight with the adapter's copy, and changes nothing.
    COMPARES = 0
    #: Replaces the weight by the adapter's tensor.
    REPLACES = 1
    #: Replaces some rows by the adapter's.
    REPLACES_ROWS = 2
    #: Computes new numbers, in the compute dtype.
    COMPUTES = 3


class Family(ABC):
    """One kind of update. Instances have no state."""

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.COMPUTES
    #: Whether an adapter has it. What our config asks for is done to the base, and is no update of an adapter's.
    is_of_adapter: ClassVar[bool] = True
    #: Factors of which only a tile's rows are in memory, and of which only its columns where W is stored transposed.
    #: All others are kept whole while a weight is merged.
    by_rows: ClassVar[frozenset[str]] = frozenset()
    by_columns: ClassVar[frozenset[str]] = frozenset()
    #: Factors that are kept in the dtype of their file. Those that several weights share may stay in memory.
    as_stored: ClassVar[frozenset[str]] = frozenset()
    #: Factors that ``apply`` reads a few rows at a time. `kept_bytes` counts the most that are in memory.
    streamed: ClassVar[frozenset[str]] = frozenset()
    #: Factors that may be integers, such as indices.
    whole_numbers: ClassVar[frozenset[str]] = frozenset()
    #: If all of these factors are zero, the update does nothing. Empty where no factor has that meaning.
    neutral_if_zero: ClassVar[frozenset[str]] = frozenset()
    #: Whether the plan takes the adapter's tensor as the source, so that nothing is left to do by tile.
    is_source: ClassVar[bool] = False
    #: The dtypes of the stored weights that it can update.
    weights: ClassVar[frozenset[str]] = frozenset(FLOAT_DTYPES)
    #: Whether ``apply`` asks `Factors.kept` to build something; no other thread computes then.
    builds: ClassVar[bool] = False
    #: Whether ``apply`` takes a window of all rows and some columns, as a transposed W needs it.
    by_column_windows: ClassVar[bool] = False
    #: The factor whose first dimension is W's outputs, and the one whose last dimension is the inputs, each "" where no
    #: factor shows it; see `oriented`. None: the update is of the matrix (out, in) in any model.
    sides: ClassVar[tuple[str, str] | None] = None
    #: Whether rows are updated independently, so that they may be stored in another order.
    rows_are_independent: ClassVar[bool] = False
    #: Whether it only adds, so that a weight in the config scales it.
    adds: ClassVar[bool] = False
    #: Whether its scaling is LoRA's α / r, so that an alpha or scaling in our config sets it.
    scales_by_alpha: ClassVar[bool] = False
    #: Whether our config's ``expert_layout`` says how its factors are laid out.
    has_expert_layout: ClassVar[bool] = False
    #: Whether it takes the vectors of experts, (E, n), for one matrix.
    stacks_vectors: ClassVar[bool] = False
    #: Whether sums in it have entries of W as terms, so that its rounding errors are relative to W and not to ΔW.
    mixes_weight: ClassVar[bool] = False
    #: How many units of rounding its sums may be off, relative to a row's length. In the tests, on matrices up to 768
    #: wide, no family without a decomposition needs more than 4.
    sum_units: ClassVar[int] = 16

    @property
    def computes(self) -> bool:
        """Whether it computes numbers, rather than copies or compares them as they are stored."""
        return self.effect is Effect.COMPUTES

    @property
    def changes_weight(self) -> bool:
        """Whether it changes W at all."""
        return self.effect is not Effect.COMPARES

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """Decide the update's orientation; a string says why it is unknown."""
        if self.sides is None:
            return update
        outputs, inputs = (update.factor(role).shape if update.has(role) else None for role in self.sides)
        rows = None if outputs is None else (*outputs, 0)[0]
        return oriented(update, parameter, rows, None if inputs is None else (0, *inputs)[-1])

    def as_applied(self, update: ModuleUpdate, *, can_be_source: bool) -> ModuleUpdate:
        """The update as it is applied. ``can_be_source``: whether the base stores the weight plainly, as one tensor."""
        return update

    @abstractmethod
    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        """Why the factors do not fit the parameter, of ``shape`` as the method speaks of it."""

    @abstractmethod
    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        """Change ``tile``, the window of the matrix as (rows, columns) in the compute dtype, in place.

        ``scratch`` has the tile's shape and dtype, is dense, and may be overwritten. The tile may be a transposed view.
        """

    def needs_prepass(self, update: Update) -> bool:
        """Whether `prepass` must see every tile before the first is changed."""
        return False

    def prepass(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        """See a tile before any is changed; it may be overwritten."""
        raise NotImplementedError

    def row_unit(self, update: Update | ModuleUpdate) -> int:
        """How many rows are updated together; a tile of rows holds whole groups."""
        return 1

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        """Bytes of what `Factors.kept` keeps, and of what ``apply`` takes besides ``scratch``."""
        return 0


#: By name; `shardmerge.adapters.registry` fills this.
FAMILIES: dict[str, Family] = {}


# --- the arithmetic that families share -------------------------------------------------------------------------------


def add_scaled(tile: Tensor, product: Tensor, scaling: float) -> None:
    """Add s · ``product``, which may be overwritten. The product is rounded, then the sum, as in PEFT.

    Torch's ``add_(alpha=s)`` may round once, by a fused multiply-add. If s is 1, 2, 4, 8 … s · x is exact: then it has
    the same bits, in one pass less.
    """
    if scaling >= 1 and math.frexp(scaling)[0] == 0.5:
        tile.add_(product, alpha=scaling)
    else:
        tile.add_(product.mul_(scaling))


#: The fewest rows whose product has the bits of the whole; see `shardmerge.planning.tiling`.
_SLAB_ROWS = 16
#: The same where to make a part costs as much as to multiply it.
PART_ROWS = 64
_SLAB_ELEMENTS = 1 << 14


def parts_of(rows: RowRange, least: int = PART_ROWS) -> Iterator[tuple[slice, RowRange]]:
    """Cut rows into parts of ``least`` to twice as many: the slice of a tile of ``rows``, and the matrix's rows."""
    for part in even_rows(len(rows), max(1, len(rows) // least)):
        yield slice(part.start, part.stop), RowRange(rows.start + part.start, rows.start + part.stop)


def slabs(rows: RowRange, columns: int) -> Iterator[tuple[slice, RowRange]]:
    """The same, of so few rows that their memory beside ``scratch`` does not count."""
    return parts_of(rows, max(_SLAB_ROWS, _SLAB_ELEMENTS // max(1, columns)))


def slab_elements(columns: int) -> int:
    """The most elements that a slab has."""
    return 2 * max(_SLAB_ROWS * columns, _SLAB_ELEMENTS)


# --- the checks that families share -----------------------------------------------------------------------------------


def misshaped(ref: TensorRef, expected: tuple[int, ...], meaning: str) -> list[str]:
    """Why a factor does not have the expected shape."""
    return [] if ref.shape == expected else [f"{ref.name} is {list(ref.shape)}; expected {list(expected)}, {meaning}"]


def all_misshaped(update: ModuleUpdate, expected: Mapping[str, tuple[int, ...]], meaning: str) -> list[str]:
    """The same for those of some factors, by role, that the update has."""
    return [
        problem
        for role, ref in update.factors
        if role in expected
        for problem in misshaped(ref, expected[role], meaning)
    ]


def check_indices(update: Update, role: str, indices: Tensor, count: int) -> None:
    """Raise `FormatError` if a factor's indices are not from 0 to ``count`` - 1."""
    if bool((indices < 0).any()) or bool((indices >= count).any()):
        ref = update.factor(role)
        found = f"{int(indices.min())} to {int(indices.max())}"
        raise FormatError(
            f"{ref.uri}: {ref.name} holds the numbers {found}; expected whole numbers from 0 to {count - 1}"
        )


def as_vector(ref: TensorRef) -> TensorRef:
    """A tensor seen with one dimension; all its dimensions but one are 1."""
    size = math.prod(ref.shape)
    strides = None if ref.strides is None else (ref.strides[ref.shape.index(size)],)
    return dataclasses.replace(ref, shape=(size,), strides=strides, orientation=Orientation.SAME)


def is_vector(ref: TensorRef) -> bool:
    return sum(size != 1 for size in ref.shape) <= 1 and len(ref.shape) > 0


def oriented(update: ModuleUpdate, parameter: Parameter, rows: int | None, columns: int | None) -> ModuleUpdate:
    """The update, transposed if only the parameter's transpose has these ``rows`` and ``columns``; None is any number.

    In a known model the parameter is (out, in) already. In another its shape shows a Conv1D, or for a square one the
    adapter's ``fan_in_fan_out``.
    """
    known = parameter.in_memory is not Orientation.UNKNOWN
    if known or update.orientation is Orientation.TRANSPOSED or len(parameter.shape) != 2:
        return update

    def fits(shape: tuple[int, ...]) -> bool:
        return rows in (None, shape[0]) and columns in (None, shape[1])

    plain, turned = fits(parameter.shape), fits(parameter.shape[::-1])
    return update.changed(orientation=update.in_memory if plain and turned else transposed_if(turned))


def check_dtypes(update: ModuleUpdate, weight: TensorRef, family: Family) -> list[str]:
    """Why a family cannot merge numbers of these dtypes."""
    for role, factor in update.factors:
        if factor.dtype not in FACTOR_DTYPES and not (role in family.whole_numbers and factor.dtype in INTEGER_DTYPES):
            return [f"{factor.name} is stored as {factor.dtype}; factors are F64, F32, F16 or BF16"]
    if weight.dtype not in family.weights:
        return [
            f"{update.module}: its weight {weight.name}, {list(weight.shape)} is stored as {weight.dtype}; only F32, "
            "F16 and BF16 weights can be merged into, so a quantised base must be dequantised first"
        ]
    return []
