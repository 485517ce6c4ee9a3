"""Resized vocabularies: embeddings and heads with another number of rows, and the size in config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.wholes import is_embedding
from shardmerge.adapters.registry import FAMILIES
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.model_config import vocabulary_size
from shardmerge.spec.tensors import TensorRef
from shardmerge.spec.updates import Update

#: Biases of outputs that are not part of the head's own module.
_BIASES = ("final_logits_bias", "predictions.bias")


def may_resize(checkpoint: Checkpoint, update: ModuleUpdate, stored: TensorRef) -> list[str]:
    """Only the vocabulary may have another number of rows than the base."""
    whole = update.factor("whole")
    if whole.shape == stored.shape or stored.shape[0] == vocabulary_size(checkpoint.config):
        return []
    return [
        f"{whole.name} is {list(whole.shape)}, but the base's {stored.name} is {list(stored.shape)}, and that is not "
        "its vocabulary"
    ]


def resized(
    checkpoint: Checkpoint,
    updates: Mapping[str, Sequence[Update]],
    added: Sequence[TensorRef],
    left_out: Collection[str] = (),
) -> tuple[int | None, list[str]]:
    """The new number of rows, if there is one, and what does not fit it."""
    old = vocabulary_size(checkpoint.config)
    rows: dict[str, int] = {}
    for name, weight in checkpoint.weights.items():
        if (
            old is not None
            and name not in left_out
            and weight.tensor.shape[:1] == (old,)
            and len(weight.tensor.shape) == 2
        ):
            rows[name] = old
    rows |= {ref.name: ref.shape[0] for ref in added if len(ref.shape) == 2}
    changed: dict[str, int] = {}
    for name, of in updates.items():
        for update in of:
            if FAMILIES[update.family].is_source and name in rows:
                size = update.factor("whole").shape[0]
                rows[name] = size
                if size != old:
                    changed[name] = size
    if not changed:
        return None, []
    sizes = set(changed.values())
    embeddings = {
        name: size for name, size in rows.items() if name in changed or is_embedding(name.removesuffix(".weight"))
    }
    biases = _biases(checkpoint, updates, changed, old)
    embeddings |= {name: size for name, size in biases.items() if name not in left_out}
    if len(sizes) > 1 or len(set(embeddings.values())) > 1:
        found = ", ".join(f"{name} has {size}" for name, size in sorted(embeddings.items()))
        return None, [f"the adapter resizes the vocabulary, but not all of it: {found} rows"]
    return sizes.pop(), []


def _biases(
    checkpoint: Checkpoint, updates: Mapping[str, Sequence[Update]], changed: Mapping[str, int], old: int | None
) -> dict[str, int]:
    """Biases of resized outputs → their number of entries, as it will be."""
    found: dict[str, int] = {}
    for name, weight in checkpoint.weights.items():
        module, _, parameter = name.rpartition(".")
        of_head = parameter == "bias" and (is_embedding(module) or f"{module}.weight" in changed)
        if (of_head or name.endswith(_BIASES)) and weight.tensor.shape[-1:] == (old,):
            wholes = [update.factor("whole") for update in updates.get(name, ()) if FAMILIES[update.family].is_source]
            found[name] = (wholes or [weight.tensor])[-1].shape[-1:][0]
    return found
