"""Match every adapter tensor to a base weight, or say why not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardmerge.adapter_file import AdapterFile
from shardmerge.adapters import FAMILIES, ModuleUpdate, leftover_kind
from shardmerge.checkpoint import Checkpoint
from shardmerge.config import AdapterConfig
from shardmerge.naming import nearest, stores_transposed
from shardmerge.spec import TensorRef, Update

#: Problems of one kind that are listed one by one; of the rest only the number is said.
_LISTED = 10
_HEAD = "lm_head.weight"


@dataclass(slots=True)
class Matches:
    """Updates by the name of their target weight, in the order in which they are applied."""

    updates: defaultdict[str, list[Update]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def match(checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterConfig, AdapterFile]]) -> Matches:
    """All updates of all adapters; every tensor of every adapter is in one of them or in a problem."""
    matches = Matches()
    for number, (config, adapter) in enumerate(adapters):
        where = f"adapter {config.path}"
        matches.problems += [
            f"{where}: {problem}" for problem in _match_one(matches, checkpoint, number, config, adapter)
        ]
    for updates in matches.updates.values():
        # A frozen copy is compared with the base, so it comes before anything has been added.
        updates.sort(key=lambda update: FAMILIES[update.family].changes_weight)
    return matches


def _match_one(
    matches: Matches, checkpoint: Checkpoint, number: int, config: AdapterConfig, adapter: AdapterFile
) -> list[str]:
    claims = adapter.claims(config)
    problems = _list_some(claims.problems)
    if claims.refused:
        return problems
    problems += _list_some(_empty(adapter.tensors))
    problems += _list_some(_leftover(claims.leftovers(adapter.tensors), checkpoint))
    if not claims.updates:
        return [*problems, "holds nothing that could be merged"]
    unmatched: list[str] = []
    misfits: list[str] = []
    matched: dict[str, ModuleUpdate] = {}
    for update in claims.updates:
        target = f"{update.module}.{update.parameter}"
        if target not in checkpoint.weights:
            unmatched.append(_unmatched(update, target, checkpoint))
        elif target in matched:
            names = " and ".join(of.factors[0][1].name for of in (matched[target], update))
            misfits.append(f"{names} both update {target}; a weight is updated once by an adapter")
        else:
            matched[target] = update
            misfits += _misfits(update, target, checkpoint)
            matches.updates[target].append(_update(number, update, target, config.weight))
    scalings = [update.scaling for update in claims.updates if FAMILIES[update.family].changes_weight]
    if scalings and not any(scaling * config.weight for scaling in scalings):
        matches.warnings.append(f"adapter {config.path}: every scaling is zero, so it changes nothing")
    return problems + _list_some(unmatched) + _list_some(misfits)


def _misfits(update: ModuleUpdate, target: str, checkpoint: Checkpoint) -> list[str]:
    if not update.fits or any(0 in ref.shape for _, ref in update.factors):
        return []  # said already
    family = FAMILIES[update.family]
    changes = family.changes_weight
    problems = family.check(update, checkpoint.weights[target].tensor)
    if not math.isfinite(update.scaling):
        problems.append(f"{update.module}: its scaling is {update.scaling}")
    if changes and stores_transposed(checkpoint.model_type):
        problems.append(
            f"{update.module}: {checkpoint.model_type} models store their layers transposed (Conv1D), which is not "
            "supported yet"
        )
    if changes and target.endswith(_HEAD) and checkpoint.ties_embeddings:
        problems.append(
            f"{update.module}: the base ties its output head to the input embedding (tie_word_embeddings in "
            "config.json), so an update of the head alone would be lost on loading; untying is not supported yet"
        )
    return problems


def _update(number: int, update: ModuleUpdate, target: str, weight: float) -> Update:
    scaling = update.scaling * weight
    return Update(number, update.family, update.module, target, update.factors, scaling, update.rank)


def _empty(tensors: Mapping[str, TensorRef]) -> list[str]:
    return [
        f"{ref.name} is empty, {list(ref.shape)}: it was saved under ZeRO-3 without gathering its parts; save it again "
        "from a gathered state dict"
        for ref in tensors.values()
        if 0 in ref.shape
    ]


def _leftover(names: Iterable[str], checkpoint: Checkpoint) -> list[str]:
    problems = []
    for name in names:
        kind = leftover_kind(name)
        problems.append(f"{name} belongs to no update{f': {kind}' if kind else _near(name, checkpoint)}")
    return problems


def _unmatched(update: ModuleUpdate, target: str, checkpoint: Checkpoint) -> str:
    factor = update.factors[0][1].name
    if target.endswith(_HEAD) and checkpoint.ties_embeddings:
        return (
            f"{factor} updates {target}, which the base does not store because it ties it to the input embedding; "
            "untying is not supported yet"
        )
    return f"{factor} updates {target}, which is not in the base{_near(target, checkpoint)}"


def _near(name: str, checkpoint: Checkpoint) -> str:
    found = nearest(name, checkpoint.weights)
    return f" (nearest: {', '.join(found)})" if found else ""


def _list_some(problems: Sequence[str]) -> list[str]:
    """The first problems of a kind; a wrong prefix gives the same one for every layer."""
    listed = list(problems[:_LISTED])
    if len(problems) > _LISTED:
        listed.append(f"… and {len(problems) - _LISTED} more like the last")
    return listed
