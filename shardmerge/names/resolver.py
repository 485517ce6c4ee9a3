"""``Names``: what an adapter calls a parameter → the places where the checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardmerge.names.places import Parameter, Place

#: Prefixes of base models that are tried where the architecture is not known.
_COMMON_PREFIXES = ("model", "transformer")


class Names:
    """The names of one checkpoint."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.known = False

    def resolve(self, module: str, parameter: str = "weight") -> Parameter | str:
        """The parameter's places; else why there are none, "" where nothing of that name is in the base."""
        name = f"{module}.{parameter}" if module else parameter
        candidates = [name]
        for prefix in _COMMON_PREFIXES:
            candidates.append(f"{prefix}.{name}")
            if name.startswith(prefix + "."):
                candidates.append(name.removeprefix(prefix + "."))
        for candidate in candidates:
            if candidate in self._shapes:
                shape = self._shapes[candidate]
                experts = len(shape) == 3 and parameter != "weight"
                rows = shape[experts] if shape else 1
                return Parameter(candidate, shape, (Place(candidate, rows),), None, experts)
        return ""

    def tied_heads(self) -> Mapping[str, str]:
        """Names of output heads that are tied to an input embedding → the embedding's stored name."""
        return {}

    def registered_parameters(self, module: str) -> tuple[str, ...]:
        """The parameters of an experts module in order of registration."""
        return ()
