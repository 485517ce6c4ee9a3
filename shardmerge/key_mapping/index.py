"""The names in memory of all tensors of a checkpoint, and the stored tensors behind each name in memory.

The names of layers differ only in numbers. So a name is split into a template and its numbers, and the rules are
applied once per template: the 67,000 names of a mixture of experts have some fifty templates.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.key_mapping.rules import Image, Rule, Rules

_NUMBER = re.compile(r"(?<![A-Za-z0-9])(\d+)(?![A-Za-z0-9])")
_DIGITS = re.compile(r"\d+")
#: Stands for the first number in a name that no rule contains; the stand-ins of further numbers count up from it.
_STAND_IN = 900_000_000
_STAND_INS = re.compile(r"9000\d{5}")
#: Stands for such a number in a template. No tensor's name contains it, since names are printable.
_ANY = "\0"

#: The numbers of a name, as text, → another name with the same numbers.
_Format = Callable[[list[str]], str]


def template_of(name: str, kept: Collection[str]) -> tuple[str, list[str]]:
    """A name's template, which it shares with names that differ only in numbers other than ``kept``; its numbers."""
    segments, numbers = name.split("."), []
    for i, segment in enumerate(segments):
        if segment.isdecimal():
            numbers.append(segment)
            if segment not in kept:
                segments[i] = _ANY
    return ".".join(segments), numbers


def numbers_in(rules: Iterable[Rule]) -> frozenset[str]:
    """The numbers in the patterns of some rules."""
    numbers: set[str] = set()
    for rule in rules:
        for source in rule.sources:
            plain = source.replace(r"\d", "")
            numbers |= set(_DIGITS.findall(plain))
            if re.search(r"\[[^\]]*\d", plain):
                numbers |= set("0123456789")
    return frozenset(numbers)


def number_in(image: Image) -> int | None:
    """The expert's number in a name that was converted; −1 where it has none, None where it is ambiguous."""
    if image.rule is None or "*" not in image.rule.sources[image.source]:
        return -1
    found = _NUMBER.findall(image.replaced)
    return None if len(found) > 1 else int(found[0]) if found else -1


# --- one name ---------------------------------------------------------------------------------------------------------


class Images:
    """`Rules.forward` for many names; it is called once per template."""

    def __init__(self, rules: Rules, numbers: frozenset[str] = frozenset()) -> None:
        """``numbers`` are kept in templates, besides those in the rules."""
        self._rules = rules
        #: The kept numbers; None where a rule adds to a number, so that all of them matter.
        self.numbers = None if any(rule.offset for rule in rules.rules) else numbers_in(rules.rules) | numbers
        self._known: dict[str, Callable[[str, list[str]], Image]] = {}

    def template(self, name: str) -> tuple[str, list[str]] | None:
        """The template of a name, and its numbers; None where the rules must be applied to the name itself."""
        if self.numbers is None or "9000" in name or _ANY in name:  # it could be taken for an example, or a template
            return None
        return template_of(name, self.numbers)

    def of(self, name: str) -> Image:
        """The image of a name."""
        found = self.template(name)
        if found is None:
            return self._rules.forward(name)
        template, numbers = found
        image = self._known.get(template)
        if image is None:
            image = self._known[template] = _image_of_all(self._rules, template)
        return image(name, numbers)


def _image_of_all(rules: Rules, template: str) -> Callable[[str, list[str]], Image]:
    """A function from a name of that template and its numbers to its image."""
    example, positions = _example(template)
    image = rules.forward(example)
    if image == Image(example):
        return lambda name, numbers: Image(name)
    write, replaced = _format(image.name, positions), _format(image.replaced, positions)
    targets = [_format(target, positions) for target in image.targets]

    def of(name: str, numbers: list[str]) -> Image:
        made = tuple([target(numbers) for target in targets])
        return Image(write(numbers), image.rule, image.source, replaced(numbers), made)

    return of


def _example(template: str) -> tuple[str, dict[str, int]]:
    """A name of a template with stand-ins for numbers, and the position among the numbers of each stand-in."""
    segments, positions = template.split("."), {}
    counted = [i for i, segment in enumerate(segments) if segment == _ANY or segment.isdecimal()]
    for position, i in enumerate(counted):
        if segments[i] == _ANY:
            segments[i] = str(_STAND_IN + position)
            positions[segments[i]] = position
    return ".".join(segments), positions


def _format(text: str, positions: dict[str, int]) -> _Format:
    """A function that puts a name's numbers in the place of the stand-ins in ``text``."""
    which = [positions[stand_in] for stand_in in _STAND_INS.findall(text)]
    if not which:
        return lambda numbers: text
    pattern = _STAND_INS.sub("%s", text.replace("%", "%%"))
    return lambda numbers: pattern % tuple([numbers[position] for position in which])


# --- all names --------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The stored tensors that one conversion combines."""

    rule: Rule
    #: Names in memory, one per target.
    targets: tuple[str, ...]
    #: Per source of the rule, the number of the expert (or −1) → the stored name.
    sources: list[dict[int, str]]
    #: Whether it is unclear which expert a name belongs to.
    unclear: bool = False


class Index:
    """Names in memory → the stored tensors that they come from.

    A template's names are read when a name is looked up that they may become. That is rare: an adapter mostly names
    tensors as they are stored, and `makers` shows that those come from no others.
    """

    def __init__(self, rules: Rules, templates: Mapping[str, str], numbers: frozenset[str]) -> None:
        """``templates`` are those of all stored names, made with ``numbers`` as `Images` makes them."""
        self._names = templates.keys()
        self._images = Images(rules, numbers)
        #: Stored names that are not read yet, by template.
        self._unread: defaultdict[str, list[str]] = defaultdict(list)
        for name, template in templates.items():
            self._unread[template].append(name)
        if any(rule.is_group for rule in rules.rules):
            # Group renamings count only if their first source occurs, so all templates are looked at twice.
            rules.active, rules.seen = set(), set()
            for names in self._unread.values():
                rules.forward(names[0])
            rules.active = set(rules.seen)
        #: By template of a name in memory, the templates of the stored names that become such; None: of any name.
        self._makers: defaultdict[str | None, list[str]] = defaultdict(list)
        for template in self._unread:
            image = rules.forward(_example(template)[0])
            for name in image.targets or (image.name,):
                self._makers[self._template_of_image(name)].append(template)
        self._renamed: defaultdict[str, list[str]] = defaultdict(list)
        self._groups: dict[str, Group] = {}
        self._targets: dict[str, tuple[str, int]] = {}

    def _template_of_image(self, example: str) -> str | None:
        """The template of what an example became; None where a stand-in is only a part of a segment."""
        template = template_of(example, self._images.numbers or ())[0]
        return None if _STAND_INS.search(template) else template

    def makers(self, template: str) -> list[str]:
        """The templates of the stored names that may become a name of that template."""
        return [*self._makers.get(template, ()), *self._makers.get(None, ())]

    def sources(self, name: str) -> Sequence[str]:
        """The stored tensors that have the name in memory after renamings alone."""
        self._read_makers_of(name)
        return self._renamed.get(name, ())

    def target(self, name: str) -> tuple[str, int] | None:
        """Of a name in memory that a conversion makes, the conversion's first target, and which target it is."""
        self._read_makers_of(name)
        return self._targets.get(name)

    def group(self, first: str) -> Group:
        """The stored tensors of the conversion whose first target that is."""
        self._read_makers_of(first)
        return self._groups[first]

    def in_memory(self) -> list[str]:
        """All names in memory: those after renamings alone come first."""
        images = [self._images.of(name) for name in self._names]
        renamed = (image.name for image in images if image.rule is None)
        return list(dict.fromkeys((*renamed, *(target for image in images for target in image.targets))))

    def _read_makers_of(self, name: str) -> None:
        found = self._images.template(name)
        for template in list(self._unread) if found is None else self.makers(found[0]):
            for stored in self._unread.pop(template, ()):
                self._add(stored, self._images.of(stored))

    def _add(self, name: str, image: Image) -> None:
        if image.rule is None:
            self._renamed[image.name].append(name)
            return
        group = self._groups.get(image.name)
        if group is None:
            group = self._groups[image.name] = Group(image.rule, image.targets, [{} for _ in image.rule.sources])
            for i, target in enumerate(image.targets):
                self._targets.setdefault(target, (image.name, i))
        number = number_in(image)
        if number is None or group.rule is not image.rule or number in group.sources[image.source]:
            group.unclear = True
        else:
            group.sources[image.source][number] = name
