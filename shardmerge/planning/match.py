"""Match every adapter tensor to a base weight, or say why not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from shardmerge.adapter_file import AdapterFile
from shardmerge.adapters import FAMILIES, ModuleUpdate, leftover_kind
from shardmerge.checkpoint import Checkpoint
from shardmerge.config import AdapterConfig
from shardmerge.naming import nearest, stores_transposed
from shardmerge.spec import TensorRef, Update

#: Problems of one kind that are listed one by one; of the rest only the number is said.
_LISTED = 10


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
    problems += _list_some([partial(_leftover, name, checkpoint) for name in claims.leftovers(adapter.tensors)])
    if not claims.updates:
        return problems if claims.problems else [*problems, "holds nothing that could be merged"]
    unmatched: list[Callable[[], str]] = []
    misfits: list[str] = []
    matched: dict[tuple[str, bool], ModuleUpdate] = {}
    for update in claims.updates:
        target = f"{update.module}.{update.parameter}"
        # A frozen copy goes with the update of the weight that it is a copy of.
        key = target, FAMILIES[update.family].changes_weight
        if target not in checkpoint.weights:
            unmatched.append(partial(_unmatched, update, target, checkpoint))
        elif key in matched:
            names = " and ".join(of.factors[0][1].name for of in (matched[key], update))
            misfits.append(f"{names} both update {target}; a weight is updated once by an adapter")
        else:
            matched[key] = update
            wrong = _misfits(update, target, config.weight, checkpoint)
            misfits += wrong
            if update.fits and not wrong:
                matches.updates[target].append(_update(number, update, target, config.weight))
    scalings = [update.scaling for update in claims.updates if FAMILIES[update.family].changes_weight]
    if scalings and not any(scaling * config.weight for scaling in scalings):
        matches.warnings.append(f"adapter {config.path}: every scaling is zero, so it changes nothing")
    return problems + _list_some(unmatched) + _list_some(misfits)


def _misfits(update: ModuleUpdate, target: str, weight: float, checkpoint: Checkpoint) -> list[str]:
    if not update.fits or any(0 in ref.shape for _, ref in update.factors):
        return []  # said already
    family = FAMILIES[update.family]
    changes = family.changes_weight
    problems = family.check(update, checkpoint.weights[target].tensor)
    if not math.isfinite(update.scaling * weight):
        problems.append(f"{update.module}: its scaling of {update.scaling:g} times the weight {weight:g} is no number")
    if changes and stores_transposed(checkpoint.model_type):
        problems.append(
            f"{update.module}: {checkpoint.model_type} models store their layers transposed (Conv1D), which is not "
            "supported yet"
        )
    if changes and _is_head(target) and checkpoint.ties_embeddings:
        problems.append(
            f"{update.module}: the base ties its output head to the input embedding (tie_word_embeddings in "
            "config.json), so an update of the head alone would be lost on loading; untying is not supported yet"
        )
    return problems


def _is_head(target: str) -> bool:
    return f".{target}".endswith(".lm_head.weight")


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


def _leftover(name: str, checkpoint: Checkpoint) -> str:
    kind = leftover_kind(name)
    return f"{name} belongs to no update{f': {kind}' if kind else _near(name, checkpoint)}"


def _unmatched(update: ModuleUpdate, target: str, checkpoint: Checkpoint) -> str:
    factor = update.factors[0][1].name
    if _is_head(target) and checkpoint.ties_embeddings:
        return (
            f"{factor} updates {target}, which the base does not store because it ties it to the input embedding; "
            "untying is not supported yet"
        )
    return f"{factor} updates {target}, which is not in the base{_near(target, checkpoint)}"


def _near(name: str, checkpoint: Checkpoint) -> str:
    found = nearest(name, checkpoint.weights)
    return f" (nearest: {', '.join(found)})" if found else ""


def _list_some(problems: Sequence[str | Callable[[], str]]) -> list[str]:
    """The first problems of a kind; a wrong prefix gives the same one for every layer.

    A problem that takes a search to say is given as a function, so that only those that are listed are searched for.
    """
    listed = [problem if isinstance(problem, str) else problem() for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        listed.append(f"… and {len(problems) - _LISTED} more like the last")
    return listed
