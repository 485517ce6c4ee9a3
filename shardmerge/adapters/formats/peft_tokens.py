"""Rows of an embedding that were trained by themselves: ``trainable_token_indices``, and PEFT's method of that name.

Source: peft/tuners/trainable_tokens/layer.py, 0.21.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import MISSING
from shardmerge.adapters.methods.whole import TokenRows, TokenSettings
from shardmerge.key_mapping.naming import module_name, unwrapped
from shardmerge.spec.tensors import TensorRef

_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?")


def claim_tokens(
    claims: Claims, tensors: Mapping[str, TensorRef], indices: Any, *, for_both_sides: bool = False
) -> None:
    """Rows of trained tokens. ``indices`` is a list for the input embedding, or a list for each module by name.

    ``for_both_sides``: whether a head that is tied to the embedding has no tokens of its own.
    """
    for name, ref in tensors.items():
        if "trainable_tokens_delta" not in name:  # few names have it, and the pattern takes 5 % of a plan of 45,000
            continue
        match = _TOKENS.fullmatch(unwrapped(name))
        if match is None:
            continue
        module = module_name(match["module"])
        of_module = indices
        if isinstance(indices, dict):
            found = [value for key, value in indices.items() if module == key or module.endswith(f".{key}")]
            of_module = found[0] if len(found) == 1 else None
        if not of_module:
            claims.reject([ref], f"{name}: the config does not say which tokens of {module} these are")
        else:
            settings = TokenSettings(tuple(of_module), for_both_sides)
            claims.updates.append(ModuleUpdate(module, "weight", TokenRows.name, (("rows", ref),), settings=settings))


def _indices_problem(where: str, value: Any) -> list[str]:
    valid = isinstance(value, (list, tuple)) and all(type(index) is int and 0 <= index < 1 << 31 for index in value)
    if not valid:
        return [f"{where} must be a list of token numbers, found {reprlib.repr(value)}"]
    if len(set(value)) < len(value):
        return [f"{where} names a token twice"]
    return []


def token_problems(key: str, value: Any) -> list[str]:
    """A check of the setting: a list of token numbers, or a list for each module."""
    if value is MISSING or value is None:
        return []
    if isinstance(value, dict):
        return [problem for name, item in value.items() for problem in _indices_problem(f"{key}[{name!r}]", item)]
    return _indices_problem(key, value)
