"""Tied weights: the parameter behind a tied name, and a config.json without ties."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.ties import is_head
from shardmerge.spec.updates import Parameter

TIES_KEY = "tie_word_embeddings"


def tied_parameter(names: Names, module: str, parameter: str) -> Parameter | None:
    """The parameter of a module that is tied and so not stored: the stored one's, by the module's name."""
    target, tied = f"{module}.{parameter}", names.tied_by_name
    alike = {of for name, of in tied.items() if target.endswith(f".{name}") or name.endswith(f".{target}")}
    name = tied.get(target) or (alike.pop() if len(alike) == 1 else None)
    if name is None and not names.knows_ties and stands_for(names, target):
        name = target
    main = None if name is None else stands_for(names, name)
    if name is None or main is None:
        return None
    shared = names.resolve(main.rpartition(".")[0], main.rpartition(".")[2])
    if not isinstance(shared, Parameter):
        return None
    regions = tuple(dataclasses.replace(region, tensor=name) for region in shared.regions)
    return dataclasses.replace(shared, name=name, regions=regions)


def stands_for(names: Names, name: str) -> str | None:
    """The stored tensor that a tied one is.

    Where the architecture is not known, a module named like an output head is assumed to be the one embedding's.
    """
    if name in names.tied:
        return names.tied[name]
    if names.knows_ties or len(names.ties) != 1 or names.ties[0].others:
        return None
    return names.ties[0].main if name.endswith(".weight") and is_head(name.removesuffix(".weight")) else None


def without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the key that ties set to false, in the parts that have it and where transformers looks first."""
    changed = _said_untied(config)
    # Where the key is missing, the architecture's default holds, which may be the other.
    changed[TIES_KEY] = False
    if isinstance(text_config := changed.get("text_config"), dict):
        changed["text_config"] = {**text_config, TIES_KEY: False}
    return changed


def _said_untied(config: Mapping[str, Any]) -> dict[str, Any]:
    changed = {}
    for key, value in config.items():
        if key == TIES_KEY:
            value = False
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            value = _said_untied(value)
        changed[key] = value
    return changed
