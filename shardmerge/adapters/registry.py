"""The families, methods and formats by name, and the format of an adapter's files.

This module imports every module of `adapters.methods` and `adapters.formats`, and registers their classes that have a
name of their own. So a new method needs only its file, and a new format also its name in the config.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection, Mapping
from typing import Any

from shardmerge.adapters import formats, methods
from shardmerge.adapters.formats.base import FORMATS, AdapterFormat
from shardmerge.adapters.formats.peft_method import METHODS, PeftMethod
from shardmerge.adapters.methods.base import FAMILIES, Family
from shardmerge.spec.tensors import TensorRef

__all__ = ["FAMILIES", "FORMATS", "METHODS", "are_factors", "are_weights", "detect_format", "register", "shows_adapter"]

#: The format of files that no format detects: its refusals say most about them.
_DEFAULT = "peft"
#: Ends of the names of factors, in any format that is read without a config.
_FACTOR = re.compile(
    r".*\.(lora_\w+|lora_[AB]\.\w+|[AB]|alpha|hada_\w+|lokr_\w+|dora_scale|diff|diff_b|w_norm|b_norm)(\.weight|\.bias)?"
)


def register(made: type[Any]) -> None:
    """Register a class that has a ``name`` (of a family or format) or a ``peft_type`` of its own."""
    tables: dict[type[Any], dict[str, Any]] = {Family: FAMILIES, AdapterFormat: FORMATS, PeftMethod: METHODS}
    for kind, table in tables.items():
        own_name = vars(made).get("peft_type" if kind is PeftMethod else "name")
        if issubclass(made, kind) and own_name is not None:
            table[own_name] = made()


for _package in (methods, formats):
    for _module in pkgutil.iter_modules(_package.__path__):
        _imported = importlib.import_module(f"{_package.__name__}.{_module.name}")
        for _class in vars(_imported).values():
            if isinstance(_class, type) and _class.__module__ == _imported.__name__:
                register(_class)


def detect_format(tensors: Mapping[str, TensorRef], config: Mapping[str, Any] | None) -> AdapterFormat:
    """The format of an adapter, from its config and the names of its tensors."""
    return next((known for known in FORMATS.values() if known.detect(tensors, config)), FORMATS[_DEFAULT])


def shows_adapter(names: Collection[str]) -> bool:
    """Whether names show that a file is an adapter, and not a model's checkpoint."""
    return any(known.shows_adapter(names) for known in FORMATS.values())


def are_factors(names: Collection[str]) -> bool:
    """Whether most of these tensors are factors, by their names."""
    return 2 * sum(_FACTOR.fullmatch(name) is not None for name in names) > len(names)


def are_weights(names: Collection[str]) -> bool:
    """Whether all of these tensors are weights of a model, by their names."""
    return bool(names) and not any(map(_FACTOR.fullmatch, names)) and not shows_adapter(names)
