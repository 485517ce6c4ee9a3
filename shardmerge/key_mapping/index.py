"""What a checkpoint's names become in memory, for all of them at once.

Layers have the same names but for their numbers, so every name is taken apart into a template and its numbers, and the
rules see one name per template: 63,000 names of a mixture of experts are some fifty templates.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from shardmerge.key_mapping.rules import Image, Rule, Rules

_NUMBER = re.compile(r"(?<![A-Za-z0-9])(\d+)(?![A-Za-z0-9])")
_DIGITS = re.compile(r"\d+")
#: Stands for a number that no rule speaks of, the first in a name; the others count on from it.
_STAND_IN = 900_000_000
_STAND_INS = re.compile(r"9000\d{5}")
#: Names with that in them could be taken for a template's, so they are looked at by themselves.
_CONFUSING = re.compile("#|9000")


@dataclass
class Group:
    """Stored tensors that a conversion takes together."""

    rule: Rule
    #: Names in memory, one per target.
    targets: tuple[str, ...]
    #: Per source of the rule: number of the expert (or −1) → stored name.
    sources: list[dict[int, str]]
    #: More numbers in a name than the conversion can have meant.
    unclear: bool = False


@dataclass
class _Template:
    """What becomes of all names that differ only in numbers that no rule speaks of."""

    rule: Rule | None
    source: int
    number: Callable[[list[str]], int] | None
    #: Of the name in memory, and of every target.
    formats: list[Callable[[list[str]], str]]


@dataclass
class Index:
    """Names in memory → where they come from."""

    rules: Rules
    names: Iterable[str]
    renamed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    groups: dict[str, Group] = field(default_factory=dict)
    #: Name in memory → its conversion's first target, and which target it is.
    targets: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spoken = self._spoken_of
        templates: dict[str, list[tuple[list[str], str]]] = {}
        alone: list[str] = []
        for name in self.names:
            if spoken is None or _CONFUSING.search(name):
                alone.append(name)
                continue
            segments = name.split(".")
            key = ".".join(["#" if segment.isdecimal() and segment not in spoken else segment for segment in segments])
            numbers = [segment for segment in segments if segment.isdecimal()]
            members = templates.get(key)
            if members is None:
                members = templates[key] = []
            members.append((numbers, name))
        examples: list[tuple[str, bool, list[tuple[list[str], str]]]] = [(name, False, [([], name)]) for name in alone]
        for members in templates.values():
            examples.append((_stand_in(members[0][1], spoken or frozenset()), True, members))
        # Group renamings count only if their first source occurs, so all names are looked at twice.
        if any(rule.is_group for rule in self.rules.rules):
            self.rules.active, self.rules.seen = set(), set()
            for example, _, _ in examples:
                self.rules.forward(example)
            self.rules.active = set(self.rules.seen)
        for example, has_stand_ins, members in examples:
            self._add(_template(self.rules, example, has_stand_ins=has_stand_ins), members)

    @cached_property
    def _spoken_of(self) -> frozenset[str] | None:
        """Numbers that some pattern names, which therefore are not alike; None: none are alike."""
        rules = self.rules.rules
        return None if any(rule.offset for rule in rules) else numbers_in(rules)

    def _add(self, template: _Template, members: list[tuple[list[str], str]]) -> None:
        write = template.formats[0]
        if template.rule is None:
            for numbers, name in members:
                self.renamed[write(numbers)].append(name)
            return
        for numbers, name in members:
            first = write(numbers)
            group = self.groups.get(first)
            if group is None:
                targets = tuple(target(numbers) for target in template.formats[1:])
                group = Group(template.rule, targets, [{} for _ in template.rule.sources])
                self.groups[first] = group
                for i, target in enumerate(targets):
                    self.targets.setdefault(target, (first, i))
            number = template.number(numbers) if template.number else None
            if number is None or group.rule is not template.rule or number in group.sources[template.source]:
                group.unclear = True
            else:
                group.sources[template.source][number] = name


def numbers_in(rules: Iterable[Rule]) -> frozenset[str]:
    """The numbers that the patterns of some rules name."""
    numbers: set[str] = set()
    for rule in rules:
        for source in rule.sources:
            plain = source.replace(r"\d", "")
            numbers |= set(_DIGITS.findall(plain))
            if re.search(r"\[[^\]]*\d", plain):
                numbers |= set("0123456789")
    return frozenset(numbers)


def template_of(name: str, spoken: frozenset[str]) -> str:
    """A name with # for every number that no rule speaks of; as it is where that could be another's template."""
    if "#" in name:
        return name
    return ".".join(["#" if segment.isdecimal() and segment not in spoken else segment for segment in name.split(".")])


def _stand_in(name: str, spoken: frozenset[str]) -> str:
    """The name with a stand-in for every number that no rule speaks of."""
    segments = name.split(".")
    decimals = [i for i, segment in enumerate(segments) if segment.isdecimal()]
    for position, i in enumerate(decimals):
        if segments[i] not in spoken:
            segments[i] = str(_STAND_IN + position)
    return ".".join(segments)


def _template(rules: Rules, name: str, *, has_stand_ins: bool) -> _Template:
    image = rules.forward(name)
    names = [image.name, *image.targets]
    formats = [_format(name) if has_stand_ins else _constant(name) for name in names]
    return _Template(image.rule, image.source, _number_of(image, has_stand_ins), formats)


def number_in(image: Image) -> int | None:
    """The number of the expert in a name that a conversion took; −1: it has none; None: it is not clear."""
    if image.rule is None or "*" not in image.rule.sources[image.source]:
        return -1
    found = _NUMBER.findall(image.replaced)
    return None if len(found) > 1 else int(found[0]) if found else -1


def _number_of(image: Image, has_stand_ins: bool) -> Callable[[list[str]], int] | None:
    number = number_in(image)
    if number is None:
        return None
    value, position = number, number - _STAND_IN
    return (lambda numbers: int(numbers[position])) if has_stand_ins and position >= 0 else (lambda numbers: value)


def _constant(name: str) -> Callable[[list[str]], str]:
    return lambda numbers: name


def _format(name: str) -> Callable[[list[str]], str]:
    """From a name's numbers to the name in memory."""
    positions = [int(text) - _STAND_IN for text in _STAND_INS.findall(name)]
    if not positions:
        return _constant(name)
    pattern = _STAND_INS.sub("%s", name.replace("%", "%%"))
    if len(positions) == 1:
        only = positions[0]
        return lambda numbers: pattern % numbers[only]
    return lambda numbers: pattern % tuple([numbers[position] for position in positions])
