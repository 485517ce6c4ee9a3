"""Totals over all tensors of a plan."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

from shardmerge.adapters.registry import FAMILIES
from shardmerge.spec.plans import ShardPlan, TargetKind, Totals


def totals_of(shards: Iterable[ShardPlan]) -> Totals:
    """Counts over all shards."""
    kinds: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    # A module of experts may be stored as many tensors.
    targets: dict[tuple[str, tuple[int, ...], str, int, int], dict[str, float]] = defaultdict(dict)
    updated, changed = 0, set()
    for tensor in itertools.chain.from_iterable(shard.tensors for shard in shards):
        kinds[tensor.out.dtype, tensor.out.shape, tensor.out.nbytes] += 1
        updated += bool(tensor.updates)
        for update in tensor.updates:
            if FAMILIES[update.family].changes_weight and FAMILIES[update.family].is_of_adapter:
                changed.add(tensor.source.name)
                kind = update.module.rpartition(".")[2]
                kind += "" if update.parameter == "weight" else f".{update.parameter}"
                of = targets[kind, update.shape, update.family, update.rank, update.adapter]
                of[update.module] = update.scaling
    return Totals(
        updated,
        len(changed),
        tuple((*kind, count) for kind, count in kinds.items()),
        tuple(TargetKind(*key, count=len(of), scalings=tuple(sorted(set(of.values())))) for key, of in targets.items()),
    )


def bytes_read(shards: Iterable[ShardPlan]) -> int:
    """Bytes of tensors and factors that are read to make these shards."""
    read = 0
    for tensor in itertools.chain.from_iterable(shard.tensors for shard in shards):
        read += tensor.source.nbytes
        for _, ref in tensor.parts:
            read += ref.nbytes
        for update in tensor.updates:
            if not FAMILIES[update.family].is_source:  # else it is the tensor's source already
                for _, ref in update.factors:
                    read += ref.nbytes
    return read
