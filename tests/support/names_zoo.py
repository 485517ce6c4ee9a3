"""Small stand-ins for the weights of any transformers model, and what it would store of them.

A model is built on the meta device from its default config; its weights are then given as small integer tensors, every
element of which is unique, so that a matrix put together from stored tensors can only be right by being right. Widths
are cut down (what transformers does to tensors on saving works on rows), and of equal layers two are kept.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shardmerge.key_mapping.class_names import NamesOfClass
from shardmerge.key_mapping.names import Names
from shardmerge.spec.tensors import Orientation
from shardmerge.spec.updates import Parameter

State = dict[str, torch.Tensor]
_EMBEDDING_ROWS = 16
_EXPERTS = 4
#: Experts that are not wider stay as they are: some are transposed on loading if their shape asks for it.
_WIDTH = 48


def weights(model: Any) -> State:
    """In-memory name → small tensor with unique elements."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    params = dict(model.named_parameters(remove_duplicate=False))
    state: State = {}
    start = 0
    for name in _two_layers(params):
        shape = _small(tuple(params[name].shape), id(params[name]) in embeddings)
        count = int(torch.tensor(shape).prod())
        state[name] = torch.arange(start, start + count).reshape(shape)
        start += count
    return state


def _small(shape: tuple[int, ...], is_embedding: bool) -> tuple[int, ...]:
    if len(shape) < 2:
        return shape
    if len(shape) == 3 and shape[1] > 1 and shape[0] > 1:
        return (min(shape[0], _EXPERTS), shape[1], shape[2] if shape[2] <= _WIDTH else 2)
    rows = min(shape[0], _EMBEDDING_ROWS) if is_embedding else shape[0]
    return (rows, *(min(size, 2) for size in shape[1:]))


def _two_layers(names: Mapping[str, Any]) -> list[str]:
    """Of names that differ only in their first number those with the two lowest."""
    lowest: dict[str, list[int]] = {}
    numbered = {}
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        if match:
            template = f"{name[: match.start()]}#{name[match.end() :]}"
            numbered[name] = template, int(match[0])
            lowest.setdefault(template, []).append(int(match[0]))
    kept = {template: sorted(numbers)[:2] for template, numbers in lowest.items()}
    return [name for name in names if name not in numbered or numbered[name][1] in kept[numbered[name][0]]]


def on_disk(model: Any, state: State) -> State:
    """What transformers would store of a model that was not loaded from anywhere."""
    from transformers.core_model_loading import revert_weight_conversion

    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions
    return dict(revert_weight_conversion(model, dict(state)))


def with_prefixes(model: Any, state: State) -> State | None:
    """What it would store if it had been loaded from a checkpoint that has the prefixes that its rules remove.

    None where there are none, or where transformers itself does not find back what it then stores.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )

    rules = get_model_conversion_mapping(model, add_legacy=False)
    if not any(isinstance(rule, PrefixChange) for rule in rules):
        return None
    model._weight_conversions = rules
    stored = dict(revert_weight_conversion(model, dict(state)))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    meta = dict(model.state_dict())
    back = {rename_source_key(name, renamings, converters, model.base_model_prefix, meta)[0] for name in stored}
    return stored if back <= meta.keys() else None


def config_of(model: Any) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string())
    return {**config, "architectures": [type(model).__name__]}


def matrix(parameter: Parameter, state: State) -> torch.Tensor:
    """The parameter put together from its places; −1 where nothing lies, −2 where two do."""
    result = torch.full(parameter.shape, -1)
    seen = torch.zeros(parameter.shape, dtype=torch.int64)
    axis = int(parameter.experts)
    for region in parameter.regions:
        tensor = state[region.tensor]
        if region.orientation is Orientation.TRANSPOSED:
            tensor = tensor.transpose(-1, -2)
        into, covered = result, seen
        at = axis
        if region.expert is not None:
            at = 0
            if parameter.experts:
                into, covered = result[region.expert], seen[region.expert]
            else:
                tensor = tensor[region.expert]
        rows = tensor.narrow(at, region.stored_start, region.rows) if tensor.ndim else tensor
        if region.shuffle:
            g, a, b = region.shuffle
            assert g * a * b == region.rows
            split = (*rows.shape[:at], g, a, b, *rows.shape[at + 1 :])
            rows = rows.reshape(split).transpose(at + 1, at + 2).reshape(rows.shape)
        if tensor.ndim:
            into.narrow(at, region.start, region.rows).copy_(
                rows.reshape(into.narrow(at, region.start, region.rows).shape)
            )
            covered.narrow(at, region.start, region.rows).add_(1)
        else:
            into.copy_(rows)
            covered.add_(1)
    result[seen > 1] = -2
    return result


def in_orientation(parameter: Parameter, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2) if parameter.in_memory is Orientation.TRANSPOSED else tensor


@dataclass
class Outcome:
    """What became of the names of one model."""

    right: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def summary(self) -> Counter[str]:
        return Counter(right=self.right, refused=len(self.refused), missing=len(self.missing), wrong=len(self.wrong))


def check(names: Names | NamesOfClass, stored: State, spoken: State) -> Outcome:
    """Resolve every name of ``spoken`` and put its tensor together from ``stored``."""
    outcome = Outcome()
    for name, tensor in spoken.items():
        module, _, parameter = name.rpartition(".")
        found = names.resolve(module, parameter)
        if found == "":
            outcome.missing.append(name)
        elif isinstance(found, str):
            outcome.refused[name] = found
        elif _is_right(found, stored, tensor):
            outcome.right += 1
        else:
            outcome.wrong.append(f"{name}: {found}")
    return outcome


def _is_right(found: Parameter, stored: State, tensor: torch.Tensor) -> bool:
    expected = in_orientation(found, tensor)
    return expected.shape == found.shape and bool((matrix(found, stored) == expected).all())


def combinations(model: Any) -> Iterator[tuple[str, Outcome]]:
    """Both ways to store a model × both ways to speak of it."""
    memory = weights(model)
    stores = {"disk": on_disk(model, memory), "memory": memory}
    if prefixed := with_prefixes(model, memory):
        stores["prefixed"] = prefixed
    config = config_of(model)
    for store, stored in stores.items():
        names = Names(config, {name: tuple(tensor.shape) for name, tensor in stored.items()})
        for speech, said in stores.items():
            # A name that is the same on disk and in memory means what it means in memory.
            spoken = {name: memory.get(name, tensor) for name, tensor in said.items()}
            yield f"{speech} in {store}", check(names, stored, spoken)


def tied(model: Any) -> dict[str, str]:
    """Names in memory of the weights that transformers ties → the one that each is."""
    return dict(getattr(model, "all_tied_weights_keys", {}))  # some base classes are never finished
