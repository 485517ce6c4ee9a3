"""What a reader makes of an adapter's tensors: updates of modules, and everything that is wrong with the adapter.

A reader works from the adapter's files alone. Where these leave something open (the order of a module's parameters,
the dtype of a weight), it asks the base through a `BaseView`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardmerge.spec.light import light_dataclass
from shardmerge.spec.tensors import Orientation, TensorRef
from shardmerge.spec.updates import ModuleOrder, Parameter, Settings


class BaseView:
    """What a reader may ask of the base. This one has no base; the planner's subclass answers from a checkpoint."""

    #: Whether there is a base. Without one, None from `stored` does not mean that the parameter is missing.
    is_known: bool = False

    def registered(self, module: str) -> tuple[str, ...]:
        """A module's own parameters in the order in which its class registers them; empty if that is unknown."""
        return ()

    def stored(self, module: str, parameter: str) -> tuple[Parameter, str] | None:
        """A module's parameter and its dtype; None if the base has no such parameter."""
        return None

    def ordered(self) -> ModuleOrder | str:
        """The model's Linear layers in their order; a string says why the order is not known."""
        return "the base is not known"

    def weight(self, module: str) -> Parameter | None:
        found = self.stored(module, "weight")
        return None if found is None else found[0]


NO_BASE = BaseView()


@light_dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """An update as the adapter states it, not yet matched to a weight of the base."""

    module: str
    parameter: str
    family: str
    factors: tuple[tuple[str, TensorRef], ...]
    scaling: float = 1.0
    rank: int = 0
    #: Whether the factors fit each other.
    fits: bool = True
    settings: Settings | None = None
    #: Of the matrix of the factors against the parameter: LoRA on an embedding describes the transpose. Unknown where
    #: only shapes can show it.
    orientation: Orientation = Orientation.SAME
    #: Of the matrix (out, in) against the module's own tensor, by the adapter's config (``fan_in_fan_out``). Used where
    #: neither the model nor the shape shows it.
    in_memory: Orientation = Orientation.SAME
    #: Whether the parameter holds a matrix for every expert.
    experts: bool = False
    #: Whether the base may lack the tensor.
    optional: bool = False
    #: Whether dots of the module's name are written as underscores.
    flattened: bool = False
    #: Whether the last part of the module's name may be a parameter's.
    or_parameter: bool = False
    #: Role → parameter of the same module, whose values in the base are a factor, too.
    of_base: tuple[tuple[str, str], ...] = ()

    @property
    def first(self) -> str:
        """The name of its first tensor, for messages."""
        return self.factors[0][1].name

    def has(self, role: str) -> bool:
        return any(name == role for name, _ in self.factors)

    def factor(self, role: str) -> TensorRef:
        return next(ref for name, ref in self.factors if name == role)

    def changed(self, **changes: Any) -> ModuleUpdate:
        return dataclasses.replace(self, **changes)


def shown(*refs: TensorRef) -> str:
    """Names and shapes of tensors, for messages."""
    return " and ".join(f"{ref.name} {list(ref.shape)}" for ref in refs)


@dataclass(slots=True)
class Claims:
    """What a reader made of an adapter's tensors. Tensors of no update are left over."""

    updates: list[ModuleUpdate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Whether the adapter was refused as a whole, so that its tensors are not listed one by one.
    refused: bool = False
    #: Whether only the scale is missing, which our config can give.
    unscaled: bool = False
    #: Names of tensors of no update that a problem names, or that do not change the weights.
    accounted: set[str] = field(default_factory=set)

    @classmethod
    def refusal(cls, *problems: str) -> Claims:
        """The claims on an adapter that is refused as a whole."""
        return cls(problems=list(problems), refused=True)

    def account_for(self, refs: Iterable[TensorRef]) -> None:
        self.accounted |= {ref.name for ref in refs}

    def reject(self, refs: Iterable[TensorRef], problem: str) -> None:
        """Report what is wrong with tensors that make no update."""
        self.problems.append(problem)
        self.account_for(refs)

    def half(self, ref: TensorRef, missing: str, others: Iterable[TensorRef] = ()) -> None:
        """Report that a factor is there without its other half. ``others`` need it, too."""
        self.reject((ref, *others), f"{ref.name} is there without {missing}")

    def misfit(self, problem: str) -> None:
        """Report that the factors of the newest update do not fit each other, so that it is not matched further.

        An empty factor is reported by the matching.
        """
        if any(0 in ref.shape for _, ref in self.updates[-1].factors):
            return
        self.problems.append(problem)
        self.updates[-1] = self.updates[-1].changed(fits=False)

    def leftovers(self, tensors: Mapping[str, TensorRef]) -> list[str]:
        used = {ref.name for update in self.updates for _, ref in update.factors}
        return [name for name in tensors if name not in used and name not in self.accounted]
