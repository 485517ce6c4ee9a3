"""A checkpoint's names as one adapter speaks of them."""

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
#: Kinds of modules that an adapter may update, if it is to be found out who speaks; models have tens of them.
_MOST_EXAMPLES = 2_000


@dataclass(frozen=True)
class Spoken:
    """The names of a checkpoint in a dialect; None is the checkpoint's own class."""

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
        """What is to be said of the dialect; nothing of the checkpoint's own."""
        if self.dialect is None:
            return ""
        theirs, ours = (name or "the model itself" for name in self.dialect.text)
        if self.dialect.is_guess:
            return Warned(f"its names fit the base with {self.dialect.speaker}, and in no other way; so they were read")
        return f"its names are those of {self.dialect.speaker}: what it calls {theirs} is {ours} in the base"


class Speakers:
    """The ways in which one may speak of a checkpoint, and which of them an adapter does."""

    def __init__(self, names: Names) -> None:
        self._names = names

    @cached_property
    def own(self) -> Spoken:
        return Spoken(self._names)

    @cached_property
    def others(self) -> list[Spoken]:
        """Those of other classes, by the table."""
        return [Spoken(self._names, dialect) for dialect in dialects.of(self._names.parts)]

    def registered_parameters(self, module: str) -> tuple[str, ...]:
        """As whoever knows the module says, while it is not known yet who speaks."""
        return next(filter(None, (of.registered_parameters(module) for of in (self.own, *self.others))), ())

    def template(self, module: str) -> str:
        """The same for names that differ only in numbers that no rule speaks of: what holds of one holds of all."""
        return template_of(module, self._numbers)[0]

    @cached_property
    def _numbers(self) -> frozenset[str]:
        of_others = (spoken.dialect.renamings for spoken in self.others if spoken.dialect)
        return self._names.numbers.union(*map(numbers_in, of_others))

    def resolve(self, module: str, parameter: str = "weight") -> Parameter | str:
        """As whoever knows the parameter says, while it is not known yet who speaks."""
        return next((found for of in (self.own, *self.others) if (found := of.resolve(module, parameter))), "")

    def chosen(self, targets: Sequence[Target], exists: Exists) -> tuple[Spoken, str]:
        """Who speaks of all these targets, and why that is not certain ("" where it is).

        The checkpoint's own class, if no other explains more. Else the one that explains more than all others do; where
        two explain the same targets as different parts of the checkpoint, nobody can say which is meant. One decision
        holds for all targets. Of names that differ in numbers only, those with the highest are asked for.
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
        meant = {tuple(map(_said, map(spoken.resolve, *zip(*explained, strict=True)))): spoken for spoken in best[::-1]}
        if len(meant) > 1:
            return self.own, _ambiguous(explained[0], list(meant.values()))
        return best[0], ""

    def _guessed(self, modules: Sequence[str]) -> list[Spoken]:
        """Where the table does not know the checkpoint's text model, its names have to do."""
        if self._names.known and not self._names.lacks_text:
            return []
        return [Spoken(self._names, dialect) for dialect in suffixes.of(self._names.stored, modules)]


def examples_of(targets: Iterable[Target]) -> list[Target]:
    """Of the targets that differ in numbers only, that with the highest."""
    highest: dict[Target, tuple[list[int], Target]] = {}
    for module, parameter in targets:
        template, texts = template_of(module, ())
        numbers = [int(text[:9]) for text in texts]
        key = template, parameter
        if key not in highest or numbers > highest[key][0]:
            highest[key] = numbers, (module, parameter)
    return [target for _, target in highest.values()]


def _explained(spoken: Spoken, examples: Sequence[Target], exists: Exists) -> frozenset[int]:
    return frozenset(
        i
        for i, (module, parameter) in enumerate(examples)
        if any(exists(name, parameter) for name in spoken.ours(module))
    )


def _said(found: Parameter | str) -> object:
    return found if isinstance(found, str) else found.places


def _ambiguous(target: Target, speakers: Sequence[Spoken]) -> str:
    meant = []
    for spoken in speakers:
        found = spoken.resolve(*target)
        name = ", ".join(sorted({place.tensor for place in found.places})) if isinstance(found, Parameter) else found
        who = spoken.dialect.speaker if spoken.dialect else ""
        meant.append(f"{name or '.'.join(target)} ({who})")
    return f"{'.'.join(target)} could be {' or '.join(sorted(meant))}, and nothing says which is meant"
