"""Whole tensors of an adapter, or of a file beside it, that have no place in the base or duplicate an update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.methods.base import Effect
from shardmerge.adapters.methods.whole import whole_settings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.file_formats.adapter_file import way_out
from shardmerge.spec.updates import Region

#: Tensors of a file that are named; of the rest only the number is.
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A whole tensor for which the base has no place."""

    adapter: int
    update: ModuleUpdate
    #: Why, where the base has something of its name.
    why: str
    #: Says so; it takes a search.
    problem: Callable[[], str]


def beside_of(update: ModuleUpdate) -> str:
    """The file beside the adapter that an update is from; empty where it is the adapter's own."""
    return whole_settings(update).beside


def first_of(update: ModuleUpdate) -> str:
    """The name of one of an update's tensors, with that of the file where it is not the adapter's own."""
    file = beside_of(update)
    return f"{update.first} of {file}" if file else update.first


def named(update: ModuleUpdate, problem: str) -> str:
    """A problem of an update, with the file's name where that is not the adapter's own."""
    file = beside_of(update)
    return f"{file}: {problem}; if the model needs none of it, {way_out(file)}" if file else problem


def without_place(file: str, updates: Sequence[ModuleUpdate]) -> str:
    """The problem of a file beside an adapter, some of whose tensors have no place in the base."""
    names = ", ".join(f"{update.first} {list(update.factor('whole').shape)}" for update in updates[:_SHOWN])
    more = f" and {len(updates) - _SHOWN} more" if len(updates) > _SHOWN else ""
    return (
        f"{file} is beside the adapter, where trained weights are stored, and the base has no place for {names}{more}; "
        f"if the model needs none of it, {way_out(file)}"
    )


def already_there(regions: Mapping[str, Sequence[tuple[Region, ModuleUpdate]]]) -> list[str]:
    """Files beside the adapter that hold whole what the adapter also adds to: a copy of the base, or a merged model.

    What PEFT itself calls the wrapped layer's own weight (``.base_layer.``) is what the adapter adds to.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for target, of in regions.items():
        if len(of) < 2:
            continue
        updates = [update for _, update in of]
        effects = [FAMILIES[update.family].effect for update in updates]
        if max(effects) > Effect.REPLACES:
            whole = [update for update, does in zip(updates, effects, strict=True) if does is Effect.REPLACES]
            files = {beside_of(update) for update in whole if not whole_settings(update).copy}
            for file in files - {""}:
                found[file].append(target)
    return [
        f"{file} holds {', '.join(targets[:_SHOWN])}{', …' if len(targets) > _SHOWN else ''} whole, and the adapter "
        "updates the same: nothing says whether its update is in there already (as in a merged model) or is to be "
        f"added; if {file} is a merged model or a copy of the base, {way_out(file)}"
        for file, targets in sorted(found.items())
    ]
