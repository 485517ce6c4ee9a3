"""Decide what an update of a tied weight does to the weights that are tied to it.

transformers stores tied weights once and ties them on loading: an output head to the input embedding, its bias to
another, encoders' embeddings to decoders'. One key, ``tie_word_embeddings``, controls all ties of a class. In
training, an adapter on one module does not change the others. ``tied: untie`` keeps that: every tied tensor is written
and the config says that they are no longer tied, so the merged model computes what base and adapter computed.
``tied: peft`` does what PEFT's merge does: everything is added to the one tensor, and it stays tied. ``tied: auto``
unties where transformers is known to respect the key, and asks elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shardmerge.adapters.methods.whole import TokenSettings, whole_settings
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.ties import Tie
from shardmerge.planning.quantised import DENSE_COPY
from shardmerge.planning.several import in_order, order_of, replaces, replaces_rows
from shardmerge.planning.tied import TIES_KEY, without_ties
from shardmerge.spec.notices import Warned
from shardmerge.spec.tensors import TensorRef
from shardmerge.spec.updates import Update

#: Models that scale their output by whether they say they are tied, or are tied whatever they say (transformers 5).
_NEVER_UNTIED = frozenset({"longt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5"})
#: Bytes of each of two tensors that are in memory while they are compared.
_BLOCK = 1 << 20

Updates = defaultdict[str, list[Update]]


@dataclass(slots=True)
class Untied:
    """The changes for ties: tensors to add, keys of config.json, notes and problems."""

    added: list[TensorRef] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def resolve_ties(
    checkpoint: Checkpoint, names: Names, updates: Updates, configs: Sequence[Mapping[str, Any]], mode: str
) -> Untied:
    """Decide about every tied weight that an adapter touches; ``updates`` is changed to fit.

    ``configs`` are the adapters', in their order; ``mode`` is auto, untie or peft.
    """
    return _Resolving(checkpoint, names, updates, configs, mode).run()


@dataclass
class _Resolving:
    """The outcome of a tie is keep (one tensor was trained for all its names), peft, untie, or refused."""

    checkpoint: Checkpoint
    names: Names
    updates: Updates
    configs: Sequence[Mapping[str, Any]]
    mode: str
    result: Untied = field(default_factory=Untied)

    def __post_init__(self) -> None:
        self.ties = self._all_ties()
        touched = [tie for tie in self.ties if any(self.updates.get(name) for name in tie.names)]
        self.joined = {tie: self._joined(tie) for tie in touched}

    def run(self) -> Untied:
        kinds = {tie: self._decide(tie) for tie in self.joined}
        self._decide_across()
        unties = "untie" in kinds.values()
        said = [self._said(tie) for tie, kind in kinds.items() if kind in ("untie", "peft")]
        for tie in self.ties:
            kind = kinds.get(tie, "keep")
            if unties and self._falls(tie):
                self._write_apart(tie, kind)
            elif kind != "refused" and tie in kinds:
                self._write_one(tie, kind)
        if unties:
            self.result.changes[TIES_KEY] = False
            self._note_untied([tie for tie, kind in kinds.items() if kind in ("untie", "peft")], said)
        return self.result

    # --- what is tied, and what is trained ---

    def _all_ties(self) -> list[Tie]:
        ties = [tie for tie in self.names.ties if tie.main in self.checkpoint.weights]
        if not self.names.knows_ties and len(ties) == 1 and not ties[0].others:
            unknown = [name for name, of in self.updates.items() if of and name not in self.checkpoint.weights]
            ties = [dataclasses.replace(ties[0], others=tuple(unknown))]
        return ties

    def _trained(self, name: str) -> list[Update]:
        """The updates that change a weight; a copy that is compared does not."""
        return [update for update in self.updates.get(name, ()) if order_of(update)]

    def _joined(self, tie: Tie) -> list[str]:
        """The names that are one tensor: one that is stored with other values is not tied, as transformers 5 loads it.

        Values are only read where something hangs on it.
        """
        stored = [name for name in tie.others if name in self.checkpoint.weights]
        apart = {name for name in stored if self._says_apart(name)}
        if self._hangs_on_values(tie):
            apart |= {name for name in stored if name not in apart and self._differ(tie.main, name)}
        return [name for name in tie.names if name not in apart]

    def _says_apart(self, name: str) -> bool:
        """As of T5 1.1: transformers 5 ignores the key, but sees from their values that the two are apart."""
        kind = self.checkpoint.model_type
        output = name.removesuffix(".weight").rpartition(".")[2] == "lm_head"
        return output and self.checkpoint.config.get(TIES_KEY) is False and (kind in _NEVER_UNTIED or kind == "mt5")

    def _hangs_on_values(self, tie: Tie) -> bool:
        if self.mode == "peft" or not self.names.knows_ties or self.checkpoint.model_type in _NEVER_UNTIED:
            return True
        return any(replaces(update) and self._is_shared(update) for name in tie.names for update in self._trained(name))

    def _differ(self, one: str, other: str) -> bool:
        """Whether two stored tensors are not the same bytes."""
        weights = self.checkpoint.weights[one], self.checkpoint.weights[other]
        first, second = (weight.tensor for weight in weights)
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return True
        read = self.checkpoint.source.read
        for start in range(0, first.nbytes, _BLOCK):
            size = min(_BLOCK, first.nbytes - start)
            if read(weights[0].shard, first.offset + start, size) != read(
                weights[1].shard, second.offset + start, size
            ):
                return True
        return False

    def _is_shared(self, update: Update) -> bool:
        """Whether the update is meant for the tied tensor, not for one module."""
        if replaces_rows(update):
            return True
        saved = whole_settings(update).saved
        ensured = bool(self.configs[update.adapter].get("ensure_weight_tying"))
        return replaces(update) and (not saved or ensured)

    # --- deciding ---

    def _decide(self, tie: Tie) -> str:
        joined = self.joined[tie]
        alone = [u for name in tie.names for u in self._trained(name) if not self._is_shared(u)]
        if self._stays_together(tie, joined):
            # What is stored apart is said to be: not every program compares the values.
            can = self.names.knows_ties and not self._why_tied(tie)
            return "untie" if alone and can and len(joined) < len(tie.names) else "keep"
        saved = any(replaces(update) and whole_settings(update).saved for update in alone)
        if not self.names.knows_ties:
            return self._decide_unknown(tie, saved)
        if self.mode == "peft" and not saved:
            return "peft"
        if why := self._why_tied(tie):
            way_out = "" if saved else "; tied: peft does as PEFT's merge does"
            self.result.problems.append(f"an adapter updates {self._said(tie)} alone, and {why}{way_out}")
            return "refused"
        return "untie"

    def _decide_unknown(self, tie: Tie, saved: bool) -> str:
        if self.mode == "peft" and not (saved and tie.others):
            return "peft"
        if self.mode != "auto" and tie.others:
            return "untie"
        whose = self.checkpoint.model_type or "the base"
        choose = (
            "choose tied: peft, which adds to the one tensor what was trained for either side, as PEFT's merge does, "
            "or tied: untie, which writes the output head as a tensor of its own and says so in config.json, if the "
            "model's code respects tie_word_embeddings: false"
        )
        if not tie.others:
            choose = (
                "what its output head is called is not known, so it cannot be written; tied: peft changes the one "
                "tensor, as PEFT's merge does"
            )
        self.result.problems.append(
            f"an adapter updates {self._said(tie)}, and whether {whose} ties an output head to it is up to the model's "
            f"code, which shardmerge does not know: {choose}"
        )
        return "refused"

    def _stays_together(self, tie: Tie, joined: Sequence[str]) -> bool:
        """Whether one tensor was trained for all of its names."""
        trained = {name: self._trained(name) for name in joined}
        if not any(trained.values()) or (len(joined) == 1 and tie.others):
            return True
        together = trained.pop(tie.source, [])
        if not together or not all(map(self._is_shared, together)):
            return False
        # Others' copies may be there, too, where PEFT saved the one tensor under several names.
        copies = [update for of in trained.values() for update in of]
        shape = together[0].factors[0][1].shape
        return all(update.factors[0][1].shape == shape and self._is_copy(update) for update in copies)

    def _is_copy(self, update: Update) -> bool:
        if replaces_rows(update):
            return TokenSettings.of(update).for_both_sides
        return replaces(update) and self._is_shared(update)

    def _why_tied(self, tie: Tie) -> str | None:
        """Why a tie cannot be undone."""
        kind = self.checkpoint.model_type
        if kind in _NEVER_UNTIED:
            return f"{kind} models cannot be untied: they scale their output, or not, by whether they are tied"
        if across := sorted(self.names.across - self._after.across):
            return (
                f"the model cannot be untied: so would {across[0]}, and how many are tied to it the model's code alone "
                "can say"
            )
        if parts := sorted(self.names.tied_in_parts - self._after.tied_in_parts):
            return f"the model cannot be untied: {parts[0]}, which is tied as well, is not stored as one tensor"
        if still := [name for name in self.joined[tie] if name in self._after.tied]:
            return f"{still[0]} stays tied whatever config.json says"
        return None

    @cached_property
    def _after(self) -> Names:
        """The names of the same checkpoint, untied."""
        return Names(without_ties(self.names.config), self.names.stored)

    def _falls(self, tie: Tie) -> bool:
        """Whether transformers unties the weights when config.json asks for it."""
        return not self.names.knows_ties or not self._after.tied.keys() & set(tie.others)

    def _decide_across(self) -> None:
        """A weight that is tied to those of other numbers has too many names for each to be written."""
        for name in [name for name, of in self.updates.items() if of and self.names.is_tied_across(name)]:
            if all(self._is_shared(update) for update in self._trained(name)):
                continue
            if self.mode == "peft":
                self.result.notes.append(Warned(f"tied: peft: {name} stays one tensor with those that are tied to it"))
                continue
            self.result.problems.append(
                f"an adapter updates {name}, to which the model ties the same of other numbers: how many there are, "
                "the model's code alone can say, so they cannot be written; tied: peft changes the one tensor, as "
                "PEFT's merge does"
            )

    # --- carrying out ---

    def _write_one(self, tie: Tie, kind: str) -> None:
        """The stored tensor is for all names; what is stored besides it gets the same."""
        joined = self.joined[tie]
        own = {name: self.updates.get(name, []) for name in tie.names}
        if kind == "peft":
            adding = [u for name in joined if name != tie.main for u in own[name] if not replaces(u)]
            one = [*own[tie.main], *adding, *self._seen(tie.main, tie, joined, own)]
            self.result.notes.append(
                Warned(
                    f"tied: peft: {' and '.join(joined)} stay one tensor, and what the adapters do to either is done "
                    "to both, as PEFT's merge does it; the unmerged model computes something else"
                )
            )
        else:
            compared = [u for name in joined for u in own[name] if not order_of(u) and name != tie.source]
            one = [*(own[tie.source] if self._trained(tie.source) else own[tie.main]), *compared]
        for name in tie.names:
            if name not in self.checkpoint.weights:
                self.updates.pop(name, None)
            elif name == tie.main or (kind == "peft" and name in joined):
                self._set(name, one)
            else:
                self._set(name, [*own[name], *self._seen(name, tie, joined, own)])

    def _write_apart(self, tie: Tie, kind: str) -> None:
        """Every name has a tensor of its own, with what was trained for it and what it saw of the others."""
        joined = self.joined.get(tie, tie.names)
        own = {name: self.updates.get(name, []) for name in tie.names}
        for name in tie.names:
            stored = name in self.checkpoint.weights
            if kind == "keep" and not stored and name != tie.source:
                # Of one tensor that was trained for all names, the source's word is taken.
                own = {**own, name: [update for update in own[name] if not order_of(update)]}
            main = self.checkpoint.weights[tie.main]
            if not stored and main.stored_as is not None:
                self.result.problems.append(
                    f"{main.name} is stored as {main.stored_as.codec}, of which {name} cannot be written apart; "
                    + DENSE_COPY
                )
                self.updates.pop(name, None)
                continue
            self._set(name, [*own[name], *self._seen(name, tie, joined, own)])
            if not stored:
                self.result.added.append(dataclasses.replace(main.tensor, name=name))

    def _seen(self, name: str, tie: Tie, joined: Sequence[str], own: Mapping[str, list[Update]]) -> list[Update]:
        """The updates of the other names that reach a name through the tie.

        Trained tokens of the source are seen by all, for which PEFT asks the class and not the values. A whole tensor
        that PEFT saved for one name says what the one tensor was in training.
        """
        found: list[Update] = []
        others = [tie.source, *(other for other in joined if other != tie.source)]
        for update in [update for other in others if other != name for update in own.get(other, ())]:
            tokens = replaces_rows(update) and update.target == tie.source
            whole = replaces(update) and self._is_shared(update) and name in joined
            if (tokens or whole) and not self._is_known(update, [*own[name], *found]):
                found.append(update)
        return found

    def _is_known(self, update: Update, others: Sequence[Update]) -> bool:
        """Whether an update means nothing to a weight that has these."""
        if whole_settings(update).copy and any(other.adapter < update.adapter for other in others):
            return True  # what the base was when the adapter was trained says nothing of what others did to it
        return any(other.adapter == update.adapter and order_of(other) == order_of(update) for other in others)

    def _set(self, name: str, updates: Sequence[Update]) -> None:
        if updates or name in self.updates:
            regions = [dataclasses.replace(update.region, tensor=name) for update in updates]
            on = [
                dataclasses.replace(u, target=name, region=region) for u, region in zip(updates, regions, strict=True)
            ]
            self.updates[name] = in_order(on)

    def _said(self, tie: Tie) -> str:
        return " and ".join(name for name in tie.names if self._trained(name))

    def _note_untied(self, ties: Sequence[Tie], said: Sequence[str]) -> None:
        for tie, touched in zip(ties[:1], said, strict=False):
            more = f" (and so with {len(ties) - 1} more)" if ties[1:] else ""
            others = " and ".join(tie.others)
            self.result.notes.append(
                f"the base ties {others} to {tie.main}, and an adapter updates {touched}{more}: each is written "
                "as a tensor of its own, and config.json says tie_word_embeddings: false, so that the merged model "
                "computes what base and adapter computed (tied: peft does as PEFT's merge does)"
            )
        rest = sorted({ref.name for ref in self.result.added} - {name for tie in ties for name in tie.names})
        if rest:
            more = f" and {len(rest) - 3} more" if rest[3:] else ""
            self.result.notes.append(
                f"the same key ties {', '.join(rest[:3])}{more}, so tensors are written for these, too"
            )
