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
    """A view of no base. The planner has a subclass that answers from a checkpoint."""

    #: Whether there is a base; without one, None from `stored` does not mean that it lacks the parameter.
    is_known: bool = False

    def registered(self, module: str) -> tuple[str, ...]:
        """The parameters of a module's own in the order in which its class registers them; empty if that is unknown."""
        return ()

    def stored(self, module: str, parameter: str) -> tuple[Parameter, str] | None:
        """Where the base keeps a module's parameter, and its dtype; None if it has no such parameter."""
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
    """An update as the adapter states it: a module by name, not yet matched to a base weight."""

    module: str
    parameter: str
    family: str
    factors: tuple[tuple[str, TensorRef], ...]
    scaling: float = 1.0
    rank: int = 0
    #: Whether the factors fit each other.
    fits: bool = True
    #: What else the family needs to know.
    settings: Settings | None = None
    #: Of what the factors describe against the parameter: LoRA on an embedding speaks of the transpose. Not known where
    #: only shapes can show it.
    orientation: Orientation = Orientation.SAME
    #: Of the matrix (out, in) against its modules' own tensors, by the adapter's config (``fan_in_fan_out``). It counts
    #: where neither the model nor the shape shows it.
    in_memory: Orientation = Orientation.SAME
    #: Whether every expert has a matrix of its own in the parameter.
    experts: bool = False
    #: Whether nothing is lost if the base has no such tensor.
    optional: bool = False
    #: Whether dots of the module's name are written as underscores.
    flattened: bool = False
    #: Whether the last part of the module's name may be a parameter's.
    or_parameter: bool = False
    #: Role → parameter of the same module, whose values in the base, before anything changed them, are a factor, too.
    of_base: tuple[tuple[str, str], ...] = ()

    @property
    def first(self) -> str:
        """The name of one of its tensors, for messages."""
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
    """What a reader made of an adapter's tensors; tensors in no update's factors are left over."""

    updates: list[ModuleUpdate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Whether the adapter as a whole was refused, so that listing its tensors one by one would only repeat it.
    refused: bool = False
    #: Whether all that is missing is the scale, which our config can give.
    unscaled: bool = False
    #: Names of tensors in no update that are accounted for: a problem names them, or they do not change the weights.
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
        """Report that a factor is there without its other half; ``others`` are of no use without that, either."""
        self.reject((ref, *others), f"{ref.name} is there without {missing}")

    def misfit(self, problem: str) -> None:
        """Report that the factors of the newest update do not fit each other; it is not matched further.

        A factor without numbers is reported by itself, so that nothing is said of how it fits.
        """
        if any(0 in ref.shape for _, ref in self.updates[-1].factors):
            return
        self.problems.append(problem)
        self.updates[-1] = self.updates[-1].changed(fits=False)

    def leftovers(self, tensors: Mapping[str, TensorRef]) -> list[str]:
        used = self.accounted | {ref.name for update in self.updates for _, ref in update.factors}
        return [name for name in tensors if name not in used]
