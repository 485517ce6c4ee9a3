"""transformers' renamings and conversions of a checkpoint's names, as data.

A name goes through all renamings in their order, then through at most one conversion, as in
``transformers.core_model_loading.rename_source_key``. The patterns are ours (baked by ``tools/bake_names.py``), never
a checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

#: A pattern ends at the end of a name: `weight` is not the start of `weight_scale_inv`.
_ENDS_IN_WORD = re.compile(r"[a-zA-Z0-9]$")
_REFERENCE = re.compile(r"\\(\d+)")


@dataclass(frozen=True)
class Rule:
    """One renaming (``operations`` empty) or conversion. Patterns and replacements as the table has them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[tuple[Any, ...], ...] = ()
    #: Sources and targets are pairs; only if the first source occurs in the checkpoint do the others count.
    is_group: bool = False
    #: What is added to the number that the pattern captures.
    offset: int = 0
    #: It adds or removes a prefix, which a checkpoint may have or lack.
    changes_prefix: bool = False
    #: The renaming that leads back: (source, target) patterns.
    back: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    #: The rule belongs to a part of the model and sees only names under this prefix.
    scope: str | None = None
    base_prefix: str = ""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """All sources as one alternation, the longest first; the group ``g<i>`` is source i."""
        branches = []
        for i, source in sorted(enumerate(self.sources), key=lambda item: -len(item[1])):
            branch = source.replace("*.", r".*\.")
            boundary = r"(?!\w)" if _ENDS_IN_WORD.search(branch) else ""
            branches.append(f"(?P<g{i}>{branch}{boundary})")
        return re.compile("|".join(branches))

    def reversed(self) -> Rule | None:
        """The renaming from names in memory to names on disk, where there is one."""
        if self.back is None:
            return None
        sources, targets = self.back
        return replace(self, sources=sources, targets=targets, operations=(), offset=-self.offset, back=None)

    def find(self, name: str) -> tuple[str, re.Match[str]] | None:
        """The prefix that the rule does not see, and the match in the rest."""
        prefix = ""
        if self.scope is not None:
            scope = f"{self.scope}." if self.scope else ""
            base = f"{self.base_prefix}." if self.base_prefix else ""
            if name.startswith(base + scope):
                prefix = base + scope
            elif name.startswith(scope):
                prefix = scope
            else:
                return None
        match = self.pattern.search(name[len(prefix) :])
        return (prefix, match) if match else None

    def replacement(self, match: re.Match[str]) -> tuple[int, str]:
        """Which source matched, and what comes in its place (of several targets the first)."""
        source = next(int(group[1:]) for group, text in match.groupdict().items() if text is not None)
        target = self.targets[source if self.is_group else 0]
        base = self.pattern.groupindex[f"g{source}"]

        def captured(reference: re.Match[str]) -> str:
            text = match.group(base + (int(reference[1]) if self.is_group else 1)) or ""
            return str(int(text) + self.offset) if self.offset else text

        return source, _REFERENCE.sub(captured, target)


class Image(NamedTuple):
    """The result of the rules for a name: the name in memory, or those of all targets of a conversion."""

    name: str
    rule: Rule | None = None
    #: Which of the conversion's sources the name is.
    source: int = 0
    #: The part of the name that the conversion replaced.
    replaced: str = ""
    #: In memory, one per target of the conversion.
    targets: tuple[str, ...] = ()


@dataclass
class Rules:
    """The rules of one architecture, in their order."""

    rules: Sequence[Rule]
    #: Group renamings whose first source occurs in the checkpoint, by position; None: all of them.
    active: set[int] | None = None
    seen: set[int] = field(default_factory=set)

    @cached_property
    def renamings(self) -> list[tuple[int, Rule]]:
        return [(i, rule) for i, rule in enumerate(self.rules) if not rule.operations]

    @cached_property
    def conversions(self) -> list[Rule]:
        return [rule for rule in self.rules if rule.operations]

    def forward(self, name: str) -> Image:
        """The name in memory of a name on disk."""
        for i, rule in self.renamings:
            if found := rule.find(name):
                source, replacement = rule.replacement(found[1])
                if rule.is_group:
                    if source == 0:
                        self.seen.add(i)
                    elif self.active is not None and i not in self.active:
                        continue
                name = _replace(name, found, replacement)
        for rule in self.conversions:
            if found := rule.find(name):
                source, replacement = rule.replacement(found[1])
                renamed = _replace(name, found, replacement)
                before, _, after = renamed.partition(rule.targets[0])
                targets = tuple(before + target + after for target in rule.targets)
                return Image(renamed, rule, source, found[1].group(0), targets)
        return Image(name)

    def backward(self, name: str, with_prefixes: bool) -> str:
        """The name on disk of a name in memory, as far as renamings go."""
        for _, rule in reversed(self.renamings):
            back = rule.reversed()
            if back is None or (back.changes_prefix and not with_prefixes):
                continue
            if found := back.find(name):
                name = _replace(name, found, back.replacement(found[1])[1])
        return name


def _replace(name: str, found: tuple[str, re.Match[str]], replacement: str) -> str:
    prefix, match = found
    return prefix + name[len(prefix) :].replace(match.group(0), replacement, 1)


def compose(table: Mapping[str, Sequence[Rule]], modules: Sequence[tuple[str, str, str]], base: str) -> list[Rule]:
    """The rules of a model made of parts: (path, class, model type) of itself and of its parts, parents first.

    As ``transformers.conversion_mapping.get_model_conversion_mapping``: rules of a class go before those of its model
    type, and a part inside of one that has claimed the same rules adds none.
    """
    rules: list[Rule] = []
    claimed: dict[str, list[str]] = {}

    def is_claimed(identifier: str, path: str) -> bool:
        return any(not by or path.startswith(by + ".") for by in claimed.get(identifier, ()))

    for path, class_name, model_type in modules:
        if is_claimed(class_name, path):
            continue
        by_class = class_name in table
        if not by_class and (model_type not in table or is_claimed(model_type, path)):
            continue
        found = table[class_name if by_class else model_type]
        if path:
            scope = path.removeprefix(base).removeprefix(".")
            found = [replace(rule, scope=scope, base_prefix=base) for rule in found]
        rules += found
        claimed.setdefault(class_name, []).append(path)
        if not by_class:
            claimed.setdefault(model_type, []).append(path)
    return rules
