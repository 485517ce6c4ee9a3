"""Everything that adapters change in a base: weights, added and removed tensors, keys of config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmerge.config.schema import AdapterConfig, MergeConfig
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.names import Names
from shardmerge.planning.base_rounding import BaseRounding
from shardmerge.planning.heads import resolve_heads
from shardmerge.planning.match import match
from shardmerge.planning.several import undone
from shardmerge.planning.untying import resolve_ties
from shardmerge.planning.vocabulary import resized
from shardmerge.spec.tensors import TensorRef
from shardmerge.spec.updates import Update


@dataclass(frozen=True, slots=True)
class Changes:
    """Updates by the name of the stored tensor, tensors that come and go, and keys of config.json."""

    updates: Mapping[str, Sequence[Update]]
    added: Sequence[TensorRef]
    left_out: Collection[str]
    config: dict[str, Any]
    problems: Sequence[str]
    notes: Sequence[str]


def changes_of(
    checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterConfig, AdapterFile]], config: MergeConfig
) -> Changes:
    """Match the adapters to the base; what of them cannot be merged is among the problems."""
    names = _names(checkpoint, checkpoint.config.get("architectures"))
    matches = match(checkpoint, names, adapters)
    heads = resolve_heads(checkpoint, names, matches, adapters)
    if heads.architecture is not None:  # what is tied in the output is what that class ties
        names = _names(checkpoint, [heads.architecture])
    settings = [adapter.config or {} for _, adapter in adapters]
    untied = resolve_ties(checkpoint, names, matches.updates, settings, config.tied)
    vocabulary, misfits = resized(checkpoint, matches.updates, untied.added, heads.left_out)
    lost = undone(matches.updates, config.adapters)
    rounding = BaseRounding(checkpoint, names, matches.updates, config)
    problems = [*checkpoint.problems, *matches.problems, *heads.problems, *lost, *untied.problems]
    return Changes(
        rounding.updates,
        [*untied.added, *heads.added],
        heads.left_out,
        {**untied.changes, **heads.changes, **({} if vocabulary is None else {"vocab_size": vocabulary})},
        [*problems, *misfits, *rounding.problems],
        [*heads.notes, *untied.notes, *matches.warnings, *rounding.notes],
    )


def _names(checkpoint: Checkpoint, architectures: Any) -> Names:
    config = {**checkpoint.config, "architectures": architectures}
    return Names(config, {name: weight.tensor.shape for name, weight in checkpoint.weights.items()})
