"""Reads settings of a config.json, which is untrusted. In a composite model they may be those of the text part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config itself, and its ``text_config`` if it has one."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def setting(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key in the first section that has it; None if none has."""
    return next((section[key] for section in sections(config) if key in section), None)


def whole_number(config: Mapping[str, Any], key: str) -> int | None:
    """The first value of a key that is a whole number."""
    return next((value for section in sections(config) if type(value := section.get(key)) is int), None)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    return whole_number(config, "vocab_size")
