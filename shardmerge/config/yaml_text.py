"""YAML of configs and ``-s key=value``: a value means what it means to any version of YAML, or is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from shardmerge.config.problems import brief
from shardmerge.errors import ConfigError
from shardmerge.system.regular_files import TooLargeError, read_small

#: Bytes of a config. A thousand adapters need less, and PyYAML takes long for more.
MAX_CONFIG_BYTES = 100_000
_TOO_LONG = f"over {MAX_CONFIG_BYTES} bytes long; this is not a config"
#: How a number is written. YAML 1.1 has other forms, which mean something else to YAML 1.2: 0777, 1:30, 1_000.
DECIMAL = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
#: Whole numbers are smaller.
TOO_LARGE = 1 << 63
_DIGITS = 20
#: Characters of PyYAML's message that are shown.
_LONGEST = 1000
#: What is a word here, and to YAML 1.1 a date or a flag. Where a flag is expected, yes and on are read as one later.
_WORDS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that makes of a value what stands there, and refuses a key given twice.

    YAML would let the last one win without a word, and make the number 90 of 1:30, and ``true`` of a folder's name, on.
    """


def _resolvers() -> dict[Any, Any]:
    """By first letter what a plain word may be, as PyYAML has it, without dates, and with flags by two words."""
    resolvers = {
        letter: [item for item in items if item[0] not in _WORDS]
        for letter, items in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for letter in "tTfF":
        resolvers[letter].append((_WORDS[1], re.compile("(?:true|True|TRUE|false|False|FALSE)$")))
    return resolvers


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    # Merge keys (<<) are not obeyed: nested, they grow without bound, and a config has no use for them.
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            raise _refusal("a key must be a plain word", key_node)
        key = loader.construct_object(key_node)
        if key in result:
            raise _refusal(f"the key {brief.repr(key)} stands twice", key_node)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _construct_int(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> int:
    if not DECIMAL.fullmatch(node.value) or "." in node.value:
        raise _refusal(_not_decimal(node.value), node)
    # So many digits as Python neither reads nor prints.
    if len(node.value) > _DIGITS or not -TOO_LARGE <= (value := int(node.value)) < TOO_LARGE:
        raise _refusal("a whole number must fit into 64 bits", node)
    return value


def _construct_float(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> float:
    if not DECIMAL.fullmatch(node.value):
        raise _refusal(_not_decimal(node.value), node)
    return float(node.value)


def _not_decimal(text: str) -> str:
    """The message about 0777, 0x1F, 1_000, 1:30 and .inf, which YAML readers take for different numbers or texts."""
    return f"{brief.repr(text)} is not a plain decimal number; write one, or put it into quotes if it is a text"


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_UniqueKeyLoader.yaml_implicit_resolvers = _resolvers()


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        # PyYAML lets what int(), datetime() and the like raise pass through.
        raise ConfigError(f"{where}: not valid YAML: {str(error)[:_LONGEST]}") from None


def read_text(path: Path) -> bytes:
    """The bytes of a config. `ConfigError` where it cannot be read, or is too long to be one."""
    try:
        return read_small(path, MAX_CONFIG_BYTES)
    except TooLargeError:
        raise ConfigError(f"{path}: {_TOO_LONG}") from None
    except OSError as error:
        there = "" if path.is_absolute() else f" (in {os.getcwd()})"
        raise ConfigError(f"{path}: the config cannot be read: {error.strerror}{there}") from None


def parse_mapping(text: bytes, where: str, keys: Iterable[str]) -> dict[str, Any]:
    """A YAML mapping, which may have the ``keys``; `ConfigError` where the text is something else."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: {_TOO_LONG}")
    value = _parse(text, where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a config is a mapping with the keys {', '.join(keys)}")
    return value


def override(value: dict[str, Any], text: str) -> None:
    """Set ``key.path`` of a config, as ``key.path=value`` says. `ConfigError` where there is no such place."""
    dotted, separator, yaml_value = text.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"-s {text}: write it as key.path=value, for example output.path=/mnt/merged")
    new = _parse(yaml_value, f"-s {dotted}")
    *folders, last = dotted.split(".")
    place: Any = value
    for step in folders:
        place = _step(place, step, text)
    if isinstance(place, list):
        place[_list_index(place, last, text)] = new
    elif isinstance(place, dict):
        place[last] = new
    else:
        raise ConfigError(f"-s {text}: {'.'.join(folders)} is not a section of the config")


def _step(place: Any, step: str, text: str) -> Any:
    if isinstance(place, list):
        index = _list_index(place, step, text)
        if isinstance(place[index], str):  # the short form of an adapter
            place[index] = {"path": place[index]}
        return place[index]
    if isinstance(place, dict):
        if place.get(step) is None:
            place[step] = {}
        return place[step]
    raise ConfigError(f"-s {text}: nothing can be set below {step!r}")


def _list_index(place: list[Any], step: str, text: str) -> int:
    if not step.isdecimal() or int(step) >= len(place):
        raise ConfigError(f"-s {text}: {step!r} is not a number from 0 to {len(place) - 1}")
    return int(step)
