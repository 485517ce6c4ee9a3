"""The seam of an adapter family: what an update does to a weight, and what the rest of the package must know about it.

A family is a *row update*, not a delta: ``apply`` changes a window of a module's matrix in place. So families that
rescale, multiply or rotate fit as well as those that add. Families do no I/O; their factors come through `Factors`,
which reads lazily. `shardmerge.adapters.registry` registers it by its name; nothing outside its module compares that.
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
    """The factors of the update at hand, in the compute dtype and on the compute device."""

    def whole(self, role: str) -> Tensor:
        """The whole factor; read once per target."""

    def as_stored(self, role: str) -> Tensor:
        """The whole factor, but in the dtype that it is stored in, and on the CPU."""

    def rows(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a factor whose first dimension is the matrix's rows; only these are in memory."""

    def columns(self, role: str, columns: RowRange) -> Tensor:
        """Columns of a factor (r, columns) whose last dimension is the matrix's columns; only these are in memory."""

    def kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        """Something made from factors, built when it is first asked for and kept while the target is worked on."""


class Effect(IntEnum):
    """What a family does to a weight. Of several updates by one adapter, the smaller comes first."""

    #: It compares the weight with what the adapter holds, and changes nothing.
    COMPARES = 0
    #: It puts the adapter's tensor in the weight's place.
    REPLACES = 1
    #: It puts rows of the adapter's in place of some of the weight's.
    REPLACES_ROWS = 2
    #: It computes new numbers, in the compute dtype.
    COMPUTES = 3


class Family(ABC):
    """One kind of update. Instances carry no state."""

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.COMPUTES
    #: Factors of which only a tile's rows are in memory, and of which only its columns where W is stored transposed.
    #: All others are kept whole while a target is worked on.
    by_rows: ClassVar[frozenset[str]] = frozenset()
    by_columns: ClassVar[frozenset[str]] = frozenset()
    #: Factors that are kept in the dtype that they are stored in. What several targets share may stay in memory.
    as_stored: ClassVar[frozenset[str]] = frozenset()
    #: Factors that ``apply`` reads a few rows at a time; `kept_bytes` counts the most that is in memory.
    streamed: ClassVar[frozenset[str]] = frozenset()
    #: Factors that may be whole numbers: indices, say.
    whole_numbers: ClassVar[frozenset[str]] = frozenset()
    #: Factors that, if all of them are zero, make the whole update do nothing. Empty where no factor has that meaning.
    neutral_if_zero: ClassVar[frozenset[str]] = frozenset()
    #: Whether the plan makes the adapter's one tensor the source, in the base's place: nothing is left to do by tile.
    is_source: ClassVar[bool] = False
    #: The dtypes of stored weights that it can be done to: those of which tiles can be made.
    weights: ClassVar[frozenset[str]] = frozenset(FLOAT_DTYPES)
    #: Whether ``apply`` asks `Factors.kept` to build something; no other thread computes then.
    builds: ClassVar[bool] = False
    #: Whether a window with all rows and a part of the columns can be updated: what a transposed W needs.
    by_column_windows: ClassVar[bool] = False
    #: The factor whose first dimension is W's outputs, and the one whose last dimension is the inputs, each "" where no
    #: factor shows it; see `oriented`. None: the update is of the matrix (out, in) in any model.
    sides: ClassVar[tuple[str, str] | None] = None
    #: Whether rows are updated one by one, so that they may be stored in another order.
    rows_are_independent: ClassVar[bool] = False
    #: Whether it only adds, so that a weight in the config scales it, and the order among such does not matter.
    adds: ClassVar[bool] = False
    #: Whether its scaling is LoRA's α / r, so that an alpha or scaling in our config sets it.
    scales_by_alpha: ClassVar[bool] = False
    #: Whether our config's ``expert_layout`` says how its factors are laid out.
    has_expert_layout: ClassVar[bool] = False
    #: Whether vectors of experts, (E, n), are one matrix to it.
    stacks_vectors: ClassVar[bool] = False
    #: Whether sums in it have entries of W as terms, so that its rounding errors are relative to W and not to ΔW.
    mixes_weight: ClassVar[bool] = False
    #: How many units of rounding its sums may be off, relative to a row's length. Of all families that the tests have,
    #: on matrices up to 768 wide, none that decomposes no matrix needs more than 4.
    sum_units: ClassVar[int] = 16

    @property
    def computes(self) -> bool:
        """Whether it computes numbers. What only copies or compares has them as they are stored."""
        return self.effect is Effect.COMPUTES

    @property
    def changes_weight(self) -> bool:
        """Whether W changes at all."""
        return self.effect is not Effect.COMPARES

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """Decide whether the update speaks of the parameter's transpose; a string says why that is unknown."""
        if self.sides is None:
            return update
        outputs, inputs = (update.factor(role).shape if update.has(role) else None for role in self.sides)
        rows = None if outputs is None else (*outputs, 0)[0]
        return oriented(update, parameter, rows, None if inputs is None else (0, *inputs)[-1])

    def as_applied(self, update: ModuleUpdate, *, can_be_source: bool) -> ModuleUpdate:
        """The update as it is done to a weight: ``can_be_source`` if the base stores that as one tensor, as it is."""
        return update

    @abstractmethod
    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        """What does not fit between the factors and the parameter, of ``shape`` in matrix orientation."""

    @abstractmethod
    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        """Change ``tile``, the window of the matrix as (rows, columns) in the compute dtype, in place.

        ``scratch`` has the tile's shape and dtype, is dense, and may be overwritten. The tile may be a transposed view.
        """

    def needs_prepass(self, update: Update) -> bool:
        """Whether every tile must be seen once by `prepass` before the first is changed."""
        return False

    def prepass(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        """See a tile before any is changed. The tile may be overwritten."""
        raise NotImplementedError

    def row_unit(self, update: Update | ModuleUpdate) -> int:
        """How many rows make a group that is updated together; a tile of rows holds whole groups."""
        return 1

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        """Bytes of what `Factors.kept` keeps, and of what ``apply`` takes besides ``scratch``."""
        return 0


#: By name; `shardmerge.adapters.registry` fills this.
FAMILIES: dict[str, Family] = {}


# --- the arithmetic that families share -------------------------------------------------------------------------------


def add_scaled(tile: Tensor, product: Tensor, scaling: float) -> None:
    """Add s · ``product``, which may be overwritten: the product is rounded, then the sum, as PEFT rounds them.

    Torch's own ``add_(alpha=s)`` rounds once where it has a fused multiply-add: other bits. But where s is 1, 2, 4, 8 …
    s · x is exact, so that it gives the same bits, and spares a pass.
    """
    if scaling >= 1 and math.frexp(scaling)[0] == 0.5:
        tile.add_(product, alpha=scaling)
    else:
        tile.add_(product.mul_(scaling))


#: Rows that are multiplied together, so that the bits are those of the whole; see `shardmerge.planning.tiling`.
_SLAB_ROWS = 16
#: The same where what is made for these rows costs as much as to multiply them.
PART_ROWS = 64
_SLAB_ELEMENTS = 1 << 14


def parts_of(rows: RowRange, least: int = PART_ROWS) -> Iterator[tuple[slice, RowRange]]:
    """Some rows after the other, ``least`` to twice as many: where they are in a tile of ``rows`` and in the matrix."""
    for part in even_rows(len(rows), max(1, len(rows) // least)):
        yield slice(part.start, part.stop), RowRange(rows.start + part.start, rows.start + part.stop)


def slabs(rows: RowRange, columns: int) -> Iterator[tuple[slice, RowRange]]:
    """The same, of so few rows that what they take beside ``scratch`` does not count."""
    return parts_of(rows, max(_SLAB_ROWS, _SLAB_ELEMENTS // max(1, columns)))


def slab_elements(columns: int) -> int:
    """The most elements that a slab has."""
    return 2 * max(_SLAB_ROWS * columns, _SLAB_ELEMENTS)


# --- the checks that families share -----------------------------------------------------------------------------------


def misshaped(ref: TensorRef, expected: tuple[int, ...], meaning: str) -> list[str]:
    """Whether a factor has the shape that it must have."""
    return [] if ref.shape == expected else [f"{ref.name} is {list(ref.shape)}; expected {list(expected)}, {meaning}"]


def all_misshaped(update: ModuleUpdate, expected: Mapping[str, tuple[int, ...]], meaning: str) -> list[str]:
    """The same of several factors, by role; of those that the update has."""
    return [
        problem
        for role, ref in update.factors
        if role in expected
        for problem in misshaped(ref, expected[role], meaning)
    ]


def check_indices(update: Update, role: str, indices: Tensor, count: int) -> None:
    """Raise FormatError if numbers of a factor do not count elements of something that has ``count``."""
    if bool((indices < 0).any()) or bool((indices >= count).any()):
        ref = update.factor(role)
        found = f"{int(indices.min())} to {int(indices.max())}"
        raise FormatError(
            f"{ref.uri}: {ref.name} holds the numbers {found}; expected whole numbers from 0 to {count - 1}"
        )


def as_vector(ref: TensorRef) -> TensorRef:
    """The same numbers as one dimension; all dimensions but one are 1."""
    size = math.prod(ref.shape)
    strides = None if ref.strides is None else (ref.strides[ref.shape.index(size)],)
    return dataclasses.replace(ref, shape=(size,), strides=strides, orientation=Orientation.SAME)


def is_vector(ref: TensorRef) -> bool:
    return sum(size != 1 for size in ref.shape) <= 1 and len(ref.shape) > 0


def oriented(update: ModuleUpdate, parameter: Parameter, rows: int | None, columns: int | None) -> ModuleUpdate:
    """The update, of the transpose if only that has so many ``rows`` and ``columns``; None is an unknown number.

    In a model that is known the parameter is in the matrix's orientation already. In another the shape shows a Conv1D,
    and where it is square the setting ``fan_in_fan_out``.
    """
    known = parameter.in_memory is not Orientation.UNKNOWN
    if known or update.orientation is Orientation.TRANSPOSED or len(parameter.shape) != 2:
        return update

    def fits(shape: tuple[int, ...]) -> bool:
        return rows in (None, shape[0]) and columns in (None, shape[1])

    plain, turned = fits(parameter.shape), fits(parameter.shape[::-1])
    return update.changed(orientation=update.in_memory if plain and turned else transposed_if(turned))


def check_dtypes(update: ModuleUpdate, weight: TensorRef, family: Family) -> list[str]:
    """Whether numbers of these dtypes can be merged by a family."""
    for role, factor in update.factors:
        if factor.dtype not in FACTOR_DTYPES and not (role in family.whole_numbers and factor.dtype in INTEGER_DTYPES):
            return [f"{factor.name} is stored as {factor.dtype}; factors are F64, F32, F16 or BF16"]
    if weight.dtype not in family.weights:
        return [
            f"{update.module}: its weight {weight.name}, {list(weight.shape)} is stored as {weight.dtype}; only F32, "
            "F16 and BF16 weights can be merged into, so a quantised base must be dequantised first"
        ]
    return []
