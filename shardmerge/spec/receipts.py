"""The receipt of a finished shard, and how its updates came through the rounding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.spec.packed import PackedMapping


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Sums over a sample of a tensor's elements, which show how they came through the rounding. Samples add up."""

    #: Σ W², Σ ΔW² and Σ ΔŴ·ΔW, where ΔW is the update before and ΔŴ after the rounding.
    weight: float
    update: float
    kept: float
    #: Elements that are what they would be without the update.
    unchanged: int
    elements: int

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(
            self.weight + other.weight,
            self.update + other.update,
            self.kept + other.kept,
            self.unchanged + other.unchanged,
            self.elements + other.elements,
        )

    @property
    def relative_update(self) -> float:
        """‖ΔW‖ / ‖W‖; 0 where W is all zero."""
        return math.sqrt(self.update / self.weight) if self.weight else 0.0

    @property
    def share_kept(self) -> float:
        """How much of ΔW the rounding kept: the projection of ΔŴ on it. 1 where there is nothing to keep."""
        return self.kept / self.update if self.update else 1.0

    @property
    def share_unchanged(self) -> float:
        return self.unchanged / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """Says that a shard of a merge is finished and durable."""

    shard: str
    nbytes: int
    #: Of the whole file, header included: ``xxh3_128``, and ``sha256`` if the config says so.
    checksums: Mapping[str, str]
    #: The numbers of the adapters that had an effect on this shard: a factor B was not all zero.
    active_adapters: tuple[int, ...]
    #: By the tensor's name.
    fidelity: Mapping[str, Fidelity] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.fidelity, PackedMapping):
            object.__setattr__(self, "fidelity", PackedMapping(self.fidelity))

    def entry(self) -> dict[str, Any]:
        """The file's entry in the record."""
        return {"bytes": self.nbytes, **self.checksums}
