"""Measure how much of an update survives the rounding.

bfloat16 has 8 significant bits. An update far below half a unit of the weights that it is added to leaves most of them
unchanged, and then the merged model is not base + adapter. So a sample of each updated tensor is compared while it is
merged: ΔW = W' − W before the rounding, and what is left of it after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.rounding import TORCH_DTYPES
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.receipts import Fidelity
from shardmerge.spec.tensors import RowRange

#: One tile of so many is sampled, at least one and at most a few of a tensor, and so many elements of a tile.
_ONE_OF = 16
_MOST = 4
_ELEMENTS = 1 << 13


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of a tile, every ``step``-th, as they were before the update."""

    step: int
    before: Tensor


def sampled_rows(tensor: TensorPlan) -> frozenset[int]:
    """The first rows of the tiles that are sampled, evenly spread."""
    starts = [rows.start for rows in tensor.ranges()] if _is_changed(tensor) else []
    count = min(max(1, len(starts) // _ONE_OF), _MOST, len(starts))
    return frozenset(starts[len(starts) * (2 * part + 1) // (2 * count)] for part in range(count))


class Sampler:
    """Samples the tensors of a shard. Threads may share it, as each only appends to a list."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, int, Fidelity]] = []

    def before(self, stored: Tensor) -> Sample:
        """Copy the sample of a tile before its updates."""
        step = max(1, stored.numel() // _ELEMENTS)
        return Sample(step, stored[::step].to(torch.float32, copy=True))

    def after(self, tensor: TensorPlan, rows: RowRange, sample: Sample, exact: Tensor, rounded: Tensor) -> None:
        """Compare the sample with its updated rows, before and after they were rounded."""
        before, merged, stored = (of.flatten().to(torch.float32) for of in (sample.before, exact, rounded))
        if not bool((finite := torch.isfinite(before)).all()):  # an infinity that stays is not an update
            before, merged, stored = (torch.where(finite, of, 0.0) for of in (before, merged, stored))
        update = merged - before
        # What the base itself loses in a narrower dtype is not a loss of the update's.
        without = before
        if tensor.out.dtype in TORCH_DTYPES:
            without = before.to(TORCH_DTYPES[tensor.out.dtype]).to(torch.float32)
        kept = stored - without
        seen = Fidelity(
            weight=float(before.dot(before)),
            update=float(update.dot(update)),
            kept=float(kept.dot(update)),
            unchanged=before.numel() - int(kept.count_nonzero()),
            elements=before.numel(),
        )
        self._seen.append((tensor.source.name, rows.start, seen))

    def take(self) -> Mapping[str, Fidelity]:
        """The samples since the last call, by the tensor's name, whatever the order of the threads."""
        seen, self._seen = sorted(self._seen, key=lambda item: item[:2]), []
        result: dict[str, Fidelity] = {}
        for name, _, fidelity in seen:
            result[name] = result[name] + fidelity if name in result else fidelity
        return result


def _is_changed(tensor: TensorPlan) -> bool:
    """Whether updates change numbers of the base. Of a tensor that replaces it, nothing can be lost."""
    families = [FAMILIES[update.family] for update in tensor.updates]
    return any(of.changes_weight for of in families) and not any(of.is_source for of in families)
