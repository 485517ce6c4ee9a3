"""Match every adapter tensor to the stored tensors it updates, or say why not."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.methods.base import check_dtypes
from shardmerge.adapters.methods.whole import whole_settings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.registry import CODECS
from shardmerge.config.schema import AdapterConfig
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.heads import LABELS, head_for
from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.naming import nearest
from shardmerge.key_mapping.spoken import Speakers, Spoken
from shardmerge.planning.another_model import Fit, another_model
from shardmerge.planning.modules import KnownBase, Modules
from shardmerge.planning.quantised import has_packed, is_quantised
from shardmerge.planning.several import compare_copies, in_order, list_some, order_of, overlap, read_too_late
from shardmerge.planning.tied import stands_for
from shardmerge.planning.unplaced import Unplaced, already_there, beside_of, first_of, named
from shardmerge.planning.vocabulary import may_resize
from shardmerge.spec.notices import Warned, prefixed
from shardmerge.spec.tensors import FACTOR_DTYPES, FLOAT_DTYPES, TensorRef, Weight
from shardmerge.spec.updates import Parameter, Place, Update


@dataclass(slots=True)
class Matches:
    """Updates by the name of the stored tensor, in the order in which they are applied."""

    updates: defaultdict[str, list[Update]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Whole tensors for which the base has no place, as one made for training has none.
    unplaced: list[Unplaced] = field(default_factory=list)
    #: Tensors of the base that are factors, too: the stored tensor, the adapter's number, a name to speak of.
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


class _Matching:
    """The matching of one adapter."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Names,
        number: int,
        config: AdapterConfig,
        adapter: AdapterFile,
        matches: Matches,
    ) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.speakers = Speakers(names)
        self.modules = Modules(names, self.speakers, checkpoint.weights, config.prefix)
        self.spoken = self.speakers.own
        self.number = number
        self.config = config
        self.adapter = adapter
        self.head = head_for(checkpoint.config, (adapter.config or {}).get("task_type"))
        self.matches = matches
        self.fit = Fit()
        self.unmatched: list[Callable[[], str]] = []
        self.misfits: list[str] = []
        self.taken: dict[tuple[str, int], ModuleUpdate] = {}
        self.resized: dict[str, Parameter] = {}
        self.regions: defaultdict[str, list[tuple[Place, ModuleUpdate]]] = defaultdict(list)

    def run(self) -> list[str]:
        claims, unclear = self._understood()
        problems = [*unclear, *list_some(claims.problems)]
        if claims.refused:
            return problems
        tensors = self.adapter.chosen(self.config)
        beside = {ref.name: ref for update in claims.updates if beside_of(update) for _, ref in update.factors}
        problems += list_some(_empty({**tensors, **beside}, claims.accounted))
        problems += list_some([partial(self._leftover, name) for name in claims.leftovers(tensors)])
        if not claims.updates:
            return problems if claims.problems else [*problems, "holds nothing that could be merged"]
        # What replaces comes first: a resized embedding may then be updated.
        for update in sorted(claims.updates, key=order_of):
            self._match(update)
        self._find_overlaps()
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
        asked = self._base_view(self.speakers.own)
        claims = self.adapter.claims(self.config, asked)
        # A head that was made for training, and files beside the adapter, may have no place in any class's names.
        targets = [
            (self.modules.plain(update), update.parameter)
            for update in claims.updates
            if not (update.flattened or update.optional or beside_of(update) or self._of_head(update))
        ]
        self.spoken, unclear = self.speakers.chosen(targets, self.modules.exists)
        if self.spoken.note:
            if not asked.agrees_with(chosen := self._base_view(self.spoken)):
                claims = self.adapter.claims(self.config, chosen)
            self.matches.warnings.append(prefixed(self._who, self.spoken.note))
        return claims, [unclear] if unclear else []

    def _match(self, update: ModuleUpdate) -> None:
        found = self.modules.find(update, self.spoken)
        if isinstance(found, str):
            if found or not update.optional:
                self._place_nowhere(update, found)
            return
        update, parameter = found
        parameter = self.resized.get(parameter.name, parameter)
        oriented = update if _is_told(update) else FAMILIES[update.family].orient(update, parameter)
        if isinstance(oriented, str):
            self.misfits.append(named(update, oriented))
            return
        if FAMILIES[oriented.family].stacks_vectors and parameter.experts and len(parameter.shape) == 2:
            matrix = _as_matrix(parameter)
            if isinstance(matrix, str):
                self.misfits.append(f"{update.first}: {matrix}")
                return
            parameter = matrix
        if oriented.experts and not parameter.experts:
            parameter = _as_stack(parameter)
        completed = self._with_base(self._as_stored(oriented, parameter))
        if isinstance(completed, str):
            self.misfits.append(completed)
            return
        update = completed
        if self._is_taken(update, parameter):
            return
        wrong = [named(update, problem) for problem in self._misfits(update, parameter)]
        self.misfits += wrong
        self.fit.add(update, _shape(update, parameter), bool(wrong))
        if wrong or _is_told(update):
            return
        if FAMILIES[update.family].is_source and update.factor("whole").shape != _shape(update, parameter):
            rows = update.factor("whole").shape[0]
            parameter = dataclasses.replace(
                parameter,
                shape=(rows, *parameter.shape[1:]),
                places=(dataclasses.replace(parameter.places[0], rows=rows),),
            )
            self.resized[parameter.name] = parameter
        for place in parameter.places:
            new = self._update(update, parameter, place)
            if any(other.in_stack != new.in_stack for other in self.matches.updates[place.tensor]):
                self.misfits.append(
                    f"{update.first} updates {place.tensor} as one matrix and another adapter as experts', or the "
                    "other way round; merge one after the other"
                )
                return
            self.regions[place.tensor].append((place, update))
            self.matches.updates[place.tensor].append(new)

    def _place_nowhere(self, update: ModuleUpdate, why: str) -> None:
        """Say that an update has no place; of a whole tensor that was trained, one may yet be found."""
        problem = partial(self._unmatched, update, why)
        trained = whole_settings(update).saved or beside_of(update)
        if trained and not _is_told(update):
            self.matches.unplaced.append(Unplaced(self.number, update, why, problem))
        else:
            self.unmatched.append(problem)
            self.fit.absent += [update] if not why else []

    def _with_base(self, update: ModuleUpdate) -> ModuleUpdate | str:
        """The update with the base's own tensors that it needs among its factors; a string says why not."""
        for role, name in update.of_base:
            parameter = self.spoken.resolve(update.module, name)
            ref = None if isinstance(parameter, str) else self._as_factor(parameter)
            if isinstance(parameter, str) or ref is None:
                return (
                    f"{update.first} needs {update.module}.{name} as it is in the base, which does not store it as one "
                    "matrix by itself"
                )
            self.matches.read.append((parameter.places[0].tensor, self.number, update.first))
            update = update.changed(factors=(*update.factors, (role, ref)))
        return update

    def _as_stored(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate:
        """A whole tensor can only be the source where it is stored as it is; else it is written over the base's."""
        family = FAMILIES[update.family]
        if not family.is_source:
            return update
        place = parameter.places[0]
        plain = len(parameter.places) == 1 and place == Place(place.tensor, place.rows, transposed=update.transposes)
        stored = self._weight(place.tensor)
        all_of_it = math.prod(stored.tensor.shape) == math.prod(parameter.shape) and stored.stored_as is None
        return family.placed(update, can_be_source=plain and all_of_it)

    def _as_factor(self, parameter: Parameter) -> TensorRef | None:
        """A parameter of the base as a factor, in the matrix's orientation; None if it is not rows of one tensor."""
        place, stored = parameter.places[0], self._stored(parameter.places[0].tensor)
        if self._weight(place.tensor).stored_as is not None:
            return None
        if len(parameter.places) > 1 or place.expert is not None or place.shuffle or parameter.experts:
            return None
        if place.transposed:
            return stored.transposed() if stored.shape == parameter.shape[::-1] else None
        if stored.shape[1:] != parameter.shape[1:] or not stored.shape[0]:
            return None
        row = stored.nbytes // stored.shape[0]
        return dataclasses.replace(
            stored, shape=parameter.shape, offset=stored.offset + place.stored_start * row, nbytes=place.rows * row
        )

    def _is_taken(self, update: ModuleUpdate, parameter: Parameter) -> bool:
        """Whether the adapter has updated this parameter before. A replaced or compared one may be updated, too."""
        key = parameter.name, min(order_of(update), 2)
        other = self.taken.setdefault(key, update)
        if other is update:
            return False
        names = " and ".join(map(first_of, (other, update)))
        self.misfits.append(f"{names} both update {parameter.name}; a weight is updated once by an adapter")
        return True

    def _misfits(self, update: ModuleUpdate, parameter: Parameter) -> list[str]:
        if _is_told(update):
            return []
        family = FAMILIES[update.family]
        stored = [self._as_decoded(place.tensor) for place in parameter.places]
        problems = [problem for ref in stored for problem in check_dtypes(update, ref, family)][:1]
        told = [is_quantised(self.checkpoint, update.module, update.parameter, ref) for ref in stored]
        if packed := next(filter(None, told), None):
            return [packed]
        if family.is_source:
            problems = _dtype_of_whole(update, stored[0])
        problems += family.check(update, _shape(update, parameter))
        if not math.isfinite(update.scaling * self.config.weight):
            problems.append(
                f"{update.module}: its scaling of {update.scaling:g} times the weight {self.config.weight:g} is no "
                "number"
            )
        # A copy of what the adapter was trained on is no part of what it learned.
        is_copy = whole_settings(update).copy
        if self.config.weight != 1 and family.changes_weight and not family.adds and not is_copy:
            problems.append(
                f"{update.module}: weight {self.config.weight:g} has no meaning for {update.family}, which does "
                f"not add to the {update.parameter}; remove the weight"
            )
        by_columns = any(place.transposed != update.transposes for place in parameter.places)
        if by_columns and len(parameter.shape) > 1 and not family.by_column_windows:
            problems.append(
                f"{update.module}: the base stores its {update.parameter} transposed, which {update.family} cannot "
                "update"
            )
        if any(place.shuffle for place in parameter.places) and not family.rows_are_independent:
            problems.append(
                f"{update.module}: the base stores the rows of its {update.parameter} in another order, which "
                f"{update.family} cannot update"
            )
        unit = family.row_unit(update) if not problems else 1
        for place in parameter.places:
            if place.transposed == update.transposes and (place.start % unit or place.rows % unit):
                problems.append(
                    f"{update.module}: {update.family} updates {unit} rows together, but {place.tensor} stores rows "
                    f"{place.start} to {place.start + place.rows - 1} of its {update.parameter} by themselves"
                )
                break
        if family.is_source and not problems and not self._has_label_rows(update):
            problems += may_resize(self.checkpoint, update, stored[0])
        return problems

    def _of_head(self, update: ModuleUpdate) -> tuple[object, ...]:
        """The dimensions of a tensor of the head that the adapter's task has; () for any other."""
        shapes = {} if isinstance(self.head, str) else self.head.shapes
        return shapes.get(f"{update.module}.{update.parameter}", ())

    def _has_label_rows(self, update: ModuleUpdate) -> bool:
        """Whether the rows of a tensor are the labels of the base's own head, of which training may have had others."""
        is_there = not isinstance(self.head, str) and self.head.is_there
        return is_there and self._of_head(update)[:1] == (LABELS,)

    def _base_view(self, spoken: Spoken) -> KnownBase:
        return KnownBase(self.names, self.modules, self.speakers, self._as_decoded, spoken)

    def _weight(self, name: str) -> Weight:
        """A stored weight; of one that is tied and so not stored, the one that is."""
        weights = self.checkpoint.weights
        return weights[name if name in weights else stands_for(self.names, name) or name]

    def _stored(self, name: str) -> TensorRef:
        return self._weight(name).tensor

    def _as_decoded(self, name: str) -> TensorRef:
        """A stored weight with the dtype that its values have when they are decoded."""
        weight = self._weight(name)
        if weight.stored_as is None:
            return weight.tensor
        return dataclasses.replace(weight.tensor, dtype=CODECS[weight.stored_as.codec].values)

    def _update(self, update: ModuleUpdate, parameter: Parameter, place: Place) -> Update:
        shape = _shape(update, parameter)
        experts = shape[0] if _has_experts(update, parameter) else 0
        return Update(
            adapter=self.number,
            family=update.family,
            module=update.module,
            target=place.tensor,
            factors=update.factors,
            scaling=update.scaling * self.config.weight,
            rank=update.rank,
            shape=shape,
            place=place,
            parameter=update.parameter,
            experts=experts,
            transposes=update.transposes,
            settings=update.settings,
        )

    def _find_overlaps(self) -> None:
        """Two modules by different names may be the same part of one stored tensor."""
        for target, regions in self.regions.items():
            if len(regions) < 2:
                continue
            # A replaced tensor may be updated, too, but not replaced by two.
            kinds: defaultdict[int, list[tuple[Place, ModuleUpdate]]] = defaultdict(list)
            for place, update in regions:
                kinds[min(order_of(update), 2)].append((place, update))
            for kind in (1, 2):
                self._find_overlaps_of(target, kinds[kind])

    def _find_overlaps_of(self, target: str, regions: Sequence[tuple[Place, ModuleUpdate]]) -> None:
        by_expert: defaultdict[int | None, list[tuple[Place, ModuleUpdate]]] = defaultdict(list)
        for place, update in regions:
            by_expert[place.expert].append((place, update))
        everywhere = by_expert.pop(None, [])
        for group in by_expert.values() or [[]]:
            ordered = sorted([*everywhere, *group], key=lambda item: item[0].stored_start)
            for (one, first), (other, second) in itertools.pairwise(ordered):
                if overlap(one, other):
                    self.misfits.append(
                        f"{first_of(first)} and {first_of(second)} both update {target}; a weight is updated once by "
                        "an adapter"
                    )
                    break

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


def _is_told(update: ModuleUpdate) -> bool:
    """Whether it was said already that the factors do not fit each other or are empty; their shapes may be anything."""
    return not update.fits or any(0 in ref.shape for _, ref in update.factors)


def _dtype_of_whole(update: ModuleUpdate, stored: TensorRef) -> list[str]:
    """Floats replace floats, whatever their width; other numbers only their own kind."""
    whole = update.factor("whole")
    floats = whole.dtype in FACTOR_DTYPES and stored.dtype in FLOAT_DTYPES
    if floats or whole.dtype == stored.dtype:
        return []
    return [f"{whole.name} is stored as {whole.dtype}, but the base's {stored.name} as {stored.dtype}"]


def _as_matrix(parameter: Parameter) -> Parameter | str:
    """Experts' biases (E, n) as one matrix, which they are to LoRA; a string where they are stored in parts."""
    place, (experts, width) = parameter.places[0], parameter.shape
    if parameter.places != (Place(place.tensor, width),):
        return f"the base stores {parameter.name} in parts, which LoRA on all of it cannot update"
    return dataclasses.replace(parameter, places=(Place(place.tensor, experts),), experts=False)


def _has_experts(update: ModuleUpdate, parameter: Parameter) -> bool:
    return update.experts or parameter.experts


def _as_stack(parameter: Parameter) -> Parameter:
    """A tensor (E, rows, columns) whose name does not say so, seen as a stack of experts: they have its rows."""
    if len(parameter.shape) != 3:
        return parameter  # of which the family says that it does not hold experts' matrices
    places = tuple(dataclasses.replace(place, rows=parameter.shape[1]) for place in parameter.places)
    return dataclasses.replace(parameter, places=places, experts=True)


def _shape(update: ModuleUpdate, parameter: Parameter) -> tuple[int, ...]:
    """The shape of the matrix that the update speaks of."""
    shape = parameter.shape
    if not update.transposes or len(shape) < 2:
        return shape
    return (*shape[:-2], shape[-1], shape[-2])


def _empty(tensors: Mapping[str, TensorRef], told: Set[str]) -> list[str]:
    return [
        f"{ref.name} is empty, {list(ref.shape)}: it was saved under ZeRO-3 without gathering its parts; save it again "
        "from a gathered state dict"
        for ref in tensors.values()
        if 0 in ref.shape and ref.name not in told
    ]
