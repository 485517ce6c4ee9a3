"""The settings by which PEFT chooses the modules of an adapter when it trains and when it loads.

PEFT drops the tensors of other modules with a warning. As in `check_target_module_exists` of
peft/tuners/tuners_utils.py, 0.21, ``exclude_modules`` goes first, then ``modules_to_save``, then ``target_modules``
with ``layers_to_transform`` and ``layers_pattern``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from shardmerge.adapters.formats.checks import Config, is_strings
from shardmerge.system.bounded_regex import first_captured, first_match
from shardmerge.system.bounded_regex import problems as regex_problems

#: Settings of some methods that narrow down ``target_modules``.
SELECTORS = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
#: The reason where a module is not a target.
NOT_COVERED = "target_modules do not cover"
#: From so many targets on PEFT looks for shorter names that mean the same modules.
_MANY_TARGETS = 20
#: The first number in a name with two segments before it, where there is no pattern.
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def left_out(module: str, config: Config) -> str:
    """The setting that excludes a module, with its verb; empty where it is a target."""
    excluded = config.get("exclude_modules")
    if excluded and matches(excluded, module):
        return "exclude_modules leave out"
    saved = config.get("modules_to_save")
    if saved and any(_holds(item, module) for item in saved):
        return "modules_to_save hold"
    targets = config.get("target_modules")
    if isinstance(targets, str):
        everything = targets.lower() == "all-linear"
        return "" if everything or matches(targets, module) else NOT_COVERED
    if targets is not None and not matches(targets, module):
        return NOT_COVERED
    # A module that is listed by its full name is a target in any layer.
    by_name = targets is not None and module in targets and len(targets) < _MANY_TARGETS
    return "" if by_name or _is_in_layers(module, config) else "layers_to_transform leave out"


def matches(targets: str | Collection[str], module: str) -> bool:
    """Whether a regular expression, or one of a list of ends of names, matches a module."""
    if isinstance(targets, str):
        return first_match([targets], module, "fullmatch") is not None
    return _has_end(targets, module) if isinstance(targets, frozenset) else not _ends(module).isdisjoint(targets)


@lru_cache(maxsize=8)  # called several times for a module
def _has_end(targets: frozenset[str], module: str) -> bool:
    return not _ends(module).isdisjoint(targets)


def _ends(name: str) -> set[str]:
    """The name, and the rest of it after each of its dots."""
    segments = name.split(".")
    return {".".join(segments[first:]) for first in range(len(segments))} - {""}


def _holds(saved: str, module: str) -> bool:
    """Whether an item of ``modules_to_save``, a regular expression, matches the module or one around it."""
    if saved.isidentifier():
        return saved in module.split(".")
    return first_match([_saved_pattern(saved)], module) is not None


def _saved_pattern(saved: str) -> str:
    return rf"(^|.*\.){saved}($|\..*)"


def _is_in_layers(module: str, config: Config) -> bool:
    """Whether ``layers_to_transform`` allow a module that the end of its name has matched."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    number = first_captured(_layer_patterns(config), module, "idx")
    return number is not None and int(number) in (layers if isinstance(layers, list) else [layers])


def _layer_patterns(config: Config) -> list[str]:
    """PEFT's regular expressions for ``layers_pattern``, each of which finds a layer's number."""
    named = config.get("layers_pattern")
    if not named:
        return [_ANY_LAYER]
    return [rf"(?:^|.*?\.){of}\.(?P<idx>\d+)\." for of in ([named] if isinstance(named, str) else named)]


def target_problems(config: Config) -> Iterator[str]:
    """The problems of the settings themselves."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets is not None and not (isinstance(targets, str) and targets.lower() == "all-linear"):
        yield from _names_problems("target_modules", targets)
    if excluded := config.get("exclude_modules"):
        yield from _names_problems("exclude_modules", excluded)
    saved = config.get("modules_to_save")
    if saved is not None and not is_strings(saved):
        yield f"modules_to_save must be a list of strings, found {reprlib.repr(saved)}"
    elif saved:
        yield from _regex_problems("modules_to_save", {_saved_pattern(item): item for item in saved})
    if layers is not None and not _is_layers(layers):
        yield f"layers_to_transform must be a whole number or a list of them, found {reprlib.repr(layers)}"
    elif layers not in (None, []) and isinstance(targets, str):
        yield "layers_to_transform have no meaning where target_modules is a regular expression"
    named = config.get("layers_pattern")
    if named and not (isinstance(named, str) or is_strings(named)):
        yield f"layers_pattern must be a string or a list of strings, found {reprlib.repr(named)}"
    elif named:
        of = [named] if isinstance(named, str) else named
        yield from _regex_problems("layers_pattern", dict(zip(_layer_patterns(config), of, strict=True)))


def _names_problems(key: str, names: Any) -> Iterator[str]:
    if isinstance(names, str):
        yield from _regex_problems(key, {names: names})
    elif not is_strings(names):
        yield f"{key} must be a string or a list of strings, found {reprlib.repr(names)}"


def _regex_problems(key: str, texts: Mapping[str, str]) -> Iterator[str]:
    """``texts``: PEFT's pattern → that of the config."""
    for text, why in regex_problems(list(texts)):
        shown = "" if texts[text] == text else f": {reprlib.repr(texts[text])}"
        yield f"{key}{shown} is not a regular expression: {why}"


def _is_layers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(item) is int for item in value))
