"""The seam of an adapter family, and what reading an adapter's keys yields.

A family is a *row update*, not a delta: ``apply`` changes a tile of rows of W in place. So families that rescale or
multiply fit as well as those that add. Families do no I/O; their factors come through `Factors`, which reads lazily.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from shardmerge.spec import RowRange, TensorRef, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """An update as the adapter states it: a module by name, not yet matched to a base weight."""

    module: str
    parameter: str
    family: str
    factors: tuple[tuple[str, TensorRef], ...]
    scaling: float
    rank: int
    #: Whether the factors fit each other.
    fits: bool = True


@dataclass(slots=True)
class Claims:
    """What a reader made of an adapter's tensors; tensors in no update's factors are left over."""

    updates: list[ModuleUpdate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: Whether the adapter as a whole was refused, so that listing its tensors one by one would only repeat it.
    refused: bool = False
    #: Tensors in no update, of which a problem tells already.
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

    def rows(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a factor; only these are in memory."""


class Family(ABC):
    """One kind of update. Instances carry no state."""

    name: ClassVar[str]
    #: Factors that are kept whole while a target is worked on; of the others only a tile's rows are.
    whole_factors: ClassVar[frozenset[str]] = frozenset()
    #: Factors that, all zero, make the whole update nothing.
    zero_means_nothing: ClassVar[frozenset[str]] = frozenset()
    #: Whether W changes at all.
    changes_weight: ClassVar[bool] = True

    @abstractmethod
    def check(self, update: ModuleUpdate, weight: TensorRef) -> list[str]:
        """What does not fit between the factors and the weight; empty if all does."""

    @abstractmethod
    def apply(self, tile: Tensor, factors: Factors, update: Update, rows: RowRange, scratch: Tensor) -> None:
        """Change ``tile``, rows ``rows`` of W as ``(rows, columns)`` in the compute dtype, in place.

        ``scratch`` has the tile's shape and dtype and may be overwritten.
        """
