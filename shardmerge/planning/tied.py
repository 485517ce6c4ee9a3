"""An output head that is the input embedding: what an update of one of the two means.

transformers stores such a tensor once, and ties the head to it on loading (``tie_word_embeddings``). In training, an
adapter on one side does not change the other. ``tied: untie`` keeps that: both tensors are written and the config says
that they are no longer tied, so the merged model computes what base and adapter computed. ``tied: peft`` does what
PEFT's merge does: everything is added to the one tensor, and it stays tied.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmerge.adapters import FAMILIES
from shardmerge.checkpoint import Checkpoint
from shardmerge.names import Names
from shardmerge.spec import Parameter, TensorRef, Update

#: Models that scale their output by whether they say they are tied, or are tied whatever they say (transformers 5).
_NEVER_UNTIED = frozenset({"longt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5"})
_WHOLE = ("replacement", "overwrite")


@dataclass(slots=True)
class Untied:
    """What comes of the ties: tensors that the base does not store, changes to config.json, and what to say."""

    added: list[TensorRef] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def tied_parameter(names: Names, module: str, parameter: str) -> Parameter | None:
    """The parameter of a head that is tied and so not stored: the embedding's, by the head's name."""
    target, heads = f"{module}.{parameter}", names.tied_heads()
    alike = [head for head in heads if target.endswith(f".{head}") or head.endswith(f".{target}")]
    head = target if target in heads else alike[0] if len(alike) == 1 else None
    if head is None:
        return None
    embedding = heads[head]
    shared = names.resolve(embedding.rpartition(".")[0], embedding.rpartition(".")[2])
    if not isinstance(shared, Parameter):
        return None
    places = tuple(dataclasses.replace(place, tensor=head) for place in shared.places)
    return dataclasses.replace(shared, name=head, places=places)


def resolve_ties(
    checkpoint: Checkpoint,
    names: Names,
    updates: defaultdict[str, list[Update]],
    configs: Sequence[Mapping[str, Any]],
    mode: str,
) -> Untied:
    """Decide about every tied head that an adapter touches; ``updates`` is changed to fit.

    ``configs`` are the adapters', in their order.
    """
    result = Untied()
    ties = {head: embedding for head, embedding in names.tied_heads().items() if embedding in checkpoint.weights}
    for head, embedding in ties.items():
        if updates.get(head) or updates.get(embedding):
            _resolve(result, checkpoint, updates, configs, mode, head, embedding)
    if result.changes:
        # The config unties all there is, so all must be there, with what was trained for both sides.
        there = {ref.name for ref in result.added}
        for head, embedding in ties.items():
            if head not in checkpoint.weights and head not in there:
                result.added.append(dataclasses.replace(checkpoint.weights[embedding].tensor, name=head))
                if shared := [update for update in updates.get(embedding, ()) if _is_shared(update, configs)]:
                    updates[head] = [_on(update, head) for update in shared]
    return result


def _resolve(
    result: Untied,
    checkpoint: Checkpoint,
    updates: defaultdict[str, list[Update]],
    configs: Sequence[Mapping[str, Any]],
    mode: str,
    head: str,
    embedding: str,
) -> None:
    of_head, of_embedding = updates.get(head, []), updates[embedding]
    stored = head in checkpoint.weights
    cannot_untie = checkpoint.model_type in _NEVER_UNTIED
    says_untied = checkpoint.config.get("tie_word_embeddings") is False and _is_output(head)
    # The head sees trained tokens through the tie, unless it has trained tokens of its own. Either side sees a weight
    # that PEFT saved for the other: it says what the one tensor was in training.
    for_head = [update for update in of_embedding if _is_seen(update, of_head, configs)]
    for_embedding = [
        update for update in of_head if update.family in _WHOLE and _is_seen(update, of_embedding, configs)
    ]
    if stored and says_untied and (cannot_untie or checkpoint.model_type == "mt5"):
        # As of T5 1.1: transformers 5 does not heed the setting, but finds by their values that the two are apart. PEFT
        # only asks whether they ought to be tied, and so has the head see trained tokens.
        if tokens := [_on(update, head) for update in for_head if update.family == "token-rows"]:
            updates[head] = _in_order([*of_head, *tokens])
        return
    if _stays_tied(of_head, of_embedding, configs):
        updates.pop(head, None)
        if stored:
            updates[head] = _in_order([*of_head, *(_on(update, head) for update in for_head)])
        return
    if mode == "untie" and cannot_untie:
        result.problems.append(
            f"an adapter updates {embedding} or the output head that is tied to it, and {checkpoint.model_type} models "
            "cannot be untied: they scale their output, or not, by whether they are tied; tied: peft does as PEFT's "
            "merge does"
        )
        return
    apart = any(update.family in _WHOLE and update.setting("saved") for update in (*of_head, *of_embedding))
    if mode == "peft" and not apart:
        rest = [*(update for update in of_head if update.family not in _WHOLE), *for_embedding]
        updates[embedding] = _in_order([*of_embedding, *(_on(update, embedding) for update in rest)])
        updates.pop(head, None)
        if stored:
            updates[head] = [_on(update, head) for update in updates[embedding]]
        result.notes.append(
            f"tied: peft: {embedding} and the output head stay one tensor, and what the adapters do to either is done "
            "to both, as PEFT's merge does it; the unmerged model computes something else"
        )
        return
    if for_head or of_head:
        updates[head] = _in_order([*of_head, *(_on(update, head) for update in for_head)])
    if for_embedding:
        updates[embedding] = _in_order([*of_embedding, *(_on(update, embedding) for update in for_embedding)])
    if not stored:
        result.added.append(dataclasses.replace(checkpoint.weights[embedding].tensor, name=head))
    result.changes["tie_word_embeddings"] = False
    touched = " and ".join(name for name, of in ((embedding, of_embedding), (head, of_head)) if of)
    result.notes.append(
        f"the base ties {head} to {embedding}, and an adapter updates {touched}: both are written, each as a tensor of "
        "its own, and config.json says tie_word_embeddings: false, so that the merged model computes what base and "
        "adapter computed (tied: peft does as PEFT's merge does)"
    )


def _stays_tied(
    of_head: Sequence[Update], of_embedding: Sequence[Update], configs: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether one tensor was trained for both sides."""
    together = [update for update in of_embedding if _is_shared(update, configs)]
    if len(together) != len(of_embedding) or not together:
        return False
    # The head's copy may be there, too, where PEFT saved the one tensor under both names.
    if any(update.factors[0][1].shape != together[0].factors[0][1].shape for update in of_head):
        return False
    return all(_is_copy(update, configs) for update in of_head)


def _is_copy(update: Update, configs: Sequence[Mapping[str, Any]]) -> bool:
    if update.family == "token-rows":
        # In this method the head has no tokens of its own where it is tied.
        return configs[update.adapter].get("peft_type") == "TRAINABLE_TOKENS"
    return update.family in _WHOLE and _is_shared(update, configs)


def _is_shared(update: Update, configs: Sequence[Mapping[str, Any]]) -> bool:
    if update.family == "token-rows":
        return True
    config = configs[update.adapter]
    saved = update.setting("saved", False)
    return update.family in _WHOLE and (not saved or bool(config.get("ensure_weight_tying")))


def _is_output(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] == "lm_head"


def _is_seen(update: Update, others: Sequence[Update], configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an update reaches the other side of the tie, whose own updates are ``others``."""
    if not _is_shared(update, configs):
        return False
    if update.setting("copy", False) and any(other.adapter != update.adapter for other in others):
        return False  # what the base was when the adapter was trained says nothing of what others did to it
    whole = update.family in _WHOLE
    return not any(
        other.adapter == update.adapter and (other.family in _WHOLE if whole else other.family == update.family)
        for other in others
    )


def _in_order(updates: Sequence[Update]) -> list[Update]:
    return sorted(updates, key=lambda update: (update.adapter, FAMILIES[update.family].order))


def _on(update: Update, target: str) -> Update:
    return dataclasses.replace(update, target=target, place=dataclasses.replace(update.place, tensor=target))
