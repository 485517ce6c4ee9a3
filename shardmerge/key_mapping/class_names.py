"""Choose the model class whose module names an adapter uses for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardmerge.key_mapping import dialects
from shardmerge.key_mapping.dialects import Dialect
from shardmerge.key_mapping.index import numbers_in, template_of
from shardmerge.key_mapping.names import Names
from shardmerge.spec.notices import Warned
from shardmerge.spec.updates import Parameter

#: A module and its parameter, as an adapter calls them.
Target = tuple[str, str]
#: Whether the checkpoint has, or could have, that parameter by its own name for it.
Exists = Callable[[str, str], bool]
#: No dialect is searched for an adapter with more kinds of modules than this; models have tens.
_MOST_EXAMPLES = 2_000


@dataclass(frozen=True)
class NamesOfClass:
    """A checkpoint's names as one model class uses them: the checkpoint's own class, or that of a dialect."""

    names: Names
    dialect: Dialect | None = None

    def ours(self, module: str) -> Iterator[str]:
        """Names that the checkpoint may have for a module of the class, the likeliest first."""
        for name in (module,) if self.dialect is None else self.dialect.ours(module):
            yield name
            yield from self.names.other_names(name)

    def resolve(self, module: str, parameter: str = "weight") -> Parameter | str:
        """See `Names.resolve`."""
        found = (self.names.resolve(name, parameter) for name in self.ours(module))
        return next((item for item in found if item != ""), "")

    def registered_parameters(self, module: str) -> tuple[str, ...]:
        """See `Names.registered_parameters`."""
        return next(filter(None, map(self.names.registered_parameters, self.ours(module))), ())

    @property
    def note(self) -> str:
        """A sentence for the plan that names the dialect; "" for the checkpoint's own class."""
        if self.dialect is None:
            return ""
        theirs, ours = (name or "the model itself" for name in self.dialect.text)
        if self.dialect.is_guess:
            return Warned(
                f"its names fit the base with {self.dialect.class_name}, and in no other way; so they were read"
            )
        return f"its names are those of {self.dialect.class_name}: what it calls {theirs} is {ours} in the base"


class ModelClasses:
    """The model classes whose names an adapter may use for a checkpoint."""

    def __init__(self, names: Names) -> None:
        self._names = names

    @cached_property
    def own(self) -> NamesOfClass:
        return NamesOfClass(self._names)

    @cached_property
    def others(self) -> list[NamesOfClass]:
        """Names of other classes, from the table."""
        return [NamesOfClass(self._names, dialect) for dialect in dialects.of(self._names.parts)]

    def registered_parameters(self, module: str) -> tuple[str, ...]:
        """See `Names.registered_parameters`; by the first class that has the module, before one is `chosen`."""
        return next(filter(None, (of.registered_parameters(module) for of in (self.own, *self.others))), ())

    def template(self, module: str) -> str:
        """A key that is equal for names that differ only in numbers that no rule contains: all resolve alike."""
        return template_of(module, self._numbers)[0]

    @cached_property
    def _numbers(self) -> frozenset[str]:
        of_others = (names.dialect.renamings for names in self.others if names.dialect)
        return self._names.numbers.union(*map(numbers_in, of_others))

    def resolve(self, module: str, parameter: str = "weight") -> Parameter | str:
        """See `Names.resolve`; by the first class that has the parameter, before one is `chosen`."""
        return next((found for of in (self.own, *self.others) if (found := of.resolve(module, parameter))), "")

    def chosen(self, targets: Sequence[Target], exists: Exists) -> tuple[NamesOfClass, str]:
        """The names of the class that all targets are named by, and why that is uncertain ("" where it is certain).

        It is the checkpoint's own class, unless another class explains more names; then the class that explains most.
        The choice is ambiguous where two classes explain the same targets as different parts of the checkpoint. Of
        names that differ only in numbers, the one with the highest numbers is the example.
        """
        examples = examples_of(targets)
        own = _explained(self.own, examples, exists)
        if len(own) == len(examples) or len(examples) > _MOST_EXAMPLES:
            return self.own, ""
        candidates = [*self.others, *self._guessed([module for module, _ in examples])]
        found = [(names, _explained(names, examples, exists)) for names in candidates]
        found = [
            (names, which)
            for names, which in found
            if len(which) == len(examples) or (which > own and not (names.dialect and names.dialect.is_guess))
        ]
        if not found:
            return self.own, ""
        most = max(len(which) for _, which in found)
        best = [names for names, which in found if len(which) == most]
        if all(names.dialect and names.dialect.is_other for names in best):
            return self.own, ""
        explained = [examples[i] for i in sorted(next(which for _, which in found if len(which) == most))]
        meant = {tuple(map(_meant, map(names.resolve, *zip(*explained, strict=True)))): names for names in best[::-1]}
        if len(meant) > 1:
            return self.own, _ambiguous(explained[0], list(meant.values()))
        return best[0], ""

    def _guessed(self, modules: Sequence[str]) -> list[NamesOfClass]:
        """Dialects guessed from the names, where the checkpoint's text model is not in the table."""
        if self._names.known and not self._names.lacks_text:
            return []
        return [NamesOfClass(self._names, dialect) for dialect in dialects.guessed(self._names.stored, modules)]


def examples_of(targets: Iterable[Target]) -> list[Target]:
    """Of targets that differ only in numbers, the one with the highest numbers."""
    highest: dict[Target, tuple[list[int], Target]] = {}
    for module, parameter in targets:
        template, texts = template_of(module, ())
        numbers, key = list(map(int, texts)), (template, parameter)
        if key not in highest or numbers > highest[key][0]:
            highest[key] = numbers, (module, parameter)
    return [target for _, target in highest.values()]


def _explained(names: NamesOfClass, examples: Sequence[Target], exists: Exists) -> frozenset[int]:
    return frozenset(
        i
        for i, (module, parameter) in enumerate(examples)
        if any(exists(name, parameter) for name in names.ours(module))
    )


def _meant(found: Parameter | str) -> object:
    return found if isinstance(found, str) else found.regions


def _ambiguous(target: Target, candidates: Sequence[NamesOfClass]) -> str:
    meant = []
    for names in candidates:
        found = names.resolve(*target)
        name = ", ".join(sorted({region.tensor for region in found.regions})) if isinstance(found, Parameter) else found
        who = names.dialect.class_name if names.dialect else ""
        meant.append(f"{name or '.'.join(target)} ({who})")
    return f"{'.'.join(target)} could be {' or '.join(sorted(meant))}, and nothing says which is meant"
