"""Heads that were created for training, such as a classifier on the checkpoint of a language model.

The trained model then has another class than the base (``LlamaForSequenceClassification`` instead of
``LlamaForCausalLM``), and PEFT saves its new head whole, by ``modules_to_save``. The output is what that class would
save: it contains the new head, leaves out heads that the class does not have (``lm_head``), and its config.json names
the class and its labels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.methods.whole import whole_settings
from shardmerge.adapters.registry import FAMILIES
from shardmerge.config.schema import AdapterConfig
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.heads import LABELS, Head, head_for
from shardmerge.key_mapping.names import Names
from shardmerge.planning.match import Matches, matched
from shardmerge.planning.several import list_some
from shardmerge.planning.unplaced import Unplaced, beside_of, without_place
from shardmerge.spec.notices import Warned
from shardmerge.spec.tensors import FACTOR_DTYPES, FLOAT_DTYPES, TensorRef
from shardmerge.spec.updates import Parameter, Region

Adapters = Sequence[tuple[AdapterConfig, AdapterFile]]


@dataclass(slots=True)
class Heads:
    """The changes for new heads: tensors to add, tensors to leave out, and keys of config.json."""

    #: The class that the output is, where it is not the base's.
    architecture: str | None = None
    added: list[TensorRef] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def resolve_heads(checkpoint: Checkpoint, names: Names, matches: Matches, adapters: Adapters) -> Heads:
    """Find places for whole tensors that have none in the base; ``matches.updates`` gets those that have one now."""
    heads = Heads()
    for number, (config, adapter) in enumerate(adapters):
        unplaced = [of for of in matches.unplaced if of.adapter == number]
        head = head_for(checkpoint.config, (adapter.config or {}).get("task_type"))
        one = _Resolving(checkpoint, names, matches, number, config, head)
        heads.problems += [f"adapter {config.path}: {problem}" for problem in one.run(unplaced, heads)]
    if heads.architecture and not heads.problems:
        heads.problems += _updates_of_none(checkpoint, matches, heads)
    return heads


@dataclass
class _Resolving:
    """The heads of one adapter."""

    checkpoint: Checkpoint
    names: Names
    matches: Matches
    number: int
    config: AdapterConfig
    #: That of its task.
    head: Head | str

    def run(self, unplaced: Sequence[Unplaced], heads: Heads) -> list[str]:
        """The problems of those that have no place."""
        head = self.head
        if isinstance(head, str):
            return _without_places(unplaced, head)
        mine = {_name(of.update): of for of in unplaced if not of.why and _name(of.update) in head.shapes}
        strange = [of for of in unplaced if mine.get(_name(of.update)) is not of]
        problems = _without_places(strange, f"{head.architecture}, which the adapter was trained for, has none either")
        there = self._there(head)
        if not mine and not self._trained(head):
            return problems
        if not mine and not head.is_there:
            heads.notes.append(
                Warned(
                    f"the adapter's task_type is that of a {head.architecture}, but the base is another class, and has "
                    "the head that was trained: so the output is what the base is"
                )
            )
            return problems
        shapes = {**there, **{name: of.update.factor("whole").shape for name, of in mine.items()}}
        problems += [*self._misfits(head, mine), *self._lacks(head, shapes)] if mine else []
        labels, wrong = _labels(head, shapes)
        problems += wrong
        if heads.architecture not in (None, head.architecture):
            problems.append(
                f"it makes a {head.architecture} of the base, and an adapter before it a {heads.architecture}"
            )
        if not problems:
            self._place(head, mine, heads, labels)
        return problems

    def _trained(self, head: Head) -> bool:
        """Whether this adapter has a tensor of the head that the base stores, too."""
        return any(
            update.adapter == self.number
            and whole_settings(update).saved
            and f"{update.module}.{update.parameter}" in head.shapes
            for of in self.matches.updates.values()
            for update in of
        )

    def _there(self, head: Head) -> dict[str, tuple[int, ...]]:
        """The shapes of the head's tensors that the base stores, as they will be."""
        found: dict[str, tuple[int, ...]] = {}
        for name in head.shapes:
            module, _, parameter = name.rpartition(".")
            stored = self.names.resolve(module, parameter)
            if isinstance(stored, Parameter):
                wholes = self.matches.updates.get(stored.regions[0].tensor, ())
                shapes = [update.factor("whole").shape for update in wholes if FAMILIES[update.family].is_source]
                found[name] = [stored.shape, *shapes][-1]
        return found

    def _misfits(self, head: Head, mine: Mapping[str, Unplaced]) -> list[str]:
        problems = []
        for name, of in mine.items():
            whole, wanted = of.update.factor("whole"), head.shapes[name]
            if len(whole.shape) != len(wanted) or any(
                size != found for size, found in zip(wanted, whole.shape, strict=False) if size != LABELS
            ):
                problems.append(f"{whole.name} is {list(whole.shape)}, but {head.architecture}'s is {list(wanted)}")
            if whole.dtype not in FACTOR_DTYPES:
                problems.append(f"{whole.name} is stored as {whole.dtype}; expected F64, F32, F16 or BF16")
            if whole.strides is not None:
                problems.append(f"{whole.name} is pickled as a view; save it with .contiguous()")
            if self.config.weight != 1:
                problems.append(f"weight {self.config.weight:g} has no meaning for {whole.name}, which adds to nothing")
        return problems

    def _lacks(self, head: Head, shapes: Mapping[str, Any]) -> list[str]:
        """Tensors of the class that neither base nor adapter stores: transformers would initialise them at random."""
        missing = [name for name in head.shapes if name not in shapes]
        for name in head.needs:
            module, _, parameter = name.rpartition(".")
            if not isinstance(self.names.resolve(module, parameter), Parameter):
                missing.append(name)
        return [
            f"it makes a {head.architecture} of the base, which has {name}, too; neither base nor adapter stores it"
            for name in missing
        ]

    def _place(self, head: Head, mine: Mapping[str, Unplaced], heads: Heads, labels: int | None) -> None:
        for name, of in mine.items():
            whole = of.update.factor("whole")
            region = Region(name, whole.shape[0])
            self.matches.updates[name].append(matched(of.update, self.number, self.config, region, whole.shape))
            # Of the base there is nothing in its place but the dtype.
            heads.added.append(TensorRef(name, whole.uri, _main_dtype(self.checkpoint), (0,), 0, 0))
        if labels is not None:
            heads.changes |= _label_changes(self.checkpoint.config, labels)
        if head.is_there:
            return
        heads.architecture = head.architecture
        heads.changes["architectures"] = [head.architecture]
        weights = self.checkpoint.weights
        heads.left_out |= {name for name in weights if head.is_of_another(self.names.in_memory(name))}
        heads.notes.append(_note(head, mine, heads.left_out, labels))


def _name(update: ModuleUpdate) -> str:
    return f"{update.module}.{update.parameter}"


def _without_places(unplaced: Sequence[Unplaced], reason: str) -> list[str]:
    """The problems of tensors without a place: one by one, or one for each file beside the adapter."""
    own = [of for of in unplaced if not beside_of(of.update)]

    def explained(of: Unplaced) -> Callable[[], str]:
        return lambda: of.problem() + ("" if of.why else f"; {reason}")

    problems = list_some([explained(of) for of in own])
    files: defaultdict[str, list[ModuleUpdate]] = defaultdict(list)
    for of in unplaced:
        if file := beside_of(of.update):
            files[file].append(of.update)
    return problems + [without_place(file, updates) for file, updates in files.items()]


def _labels(head: Head, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, list[str]]:
    """The number of labels that the head's tensors have; None where it is always the same."""
    found = {
        name: shapes[name][axis]
        for name, dims in head.shapes.items()
        for axis, dim in enumerate(dims)
        if dim == LABELS and len(shapes.get(name, ())) > axis
    }
    if len(set(found.values())) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in found.items())
        return None, [f"the tensors of its head have different numbers of labels: {counts}"]
    return next(iter(found.values()), None), []


def _label_changes(config: Mapping[str, Any], labels: int) -> dict[str, Any]:
    """The keys of config.json for the labels. The base's names of labels stay if it has as many."""
    names = config.get("id2label")
    changes: dict[str, Any] = {}
    if not isinstance(names, dict) or len(names) != labels:
        names = {str(number): f"LABEL_{number}" for number in range(labels)}
        changes = {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    if "num_labels" in config and config["num_labels"] != labels:
        changes["num_labels"] = labels
    return changes


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The float that most of the base is stored in: what PEFT's merge casts a saved module to."""
    sizes: Counter[str] = Counter()
    for weight in checkpoint.weights.values():
        if weight.tensor.dtype in FLOAT_DTYPES:
            sizes[weight.tensor.dtype] += weight.tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "F32"


def _note(head: Head, mine: Mapping[str, Unplaced], left_out: set[str], labels: int | None) -> str:
    without = f", without {', '.join(sorted(left_out))}, which it does not have" if left_out else ""
    of_labels = f" with {labels} labels" if labels is not None else ""
    return (
        f"the adapter was trained for a {head.architecture}{of_labels}, and so the output is one: it has "
        f"{', '.join(mine) or 'its head'}{without}, and config.json says so"
    )


def _updates_of_none(checkpoint: Checkpoint, matches: Matches, heads: Heads) -> list[str]:
    """Updates of tensors that the output's class does not have."""
    there = (checkpoint.weights.keys() - heads.left_out) | {ref.name for ref in heads.added}
    return [
        f"adapter updates {target}, which a {heads.architecture} does not have"
        for target, of in matches.updates.items()
        if of and target not in there
    ]
