"""The class of a model for a task, and the tensors that only that class has: its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.key_mapping import table as tables
from shardmerge.key_mapping.naming import numberless

#: Stands for the number of labels among a tensor's dimensions.
LABELS = "labels"


@dataclass(frozen=True, slots=True)
class Head:
    """The head of one class of transformers. Names of tensors are without the base model's prefix."""

    #: The class, as ``architectures`` of a config.json names it.
    architecture: str
    #: Whether config.json names it already.
    is_there: bool
    #: Tensor → its dimensions, the number of labels as `LABELS`.
    shapes: Mapping[str, tuple[Any, ...]]
    #: One tensor of each part, other than the head, that some class of the type lacks and this class has.
    needs: tuple[str, ...]
    #: Tensors of the heads of other classes of the type, numbers as #.
    others: frozenset[str]

    def is_of_another(self, name: str) -> bool:
        """Whether a tensor is of a head that this class does not have."""
        return numberless(name) in self.others


def head_for(config: Mapping[str, Any], task: Any) -> Head | str:
    """The head of the class that a model's config.json makes of a task of PEFT's (``SEQ_CLS``, …).

    A string says why there is none.
    """
    known = tables.table()
    here = tables.find(config)
    if here is None:
        return "the base's config.json names no architecture that is known here"
    tasks = known.tasks.get(here.model_type, {})
    if task not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        return (
            "a head that was made for training is written where adapter_config.json's task_type is SEQ_CLS, TOKEN_CLS "
            f"or QUESTION_ANS, which says what class of model has it; it is {task!r:.60}"
        )
    if task not in tasks or config.get("model_type") != here.model_type:
        return f"transformers has no class of {here.model_type} for {task} whose head is known here"
    found = known.architectures[tasks[task]]
    if found.base_prefix != here.base_prefix:
        return (
            f"{found.name} calls the model within it {found.base_prefix!r}, and {here.name} calls it "
            f"{here.base_prefix!r}, so that transformers finds nothing of such a checkpoint in the base's files"
        )
    shapes = {name: tuple(_size(dim, config) for dim in dims) for name, dims in found.head.items()}
    others = frozenset(known.heads[here.model_type]) - {numberless(name) for name in shapes}
    return Head(found.name, found.name == here.name, shapes, found.needs, others)


def _size(dim: Any, config: Mapping[str, Any]) -> Any:
    """A dimension as the table has it: a number, `LABELS`, or [key of the config, its default, perhaps times]."""
    if not isinstance(dim, list):
        return dim
    value: Any = config
    for segment in dim[0].split("."):
        value = value.get(segment) if isinstance(value, Mapping) else None
    size = value if type(value) is int else dim[1]
    return size * (dim[2] if len(dim) > 2 else 1)
