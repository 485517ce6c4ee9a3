"""Match every adapter tensor to the stored tensors it updates, or say why not."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.methods.base import Effect
from shardmerge.adapters.methods.whole import whole_settings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.config.schema import AdapterConfig
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.class_names import ModelClasses, NamesOfClass, examples_of
from shardmerge.key_mapping.heads import head_for
from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.naming import nearest
from shardmerge.planning.another_model import Fit, another_model
from shardmerge.planning.fitting import Fitting, StoredWeights, as_matrix, as_stack, has_experts, is_refused, shape_of
from shardmerge.planning.modules import KnownBase, Modules
from shardmerge.planning.quantised import has_packed, scaled
from shardmerge.planning.several import compare_copies, in_order, list_some, order_of, overlaps, read_too_late
from shardmerge.planning.unplaced import Unplaced, already_there, beside_of, first_of, named
from shardmerge.spec.notices import Warned, prefixed
from shardmerge.spec.tensors import TensorRef, Weight
from shardmerge.spec.updates import Parameter, Region, Update

#: What an update says besides names and factors.
_SAID = attrgetter(
    *("family", "scaling", "rank", "fits", "settings", "orientation"),
    *("in_memory", "experts", "flattened", "or_parameter"),
)


@dataclass(slots=True)
class Matches:
    """Updates by the name of the stored tensor, in the order in which they are applied."""

    updates: defaultdict[str, list[Update]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Whole tensors for which the base has no place, as one made for training has none.
    unplaced: list[Unplaced] = field(default_factory=list)
    #: Tensors of the base that are factors, too: the stored tensor, the adapter's number, a name for messages.
    read: list[tuple[str, int, str]] = field(default_factory=list)


def match(checkpoint: Checkpoint, names: Names, adapters: Sequence[tuple[AdapterConfig, AdapterFile]]) -> Matches:
    """All updates of all adapters; every tensor of every adapter is in one of them or in a problem."""
    matches = Matches()
    for number, (config, adapter) in enumerate(adapters):
        one = _Matching(checkpoint, names, number, config, adapter, matches)
        matches.problems += [f"adapter {config.path}: {problem}" for problem in one.run()]
    configs = [config for config, _ in adapters]
    matches.problems += compare_copies(matches.updates, names.ties, configs)
    for target, updates in matches.updates.items():
        matches.updates[target] = in_order(updates)
    matches.problems += read_too_late(matches.updates, matches.read, configs)
    return matches


@dataclass
class _Matching:
    """The matching of one adapter."""

    checkpoint: Checkpoint
    names: Names
    number: int
    config: AdapterConfig
    adapter: AdapterFile
    matches: Matches

    def __post_init__(self) -> None:
        self.classes = ModelClasses(self.names)
        self.modules = Modules(self.names, self.classes, self.checkpoint.weights, self.config.prefix)
        self.class_names = self.classes.own
        head = head_for(self.checkpoint.config, (self.adapter.config or {}).get("task_type"))
        self.stored = StoredWeights(self.checkpoint, self.names)
        self.fitting = Fitting(self.stored, self.config.weight, head)
        self.fit = Fit()
        self.unmatched: list[Callable[[], str]] = []
        self.misfits: list[str] = []
        self.taken: dict[tuple[str, int], ModuleUpdate] = {}
        self.resized: dict[str, Parameter] = {}
        self.regions: defaultdict[str, list[tuple[Region, ModuleUpdate]]] = defaultdict(list)
        self.scaled = scaled(self.checkpoint.weights)
        #: The first update of every kind as it was placed; None where others are not placed like it.
        self.firsts: dict[object, Update | None] = {}

    def run(self) -> list[str]:
        claims, unclear = self._understood()
        problems = [*unclear, *list_some(claims.problems)]
        if claims.refused:
            return problems
        tensors = self.adapter.chosen(self.config)
        from_files = (update for update in claims.updates if update.settings is not None and beside_of(update))
        beside = {ref.name: ref for update in from_files for _, ref in update.factors}
        problems += list_some(_empty({**tensors, **beside}, claims.accounted))
        problems += list_some([partial(self._leftover, name) for name in claims.leftovers(tensors)])
        if not claims.updates:
            return problems if claims.problems else [*problems, "holds nothing that could be merged"]
        # What replaces comes first: a resized embedding may then be updated.
        for update in sorted(claims.updates, key=order_of):
            self._match(update)
        self.misfits += overlaps(self.regions)
        self.misfits += already_there(self.regions)
        if several := self.modules.problem():
            problems.append(several)
        self.matches.warnings += [prefixed(self._who, warning) for warning in claims.warnings]
        adding = [update for update in claims.updates if FAMILIES[update.family].adds]
        only = all(FAMILIES[update.family].adds or not order_of(update) for update in claims.updates)
        if only and adding and not any(update.scaling * self.config.weight for update in adding):
            self.matches.warnings.append(Warned(f"{self._who}every scaling is zero, so it changes nothing"))
        another = another_model(self.fit, self.checkpoint, self.adapter.trained_on)
        return another + problems + list_some(self.unmatched) + list_some(self.misfits)

    @property
    def _who(self) -> str:
        return f"adapter {self.config.path}: "

    def _understood(self) -> tuple[Claims, list[str]]:
        """The adapter's claims, once it is known whose names it has; and why that is not certain."""
        asked = self._base_view(self.classes.own)
        claims = self.adapter.claims(self.config, asked)
        # A head that was made for training, and files beside the adapter, may have no place in any class's names.
        of_head = self.fitting.head_shapes
        targeted = (
            (update.module, update.parameter)
            for update in claims.updates
            if not (update.flattened or update.optional or (update.settings and beside_of(update)))
            and not (of_head and of_head.get(f"{update.module}.{update.parameter}"))
        )
        targets = [(self.modules.plain(*target), target[1]) for target in examples_of(targeted)]
        self.class_names, unclear = self.classes.chosen(targets, self.modules.exists)
        if self.class_names.note:
            if not asked.agrees_with(chosen := self._base_view(self.class_names)):
                claims = self.adapter.claims(self.config, chosen)
            self.matches.warnings.append(prefixed(self._who, self.class_names.note))
        return claims, [unclear] if unclear else []

    def _match(self, update: ModuleUpdate) -> None:
        """Place an update. Layers and experts repeat: of updates that differ in names only, one is checked."""
        stored = self.checkpoint.weights.get(f"{update.module}.{update.parameter}")
        kind = None if stored is None else self._kind(update, stored)
        if stored is None or kind is None:
            self._place(update)
        elif (first := self.firsts.get(kind)) is None:
            self.firsts[kind] = self._place(update)
        elif not self._place_like(update, first, stored.name):
            self._place(update)

    def _kind(self, update: ModuleUpdate, stored: Weight) -> object | None:
        """The same for updates that are placed alike, each on the ``stored`` weight that is named as its parameter.

        `Family.check` and all other checks of an update depend on its shapes, dtypes and settings, never on names. None
        where an update has to be checked by itself.
        """
        template = self.names.stands(stored.name)
        if template is None or update.of_base or FAMILIES[update.family].is_source or stored.name in self.resized:
            return None
        if stored.stored_as is not None or update.module in self.scaled:
            return None
        ref, parts = stored.tensor, [(role, of.dtype, of.shape, of.strides) for role, of in update.factors]
        return (template, ref.dtype, ref.shape, *parts, _SAID(update))

    def _place_like(self, update: ModuleUpdate, first: Update, name: str) -> bool:
        """Place an update on ``name`` as the ``first`` of its kind was placed; whether that is possible."""
        key = name, min(order_of(update), Effect.REPLACES_ROWS)
        if key in self.taken or self.matches.updates.get(name):
            return False
        self.taken[key] = update
        self.fit.fitting.append(update)
        region = Region(name, first.region.rows, orientation=first.region.orientation)
        self.regions[name].append((region, update))
        if update.orientation is not first.orientation:  # as its family found out of the first
            update = update.changed(orientation=first.orientation)
        self.matches.updates[name].append(matched(update, self.number, self.config, region, first.shape, first.experts))
        return True

    def _place(self, update: ModuleUpdate) -> Update | None:
        """Place an update; what became of it if others of its kind become the same, each on its own tensor."""
        wanted = update.module, update.parameter, update.family, update.factors
        found = self.modules.find(update, self.class_names)
        if isinstance(found, str):
            if found or not update.optional:
                self._place_nowhere(update, found)
            return None
        update, parameter = found
        parameter = self.resized.get(parameter.name, parameter)
        oriented = update if is_refused(update) else FAMILIES[update.family].orient(update, parameter)
        if isinstance(oriented, str):
            self.misfits.append(named(update, oriented))
            return None
        if FAMILIES[oriented.family].stacks_vectors and parameter.experts and len(parameter.shape) == 2:
            matrix = as_matrix(parameter)
            if isinstance(matrix, str):
                self.misfits.append(f"{update.first}: {matrix}")
                return None
            parameter = matrix
        if oriented.experts and not parameter.experts:
            parameter = as_stack(parameter)
        completed = self._with_base(self._as_stored(oriented, parameter))
        if isinstance(completed, str):
            self.misfits.append(completed)
            return None
        update = completed
        if self._is_taken(update, parameter):
            return None
        wrong = [named(update, problem) for problem in self.fitting.problems(update, parameter)]
        self.misfits += wrong
        self.fit.add(update, shape_of(update, parameter), bool(wrong))
        if wrong or is_refused(update):
            return None
        if FAMILIES[update.family].is_source and update.factor("whole").shape != shape_of(update, parameter):
            rows = update.factor("whole").shape[0]
            parameter = dataclasses.replace(
                parameter,
                shape=(rows, *parameter.shape[1:]),
                regions=(dataclasses.replace(parameter.regions[0], rows=rows),),
            )
            self.resized[parameter.name] = parameter
        shape = shape_of(update, parameter)
        experts = shape[0] if has_experts(update, parameter) else 0
        for region in parameter.regions:
            new = matched(update, self.number, self.config, region, shape, experts)
            if any(other.in_stack != new.in_stack for other in self.matches.updates[region.tensor]):
                self.misfits.append(
                    f"{update.first} updates {region.tensor} as one matrix and another adapter as experts', or the "
                    "other way round; merge one after the other"
                )
                return None
            self.regions[region.tensor].append((region, update))
            self.matches.updates[region.tensor].append(new)
        name = f"{update.module}.{update.parameter}"
        plain = (Region(name, region.rows, orientation=region.orientation),)
        is_like_others = wanted == (update.module, update.parameter, update.family, update.factors)
        return new if is_like_others and parameter.name == name and parameter.regions == plain else None

    def _place_nowhere(self, update: ModuleUpdate, why: str) -> None:
        """Say that an update has no place; of a whole tensor that was trained, one may yet be found."""
        problem = partial(self._unmatched, update, why)
        trained = whole_settings(update).saved or beside_of(update)
        if trained and not is_refused(update):
            self.matches.unplaced.append(Unplaced(self.number, update, why, problem))
        else:
            self.unmatched.append(problem)
            self.fit.absent += [update] if not why else []

    def _with_base(self, update: ModuleUpdate) -> ModuleUpdate | str:
        """Add the base's own tensors that an update needs to its factors; a string says why that is impossible."""
        for role, name in update.of_base:
            parameter = self.class_names.resolve(update.module, name)
            ref = None if isinstance(parameter, str) else self.stored.as_factor(parameter)
            if isinstance(parameter, str) or ref is None:
                return (
                    f"{update.first} needs {update.module}.{name} as it is in the base, which does not store it as one "
                    "matrix by itself"
                )
            self.matches.read.append((parameter.regions[0].tensor, self.number, update.first))
            update = update.changed(factors=(*update.factors, (role, ref)))
        return update

    def _as_stored(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate:
        """A whole tensor can only be the source where it is stored as it is; else it is written over the base's."""
        family = FAMILIES[update.family]
        if not family.is_source:
            return update
        region = parameter.regions[0]
        plain = len(parameter.regions) == 1 and region == Region(
            region.tensor, region.rows, orientation=update.orientation
        )
        stored = self.stored.weight(region.tensor)
        all_of_it = math.prod(stored.tensor.shape) == math.prod(parameter.shape) and stored.stored_as is None
        return family.as_applied(update, can_be_source=plain and all_of_it)

    def _is_taken(self, update: ModuleUpdate, parameter: Parameter) -> bool:
        """Whether the adapter has updated this parameter before. A replaced or compared one may be updated, too."""
        key = parameter.name, min(order_of(update), 2)
        other = self.taken.setdefault(key, update)
        if other is update:
            return False
        names = " and ".join(map(first_of, (other, update)))
        self.misfits.append(f"{names} both update {parameter.name}; a weight is updated once by an adapter")
        return True

    def _base_view(self, class_names: NamesOfClass) -> KnownBase:
        return KnownBase(self.names, self.modules, self.classes, self.stored.decoded, class_names)

    def _leftover(self, name: str) -> str:
        return f"{name} belongs to no update{self._near(name)}"

    def _unmatched(self, update: ModuleUpdate, why: str) -> str:
        if why:
            return f"{update.first}: {why}"
        if packed := has_packed(self.checkpoint, update.module, update.parameter):
            return packed
        target = f"{update.module}.{update.parameter}"
        return f"{update.first} updates {target}, which is not in the base{self._near(target)}"

    def _near(self, name: str) -> str:
        found = nearest(name, self.checkpoint.weights)
        return f" (nearest: {', '.join(found)})" if found else ""


def matched(
    update: ModuleUpdate, number: int, config: AdapterConfig, region: Region, shape: tuple[int, ...], experts: int = 0
) -> Update:
    """An update of adapter ``number`` that has found its place."""
    return Update(
        adapter=number,
        family=update.family,
        module=update.module,
        target=region.tensor,
        factors=update.factors,
        scaling=update.scaling * config.weight,
        rank=update.rank,
        shape=shape,
        region=region,
        parameter=update.parameter,
        experts=experts,
        orientation=update.orientation,
        settings=update.settings,
    )


def _empty(tensors: Mapping[str, TensorRef], accounted: Set[str]) -> list[str]:
    return [
        f"{ref.name} is empty, {list(ref.shape)}: it was saved under ZeRO-3 without gathering its parts; save it again "
        "from a gathered state dict"
        for ref in tensors.values()
        if 0 in ref.shape and ref.name not in accounted
    ]
