"""What an adapter's module does, and to which part of which stored tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

from shardmerge.spec.light import light_dataclass
from shardmerge.spec.tensors import Orientation, RowRange, TensorRef


@light_dataclass(frozen=True, slots=True)
class Region:
    """Where a part of a module's matrix is stored in a tensor.

    Rows are those of the matrix in its own orientation, (out, in). Of experts (E, out, in) they are the rows of every
    expert's matrix, and of experts' biases (E, out) the entries of every expert's vector.
    """

    #: Name in the checkpoint.
    tensor: str
    #: How many of the matrix's rows are stored here.
    rows: int
    #: The matrix's row of the first of them.
    start: int = 0
    #: The stored tensor's row (its column if ``orientation`` is transposed) at which that row is stored.
    stored_start: int = 0
    #: The parameter has experts: the tensor stores this expert's matrix only; None: it stores all of them, (E, …).
    #: The parameter is one expert's matrix: the tensor stores all experts, (E, …), and the matrix is this one of them.
    expert: int | None = None
    #: Of the matrix against the stored tensor's last two dimensions.
    orientation: Orientation = Orientation.SAME
    #: (g, a, b): the stored rows [stored_start, stored_start + rows) seen as (g, a, b) are the matrix's rows seen as
    #: (g, b, a): ``matrix_rows = stored_rows.view(g, a, b, …).transpose(1, 2).reshape(rows, …)``.
    shuffle: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a module as an adapter names it, and where the checkpoint stores it."""

    #: The in-memory name; the adapter's own where the adapter updates a part of a parameter (an expert, a half).
    name: str
    #: In matrix orientation: (out, in), (E, out, in), (out, in, k, …), (n,), (V, D).
    shape: tuple[int, ...]
    #: Together they cover the matrix exactly once.
    regions: tuple[Region, ...]
    #: Of the matrix against the module's own tensor in memory, which is (in, out) for a Conv1D. Not known where the
    #: architecture is not: then regions are not transposed, and the shape is as stored.
    in_memory: Orientation
    #: Whether the first dimension counts experts: ``shape`` is (E, out, in), or (E, out) for their biases.
    experts: bool = False
    #: Whether its rows are those of two matrices in turn, of gate and of up.
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class ModuleOrder:
    """The Linear layers of a model, in the order in which its class registers them."""

    #: The class.
    architecture: str
    modules: tuple[str, ...]
    #: Modules with a matrix that are not Linear layers, or whose position is not known.
    others: tuple[str, ...]
    #: Linear layers that the class has and the checkpoint has no weight of.
    absent: tuple[str, ...]


@light_dataclass(frozen=True, slots=True)
class Window:
    """The part of a module's matrix (of one expert's) that a tile holds."""

    rows: RowRange
    columns: RowRange
    expert: int = 0


S = TypeVar("S", bound="Settings")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a method needs to know of a module besides its factors: a subclass for each method, every field JSON."""

    @classmethod
    def of(cls: type[S], update: HasSettings) -> S:
        """The settings of an update of this method."""
        assert isinstance(update.settings, cls), f"{cls.__name__} expected, found {update.settings}"
        return update.settings


class HasSettings(Protocol):
    """An update, matched to a weight or not yet."""

    @property
    def settings(self) -> Settings | None:
        """None where the factors say all."""


@light_dataclass(frozen=True, slots=True)
class Update:
    """What one module of one adapter does to one stored tensor.

    ``scaling`` includes the adapter's weight in the config. ``shape`` is that of the matrix that the factors describe:
    (out, in), (out, in, kernel…), (n,), or with ``experts`` (E, out, in). ``orientation`` is that of the
    matrix against the parameter.
    """

    adapter: int
    family: str
    module: str
    target: str
    factors: tuple[tuple[str, TensorRef], ...]
    scaling: float
    rank: int
    shape: tuple[int, ...]
    region: Region
    parameter: str = "weight"
    experts: int = 0
    orientation: Orientation = Orientation.SAME
    settings: Settings | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix (of each expert's)."""
        return self.shape[1 if self.experts else 0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[2 if self.experts else 1 :])

    @property
    def by_columns(self) -> bool:
        """Whether a tile of stored rows holds columns of the matrix rather than rows."""
        return self.region.orientation is not self.orientation

    @property
    def in_stack(self) -> bool:
        """Whether the stored tensor holds several experts."""
        return (self.experts > 0) == (self.region.expert is None) and (
            self.experts > 0 or self.region.expert is not None
        )

    def factor(self, role: str) -> TensorRef:
        return next(ref for name, ref in self.factors if name == role)

    def has(self, role: str) -> bool:
        return any(name == role for name, _ in self.factors)
