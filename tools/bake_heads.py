"""The part of the bake that is about heads: which class of a model type does a task, and which tensors only it has.

A head is what a class has beside the type's plain model (``LlamaModel`` of ``LlamaForSequenceClassification``): told
from the parameters of both, built on the meta device. A dimension of a head's tensor is a number, the number of labels
(`LABELS`), or follows a key of the config: found by building the class again with another value of the key.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from transformers.modeling_utils import PreTrainedModel

Build = Callable[..., PreTrainedModel]
Classes = Mapping[str, type[PreTrainedModel]]
Shapes = dict[str, tuple[int, ...]]

#: PEFT's ``task_type`` → the mapping of transformers' auto class that trains such a model.
TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
#: Stands for the number of labels among a tensor's dimensions.
LABELS = "labels"
#: Numbers of labels that no other dimension has.
_LABELS = (7, 11)
#: A head may be a few times as wide as the model: the two ends of a span, say.
_MOST_TIMES = 4


def bake(found: Classes, build: Build, roles: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By model type ``tasks`` and ``heads``, and by class ``head`` and ``needs``; see ``tools.bake_names``."""
    types: dict[str, Any] = {}
    architectures: dict[str, Any] = {}
    for model_type, tasks in sorted(_tasks(found).items()):
        plain = roles.get(model_type, {}).get("model")
        of_type = dict(_shapes_of_type(found, build, model_type))
        if plain not in of_type:
            continue
        own = of_type[plain]
        for task, name in tasks.items():
            head = name in of_type and _head(found[name], build, own)
            if head:
                types.setdefault(model_type, {}).setdefault("tasks", {})[task] = name
                architectures[name] = {"head": head, "needs": _needs(of_type, name, own)}
        if model_type in types:
            types[model_type]["heads"] = sorted(_of_heads(of_type, own))
    return types, architectures


def _of_heads(of_type: Mapping[str, Shapes], own: Shapes) -> set[str]:
    """What classes with the plain model in them have beside it."""
    with_it = (shapes.keys() for shapes in of_type.values() if shapes.keys() & own.keys())
    return {_template(param) for params in with_it for param in params - own.keys()}


def _tasks(found: Classes) -> dict[str, dict[str, str]]:
    """Model type → task → class, where the class has a config of that type."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    tasks: dict[str, dict[str, str]] = {}
    for task, mapping in TASKS.items():
        for model_type, name in getattr(auto, mapping).items():
            if name in found and _type(found[name]) == model_type:
                tasks.setdefault(model_type, {})[task] = name
    return tasks


def _type(cls: type[PreTrainedModel]) -> str:
    return str(getattr(cls.config_class, "model_type", ""))


def _shapes_of_type(found: Classes, build: Build, model_type: str) -> Iterator[tuple[str, Shapes]]:
    for name, cls in found.items():
        if _type(cls) == model_type and not name.endswith("PreTrainedModel"):
            try:
                yield name, _shapes(build(cls))
            except Exception:  # a class that cannot be built by itself is in no checkpoint's config either
                continue


def _shapes(model: PreTrainedModel) -> Shapes:
    """Shapes of the parameters, by names without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    params = model.named_parameters(remove_duplicate=False)
    return {name.removeprefix(prefix): tuple(param.shape) for name, param in params}


def _template(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def _needs(of_type: Mapping[str, Shapes], name: str, own: Shapes) -> list[str]:
    """Of parts of the plain model that the class has and another class of its type lacks, one parameter each."""
    mine = of_type[name].keys() & own.keys()
    needed: dict[str, str] = {}
    for other in of_type.values():
        if mine & other.keys():
            for param in sorted(mine - other.keys()):
                needed.setdefault(_part(param, other), param)
    return sorted(set(needed.values()))


def _part(name: str, other: Shapes) -> str:
    """The shortest beginning of a parameter's name that no parameter of another class has."""
    segments = name.split(".")
    for count in range(1, len(segments)):
        path = ".".join(segments[:count])
        if not any(param.startswith(f"{path}.") for param in other):
            return path
    return name


# --- the head's shapes ------------------------------------------------------------------------------------------------


def _head(cls: type[PreTrainedModel], build: Build, own: Shapes) -> dict[str, list[Any]] | None:
    """The head's parameters with their dimensions; None where one of those follows from nothing that is known."""
    labels = _labels(cls, build)
    few, many = (_shapes(build(cls, **count)) for count in labels)
    if few.keys() != many.keys():
        return None
    trials = _Trials(cls, build, labels[0])
    head: dict[str, list[Any]] = {}
    for name in few.keys() - own.keys():
        dims: list[Any] = list(few[name])
        for axis, (one, other) in enumerate(zip(few[name], many[name], strict=True)):
            if one != other:
                dims[axis] = LABELS if {"num_labels": one} == labels[0] else None
            elif one > 2:
                dims[axis] = trials.followed(name, axis, one)
        if None in dims:
            return None
        head[name] = dims
    return dict(sorted(head.items())) or None


def _labels(cls: type[PreTrainedModel], build: Build) -> tuple[dict[str, int], dict[str, int]]:
    """Arguments with two numbers of labels; none for a class that allows only its own."""
    try:
        build(cls, num_labels=_LABELS[0])
    except Exception:  # such as "config.num_labels should be 2"
        return {}, {}
    return {"num_labels": _LABELS[0]}, {"num_labels": _LABELS[1]}


class _Trials:
    """Builds a class with one number of its config doubled, once for each."""

    def __init__(self, cls: type[PreTrainedModel], build: Build, labels: dict[str, int]) -> None:
        self._build = partial(build, cls, **labels)
        self._config = self._build().config.to_dict()
        self._shapes: dict[str, Shapes] = {}

    def followed(self, name: str, axis: int, size: int) -> list[Any] | None:
        """[key, default] or [key, default, times] of the config's number that a dimension of ``size`` follows."""
        for key, value in _numbers(self._config):
            if size % value == 0 and 1 <= size // value <= _MOST_TIMES:
                shape = self._with_twice(key, value).get(name, ())
                if shape[axis : axis + 1] == (2 * size,):
                    return [key, value] if size == value else [key, value, size // value]
        return None

    def _with_twice(self, key: str, value: int) -> Shapes:
        if key not in self._shapes:
            section, _, last = key.rpartition(".")
            changes = {section: {**self._config[section], last: 2 * value}} if section else {key: 2 * value}
            try:
                self._shapes[key] = _shapes(self._build(**changes))
            except Exception:  # a number that does not go with the others
                self._shapes[key] = {}
        return self._shapes[key]


def _numbers(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    """Keys of whole numbers, dotted for a part's config, the likeliest first."""
    found = [(f"{path}{key}", value) for key, value in config.items() if type(value) is int and value > 2]
    yield from sorted(found, key=lambda item: not re.search(r"hidden_size|d_model|n_embd|dim", item[0]))
    for key, value in config.items():
        if not path and key.endswith("_config") and isinstance(value, dict):
            yield from _numbers(value, f"{key}.")
