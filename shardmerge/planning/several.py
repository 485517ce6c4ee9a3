"""Several adapters on one tensor: their order, and conflicts where one would undo another."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.methods.base import Effect
from shardmerge.adapters.methods.whole import FrozenCopy, TokenSettings, whole_settings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.config.schema import AdapterConfig
from shardmerge.key_mapping.ties import Tie
from shardmerge.planning.unplaced import first_of
from shardmerge.spec.tensors import Orientation
from shardmerge.spec.updates import Region, Update

#: Problems of one kind that are listed one by one; of the rest only the number is said.
_LISTED = 10


def order_of(update: Update | ModuleUpdate) -> Effect:
    """The effect of an update; an adapter's updates of a weight are ordered by it."""
    return FAMILIES[update.family].effect


def replaces(update: Update | ModuleUpdate) -> bool:
    """Whether an update puts a whole tensor in the place of the base's."""
    return order_of(update) is Effect.REPLACES


def replaces_rows(update: Update | ModuleUpdate) -> bool:
    """Whether an update puts rows in the place of some of the base's."""
    return order_of(update) is Effect.REPLACES_ROWS


def in_order(updates: Sequence[Update]) -> list[Update]:
    """As they are applied: a frozen copy is compared with the base, so it comes before anything has been added."""
    if len(updates) == 1:
        return list(updates)
    return sorted(updates, key=lambda update: (order_of(update) > 0, update.adapter, order_of(update)))


def overlap(one: Region, other: Region) -> bool:
    """Whether two places in a stored tensor have a row in common."""
    if one.expert is not None and other.expert is not None and one.expert != other.expert:
        return False
    return one.stored_start < other.stored_start + other.rows and other.stored_start < one.stored_start + one.rows


def overlaps(regions: Mapping[str, Sequence[tuple[Region, ModuleUpdate]]]) -> list[str]:
    """Two modules by different names may be the same part of one stored tensor."""
    problems = []
    for target, of in regions.items():
        # A replaced tensor may be updated, too, but not replaced by two.
        for is_replaced in (True, False) if len(of) > 1 else ():
            like = [item for item in of if order_of(item[1]) and replaces(item[1]) == is_replaced]
            problems += [
                f"{first_of(first)} and {first_of(second)} both update {target}; a weight is updated once by an adapter"
                for first, second in _overlapping(like)
            ]
    return problems


def _overlapping(regions: Sequence[tuple[Region, ModuleUpdate]]) -> Iterator[tuple[ModuleUpdate, ModuleUpdate]]:
    """The first two updates of every expert that have a row in common."""
    by_expert: defaultdict[int | None, list[tuple[Region, ModuleUpdate]]] = defaultdict(list)
    for region, update in regions:
        by_expert[region.expert].append((region, update))
    everywhere = by_expert.pop(None, [])
    for group in by_expert.values() or [[]]:
        ordered = sorted([*everywhere, *group], key=lambda item: item[0].stored_start)
        for (one, first), (other, second) in itertools.pairwise(ordered):
            if overlap(one, other):
                yield first, second
                break


# --- copies of the base -----------------------------------------------------------------------------------------------


def compare_copies(
    updates: MutableMapping[str, list[Update]], ties: Sequence[Tie], adapters: Sequence[AdapterConfig]
) -> list[str]:
    """Make later adapters' copies of a weight comparisons, and say which cannot agree.

    PEFT saves the weight of an embedding that it wraps beside the factors, and puts it in the base's place when it
    loads them. The first adapter's copy does so here, too: it is what that adapter was trained on. A later one's
    must be the same, since it was not trained on anything else.
    """
    problems: list[str] = []
    tied = [tie.names for tie in ties]
    alone = [(name,) for name, of in updates.items() if len(of) > 1 and not any(name in names for names in tied)]
    for names in (*tied, *alone):
        of = sorted((u for name in names for u in updates.get(name, ()) if order_of(u)), key=lambda u: u.adapter)
        for copy in [u for u in of if whole_settings(u).copy and u.adapter > of[0].adapter]:
            mine = updates[copy.target]
            if not _is_replaced(mine, copy):
                problems += _other_size(copy, of, adapters)
                factors = (("copy", copy.factor("whole")),)
                mine[mine.index(copy)] = dataclasses.replace(copy, family=FrozenCopy.name, factors=factors)
    return list_some(problems)


def _is_replaced(updates: Sequence[Update], copy: Update) -> bool:
    """Whether an earlier adapter trained the whole weight, which would be lost; `undone` reports that."""
    return any(
        update.adapter < copy.adapter and replaces(update) and not whole_settings(update).copy for update in updates
    )


def _other_size(update: Update, of: Sequence[Update], adapters: Sequence[AdapterConfig]) -> Iterator[str]:
    """A copy of another number of rows than the weight has by then cannot be the same."""
    before = next(other for other in of if other.adapter < update.adapter and order_of(other))
    if FAMILIES[update.family].is_source and before.region.rows != update.region.rows:
        copy = update.factor("whole")
        yield (
            f"adapter {adapters[update.adapter].path}: {copy.name}, its copy of {update.target}, has "
            f"{update.region.rows} rows, but for adapter {adapters[before.adapter].path} it has {before.region.rows}: "
            "they were trained on different bases"
        )


# --- what is lost -----------------------------------------------------------------------------------------------------


def undone(updates: Mapping[str, Sequence[Update]], adapters: Sequence[AdapterConfig]) -> list[str]:
    """A whole tensor, or trained rows, in place of the base's would undo what an adapter before did to them."""
    problems = []
    for target, of_target in updates.items() if len(adapters) > 1 else ():
        lost = (
            (before, update)
            for update in of_target
            for before in of_target
            if before.adapter < update.adapter and order_of(before) and _undoes(update, before)
        )
        for before, update in itertools.islice(lost, 1):
            what = f"rows of {target}" if replaces_rows(update) else f"{target} whole"
            problems.append(
                f"adapter {adapters[update.adapter].path} replaces {what}, which would undo what adapter "
                f"{adapters[before.adapter].path} does to it; put it first, if that is what is meant"
            )
    return list_some(problems)


def _undoes(update: Update, before: Update) -> bool:
    if replaces(update):
        return overlap(before.region, update.region)
    if not replaces_rows(update) or whole_settings(before).copy:
        return False
    rows = set(TokenSettings.of(update).indices)
    if replaces_rows(before):
        return not rows.isdisjoint(TokenSettings.of(before).indices)
    region = before.region
    if any(of.orientation is Orientation.TRANSPOSED or of.shuffle for of in (region, update.region)):
        return True
    shift = update.region.stored_start - update.region.start
    return any(region.stored_start <= row + shift < region.stored_start + region.rows for row in rows)


def read_too_late(
    updates: Mapping[str, Sequence[Update]],
    read: Sequence[tuple[str, int, str]],
    adapters: Sequence[AdapterConfig],
) -> list[str]:
    """An update that is made from the base's own weight would not see what an adapter before it did to it.

    ``read`` has the stored tensor, the adapter's number, and a name for messages.
    """
    problems = []
    for target, number, name in read:
        before = [update.adapter for update in updates.get(target, ()) if order_of(update)]
        if before and min(before) < number:
            problems.append(
                f"adapter {adapters[number].path}: {name} needs {target} as it is in the base, which adapter "
                f"{adapters[min(before)].path} changes before; put it first, or merge one after the other"
            )
    return list_some(problems)


def list_some(problems: Sequence[str | Callable[[], str]]) -> list[str]:
    """The first problems of a kind; a wrong prefix gives the same one for every layer.

    A problem that takes a search to say is given as a function, so that only those that are listed are searched for.
    """
    listed = [problem if isinstance(problem, str) else problem() for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        listed.append(f"… and {len(problems) - _LISTED} more like the last")
    return listed
