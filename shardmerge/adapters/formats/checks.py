"""Checks of the settings in ``adapter_config.json``, and settings that depend on a module's name."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from shardmerge.system.bounded_regex import first_match
from shardmerge.system.bounded_regex import problems as regex_problems

Config = Mapping[str, Any]
#: Returns the problems of a setting, by its key and value.
Check = Callable[[str, Any], list[str]]
#: A check's value for a setting that the config does not have.
MISSING: Any = object()


def checked(valid: Callable[[Any], bool], expected: str, *, required: bool = False) -> Check:
    """A check of one setting. If it is missing or null, the method's default holds, unless it is required."""

    def check(key: str, value: Any) -> list[str]:
        if (value is MISSING or value is None) and not required:
            return []
        if value is not MISSING and valid(value):
            return []
        found = "nothing" if value is MISSING else reprlib.repr(value)
        return [f"{key} must be {expected}, found {found}"]

    return check


def is_number(value: Any) -> bool:
    # Not math.isfinite, which fails for a whole number beyond all floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_seed(value: Any) -> bool:
    """Whether torch takes it as a seed."""
    return type(value) is int and -(1 << 63) <= value < 1 << 64


def one_of(*words: str) -> Check:
    """A check of a setting that is one of some words."""
    return checked(lambda value: isinstance(value, str) and value in words, f"one of {', '.join(words)}")


def up_to(most: int) -> Check:
    """A check of a whole number that costs time."""
    return checked(lambda value: is_rank(value) and value <= most, f"a whole number from 1 to {most}")


RANK = checked(is_rank, "a whole number above zero", required=True)
COUNT = checked(is_count, "a whole number")
NUMBER = checked(is_number, "a finite number", required=True)
OPTIONAL_NUMBER = checked(is_number, "a finite number")
SEED = checked(is_seed, "a whole number of 64 bits", required=True)
OPTIONAL_SEED = checked(is_seed, "a whole number that fits in 64 bits")
FLAG = checked(lambda value: isinstance(value, bool), "true or false")
STRINGS = checked(lambda value: isinstance(value, str) or is_strings(value), "a string or a list of strings")
SUBCONFIG = checked(lambda value: isinstance(value, dict), "a mapping of settings, or null")


def pattern_of(valid: Callable[[Any], bool], expected: str) -> Check:
    """A check of a setting that maps ends of module names to values."""

    def check(key: str, value: Any) -> list[str]:
        if value is MISSING or not value:
            return []
        if not isinstance(value, dict):
            return [f"{key} must map module names to values, found {reprlib.repr(value)}"]
        problems = []
        for pattern, item in value.items():
            if not valid(item):
                problems.append(f"{key}[{reprlib.repr(pattern)}] must be {expected}, found {reprlib.repr(item)}")
        texts = {_whole_pattern(pattern): pattern for pattern in value}
        for text, why in regex_problems(list(texts)):
            problems.append(f"{key}[{reprlib.repr(texts[text])}] is not a regular expression: {why}")
        return problems

    return check


RANK_PATTERN = pattern_of(is_rank, "a whole number above zero")
NUMBER_PATTERN = pattern_of(is_number, "a finite number")


def one_or_other(config: Config, one: str, other: str) -> list[str]:
    """The problems of two whole numbers of which exactly one must be above zero."""
    first, second = config.get(one) or 0, config.get(other) or 0
    if is_count(first) and is_count(second) and (first > 0) == (second > 0):
        return [f"adapter_config.json: one of {one} and {other} is above zero, found {first} and {second}"]
    return []


def pattern_value(pattern: Any, module: str, default: Any) -> Any:
    """The value of the first key, in the file's order, that matches the end of the module's name, as PEFT does it."""
    if not pattern:
        return default
    found = first_match([_whole_pattern(key) for key in pattern], module)
    return default if found is None else list(pattern.values())[found]


def _whole_pattern(key: str) -> str:
    """PEFT's regular expression for a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


def rank_of(config: Config, module: str) -> int:
    """The rank of a module, by ``r`` and ``rank_pattern``."""
    rank: int = pattern_value(config.get("rank_pattern"), module, config["r"])
    return rank
