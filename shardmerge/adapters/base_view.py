"""What the readers of adapters may ask about the base model.

A reader works from an adapter's files alone. Where these leave something open (the order of a module's parameters, the
dtype of a weight), it asks the base through a `BaseView`. Where there is no base, `NO_BASE` answers.
"""

from __future__ import annotations

from shardmerge.spec.updates import ModuleOrder, Parameter


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
