"""The seam of an adapter family, and what reading an adapter's keys yields.

A family is a *row update*, not a delta: ``apply`` changes a window of a module's matrix in place. So families that
rescale, multiply or rotate fit as well as those that add. Families do no I/O; their factors come through `Factors`,
which reads lazily.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from shardmerge.spec.tensors import FACTOR_DTYPES, FLOAT_DTYPES, INTEGER_DTYPES, RowRange, TensorRef, even_rows
from shardmerge.spec.updates import Parameter, Update, Window

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """An update as the adapter states it: a module by name, not yet matched to a base weight."""

    module: str
    parameter: str
    family: str
    factors: tuple[tuple[str, TensorRef], ...]
    scaling: float = 1.0
    rank: int = 0
    #: Whether the factors fit each other.
    fits: bool = True
    #: What else the family needs to know, all of it JSON.
    settings: tuple[tuple[str, Any], ...] = ()
    #: Whether the family speaks of the parameter's transpose, as LoRA does on an embedding.
    transposes: bool = False
    #: Whether every expert has a matrix of its own in the parameter.
    experts: bool = False
    #: Whether nothing is lost if the base has no such tensor.
    optional: bool = False
    #: Whether dots of the module's name are written as underscores.
    flattened: bool = False
    #: Role → parameter of the same module, whose values in the base, before anything changed them, are a factor, too.
    of_base: tuple[tuple[str, str], ...] = ()

    @property
    def first(self) -> str:
        """The name of one of its tensors, to speak of it."""
        return self.factors[0][1].name

    def has(self, role: str) -> bool:
        return any(name == role for name, _ in self.factors)

    def factor(self, role: str) -> TensorRef:
        return next(ref for name, ref in self.factors if name == role)

    def setting(self, name: str, default: Any = None) -> Any:
        return next((value for key, value in self.settings if key == name), default)

    def changed(self, **changes: Any) -> ModuleUpdate:
        """The same with other fields."""
        return dataclasses.replace(self, **changes)


@dataclass(slots=True)
class Claims:
    """What a reader made of an adapter's tensors; tensors in no update's factors are left over."""

    updates: list[ModuleUpdate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Whether the adapter as a whole was refused, so that listing its tensors one by one would only repeat it.
    refused: bool = False
    #: Whether all that is missing is the scale, which our config can give.
    unscaled: bool = False
    #: Tensors in no update that are accounted for: a problem tells of them, or they say nothing about the weights.
    told: set[str] = field(default_factory=set)

    def half(self, ref: TensorRef, missing: str) -> None:
        """Say that a factor is there without its other half."""
        self.problems.append(f"{ref.name} is there without {missing}")
        self.told.add(ref.name)

    def misfit(self, problem: str) -> None:
        """Say that the factors of the newest update do not fit each other; there is no use in matching it further."""
        self.problems.append(problem)
        self.updates[-1] = dataclasses.replace(self.updates[-1], fits=False)

    def leftovers(self, tensors: Mapping[str, TensorRef]) -> list[str]:
        used = self.told | {ref.name for update in self.updates for _, ref in update.factors}
        return [name for name in tensors if name not in used]


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


class Family(ABC):
    """One kind of update. Instances carry no state."""

    name: ClassVar[str]
    #: Factors of which only a tile's rows are in memory, and of which only its columns where W is stored transposed.
    #: All others are kept whole while a target is worked on.
    by_rows: ClassVar[frozenset[str]] = frozenset()
    by_columns: ClassVar[frozenset[str]] = frozenset()
    #: Factors that are kept in the dtype that they are stored in. What several targets share may stay in memory.
    as_stored: ClassVar[frozenset[str]] = frozenset()
    #: Factors that ``apply`` reads a few rows at a time; `kept_bytes` tells of the most that is in memory.
    streamed: ClassVar[frozenset[str]] = frozenset()
    #: Factors that may be whole numbers: indices, say.
    whole_numbers: ClassVar[frozenset[str]] = frozenset()
    #: Factors that, all zero, make the whole update nothing.
    zero_means_nothing: ClassVar[frozenset[str]] = frozenset()
    #: Whether W changes at all.
    changes_weight: ClassVar[bool] = True
    #: Whether it works numbers out, in the compute dtype. What only copies or compares has them as they are stored.
    computes: ClassVar[bool] = True
    #: Whether the plan makes the adapter's one tensor the source, in the base's place: nothing is left to do by tile.
    is_source: ClassVar[bool] = False
    #: The dtypes of stored weights that it can be done to: those of which tiles can be made.
    weights: ClassVar[frozenset[str]] = frozenset(FLOAT_DTYPES)
    #: Whether a window with all rows and a part of the columns can be updated: what a transposed W needs.
    by_column_windows: ClassVar[bool] = False
    #: Whether rows are updated one by one, so that they may be stored in another order.
    rows_are_independent: ClassVar[bool] = False
    #: Whether it only adds, so that a weight in the config scales it, and the order among such does not matter.
    adds: ClassVar[bool] = False
    #: The smaller comes first on a weight that an adapter updates in several ways.
    order: ClassVar[int] = 5

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        """Decide whether the update speaks of the parameter's transpose; a string says why that cannot be told."""
        return update

    @abstractmethod
    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        """What does not fit between the factors and the parameter, of ``shape`` in matrix orientation."""

    @abstractmethod
    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        """Change ``tile``, the window of the matrix as (rows, columns) in the compute dtype, in place.

        ``scratch`` has the tile's shape and dtype, is dense, and may be overwritten. The tile may be a transposed view.
        """

    def surveys(self, update: Update) -> bool:
        """Whether every tile must be seen once by `survey` before the first is changed."""
        return False

    def survey(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        """See a tile before any is changed. The tile may be overwritten."""
        raise NotImplementedError

    def row_unit(self, update: Update | ModuleUpdate) -> int:
        """How many rows make a group that is updated together; a tile of rows holds whole groups."""
        return 1

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        """Bytes of what `Factors.kept` keeps, and of what ``apply`` takes besides ``scratch``."""
        return 0


def add_scaled(tile: Tensor, product: Tensor, scaling: float) -> None:
    """Add s · ``product``, which may be overwritten: the product is rounded, then the sum, as PEFT rounds them.

    Torch's own ``add_(alpha=s)`` rounds once where it has a fused multiply-add: other bits. But where s is 1, 2, 4, 8 …
    s · x is exact, so that it gives the same bits, and spares a pass.
    """
    if scaling >= 1 and math.frexp(scaling)[0] == 0.5:
        tile.add_(product, alpha=scaling)
    else:
        tile.add_(product.mul_(scaling))


def misshaped(ref: TensorRef, expected: tuple[int, ...], meaning: str) -> list[str]:
    """Whether a factor has the shape that it must have."""
    return [] if ref.shape == expected else [f"{ref.name} is {list(ref.shape)}; expected {list(expected)}, {meaning}"]


#: Rows that are multiplied together, so that the bits are those of the whole; see `shardmerge.planning.tiling`.
_SLAB_ROWS = 16
_SLAB_ELEMENTS = 1 << 14


def slabs(rows: RowRange, columns: int) -> Iterator[RowRange]:
    """Rows in even parts, for what needs memory beside ``scratch``: a few rows of it at a time."""
    least = max(_SLAB_ROWS, _SLAB_ELEMENTS // max(1, columns))
    for part in even_rows(len(rows), max(1, len(rows) // least)):
        yield RowRange(rows.start + part.start, rows.start + part.stop)


def slab_elements(columns: int) -> int:
    """The most elements that a slab has."""
    return 2 * max(_SLAB_ROWS * columns, _SLAB_ELEMENTS)


def as_vector(ref: TensorRef) -> TensorRef:
    """The same numbers as one dimension; all dimensions but one are 1."""
    size = math.prod(ref.shape)
    strides = None if ref.strides is None else (ref.strides[ref.shape.index(size)],)
    return dataclasses.replace(ref, shape=(size,), strides=strides, is_transposed=False)


def is_vector(ref: TensorRef) -> bool:
    return sum(size != 1 for size in ref.shape) <= 1 and len(ref.shape) > 0


def oriented(update: ModuleUpdate, parameter: Parameter, rows: int | None, columns: int | None) -> ModuleUpdate:
    """The update, seen to speak of the transpose if only that has so many ``rows`` and ``columns``; None is not known.

    In a model that is known nothing is left to see. In another a Conv1D is told by its shape, and where it is square by
    the setting ``fan_in_fan_out``.
    """
    if parameter.is_transposed is not None or update.transposes or len(parameter.shape) != 2:
        return update

    def fits(shape: tuple[int, ...]) -> bool:
        return rows in (None, shape[0]) and columns in (None, shape[1])

    plain, turned = fits(parameter.shape), fits(parameter.shape[::-1])
    transposes = bool(update.setting("fan_in_fan_out")) if plain and turned else turned
    return update.changed(transposes=transposes)


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
