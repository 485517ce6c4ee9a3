"""The class of the model by whose names an adapter calls the modules of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardmerge.key_mapping import dialects, suffixes
from shardmerge.key_mapping.dialects import Dialect
from shardmerge.key_mapping.index import numbers_in, template_of
from shardmerge.key_mapping.names import Names
from shardmerge.spec.notices import Warned
from shardmerge.spec.updates import Parameter

#: A module and its parameter, as an adapter calls them.
Target = tuple[str, str]
#: Whether the checkpoint has, or could have, that parameter under that name of its own.
Exists = Callable[[str, str], bool]
#: The most kinds of modules of an adapter for which its dialect is searched; models have tens of them.
_MOST_EXAMPLES = 2_000


@dataclass(frozen=True)
class Spoken:
    """The names of a checkpoint in a dialect; without one, those of the checkpoint's own class."""

    names: Names
    dialect: Dialect | None = None

    def ours(self, module: str) -> Iterator[str]:
        """What the checkpoint may call a module, the likeliest first."""
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
        """A sentence about the dialect for the plan; "" for the checkpoint's own class."""
        if self.dialect is None:
            return ""
        theirs, ours = (name or "the model itself" for name in self.dialect.text)
        if self.dialect.is_guess:
            return Warned(f"its names fit the base with {self.dialect.speaker}, and in no other way; so they were read")
        return f"its names are those of {self.dialect.speaker}: what it calls {theirs} is {ours} in the base"


class Speakers:
    """The classes whose names an adapter may use for a checkpoint, and the choice among them."""

    def __init__(self, names: Names) -> None:
        self._names = names

    @cached_property
    def own(self) -> Spoken:
        return Spoken(self._names)

    @cached_property
    def others(self) -> list[Spoken]:
        """The names of other classes, from the table."""
        return [Spoken(self._names, dialect) for dialect in dialects.of(self._names.parts)]

    def registered_parameters(self, module: str) -> tuple[str, ...]:
        """Those of the first class that knows the module, while the adapter's class is not known yet."""
        return next(filter(None, (of.registered_parameters(module) for of in (self.own, *self.others))), ())

    def template(self, module: str) -> str:
        """A key that is equal for names that differ only in numbers that no rule contains: all resolve alike."""
        return template_of(module, self._numbers)[0]

    @cached_property
    def _numbers(self) -> frozenset[str]:
        of_others = (spoken.dialect.renamings for spoken in self.others if spoken.dialect)
        return self._names.numbers.union(*map(numbers_in, of_others))

    def resolve(self, module: str, parameter: str = "weight") -> Parameter | str:
        """The place by the first class that knows the parameter, while the adapter's class is not known yet."""
        return next((found for of in (self.own, *self.others) if (found := of.resolve(module, parameter))), "")

    def chosen(self, targets: Sequence[Target], exists: Exists) -> tuple[Spoken, str]:
        """The class that fits the names of all these targets, and why that is not certain ("" where it is).

        It is the checkpoint's own class, unless another explains more names; then the one that explains most. Where two
        classes explain the same targets as different parts of the checkpoint, the choice is ambiguous. One decision
        holds for all targets. Of names that differ only in numbers, the one with the highest is the example.
        """
        examples = examples_of(targets)
        own = _explained(self.own, examples, exists)
        if len(own) == len(examples) or len(examples) > _MOST_EXAMPLES:
            return self.own, ""
        speakers = [*self.others, *self._guessed([module for module, _ in examples])]
        found = [(spoken, _explained(spoken, examples, exists)) for spoken in speakers]
        found = [
            (spoken, which)
            for spoken, which in found
            if len(which) == len(examples) or (which > own and not (spoken.dialect and spoken.dialect.is_guess))
        ]
        if not found:
            return self.own, ""
        most = max(len(which) for _, which in found)
        best = [spoken for spoken, which in found if len(which) == most]
        if all(spoken.dialect and spoken.dialect.is_other for spoken in best):
            return self.own, ""
        explained = [examples[i] for i in sorted(next(which for _, which in found if len(which) == most))]
        meant = {
            tuple(map(_meant, map(spoken.resolve, *zip(*explained, strict=True)))): spoken for spoken in best[::-1]
        }
        if len(meant) > 1:
            return self.own, _ambiguous(explained[0], list(meant.values()))
        return best[0], ""

    def _guessed(self, modules: Sequence[str]) -> list[Spoken]:
        """Dialects guessed from names, where the table does not know the checkpoint's text model."""
        if self._names.known and not self._names.lacks_text:
            return []
        return [Spoken(self._names, dialect) for dialect in suffixes.of(self._names.stored, modules)]


def examples_of(targets: Iterable[Target]) -> list[Target]:
    """One target of those that differ only in numbers: the one with the highest."""
    highest: dict[Target, tuple[list[int], Target]] = {}
    for module, parameter in targets:
        template, texts = template_of(module, ())
        numbers, key = list(map(int, texts)), (template, parameter)
        if key not in highest or numbers > highest[key][0]:
            highest[key] = numbers, (module, parameter)
    return [target for _, target in highest.values()]


def _explained(spoken: Spoken, examples: Sequence[Target], exists: Exists) -> frozenset[int]:
    return frozenset(
        i
        for i, (module, parameter) in enumerate(examples)
        if any(exists(name, parameter) for name in spoken.ours(module))
    )


def _meant(found: Parameter | str) -> object:
    return found if isinstance(found, str) else found.regions


def _ambiguous(target: Target, speakers: Sequence[Spoken]) -> str:
    meant = []
    for spoken in speakers:
        found = spoken.resolve(*target)
        name = ", ".join(sorted({region.tensor for region in found.regions})) if isinstance(found, Parameter) else found
        who = spoken.dialect.speaker if spoken.dialect else ""
        meant.append(f"{name or '.'.join(target)} ({who})")
    return f"{'.'.join(target)} could be {' or '.join(sorted(meant))}, and nothing says which is meant"
