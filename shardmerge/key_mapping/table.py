"""The table of what transformers does to names, per architecture: ``shardmerge/key_mapping/names.json``.

The file is baked by ``tools/bake_names.py``, which says what its keys mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from shardmerge.key_mapping.rules import Rule
from shardmerge.spec.light import light_dataclass
from shardmerge.spec.tensors import Orientation, transposed_if


@light_dataclass(frozen=True, slots=True)
class Architecture:
    """A model class."""

    name: str
    model_type: str
    base_prefix: str = ""
    #: Parts that are models themselves: path, class, and the key of their config in this one's ("" the same).
    parts: tuple[tuple[str, str, str | None], ...] = ()
    #: The last segments of modules that keep W as (in, out).
    conv1d: frozenset[str] = frozenset()
    #: Modules of experts, numbers as #, → their parameters in order of registration.
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Of their matrices (out, in) against these parameters.
    experts_in_memory: Orientation = Orientation.SAME
    #: How those join gate and up in one matrix: ``concatenated`` (gate first), ``interleaved`` (row by row), ``none``
    #: (there is no gate); "" where transformers does not say so.
    gates: str = ""
    #: The module that is the output head, "" where there is none.
    output: str = ""
    #: Tied weight → the one that it is, # standing for the same number in both.
    tied: Mapping[str, str] = field(default_factory=dict)
    #: Tensors of its head → their dimensions, and one tensor of each part that not every class of its type has; see
    #: `shardmerge.key_mapping.heads`.
    head: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    #: Weights that are tied to others of other numbers, # standing for them: how many there are, nothing here says.
    across: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Table:
    """The contents of the file."""

    version: str
    architectures: Mapping[str, Architecture]
    #: By class or model type.
    rules: Mapping[str, tuple[Rule, ...]]
    #: Model type → the class for a role ("model", "causal", "backbone", "head").
    roles: Mapping[str, Mapping[str, str]]
    #: Model type → how its config says whether embeddings are tied.
    ties: Mapping[str, Any]
    #: Model type → PEFT's task → the class that does it; and the tensors of all heads of the type.
    tasks: Mapping[str, Mapping[str, str]]
    heads: Mapping[str, tuple[str, ...]]


#: Keys of configs that a whole model's text model may be inside of.
_AROUND_TEXT = frozenset({"thinker_config", "vlm_config"})


@dataclass(frozen=True, slots=True)
class Part:
    """A model class inside a model."""

    path: str
    architecture: Architecture
    config: Mapping[str, Any]
    #: Where its config is in that of the whole model, dotted; "" is the same config.
    key: str = ""

    @property
    def is_text(self) -> bool:
        """Whether it is the main text model; models for speech may have a ``text_config`` of their own."""
        *around, own = self.key.split(".")
        return own == "text_config" and _AROUND_TEXT.issuperset(around)


@cache
def table() -> Table:
    """The table, read once."""
    text = resources.files("shardmerge.key_mapping").joinpath("names.json").read_text(encoding="utf-8")
    data = json.loads(text)
    rules, types = data["rules"], data["types"]
    return Table(
        version=data["transformers"],
        architectures={name: _architecture(name, entry) for name, entry in data["architectures"].items()},
        # A string is the key of the same rules.
        rules={key: tuple(map(_rule, rules[of] if isinstance(of, str) else of)) for key, of in rules.items()},
        roles={name: entry.get("roles", {}) for name, entry in types.items()},
        ties={name: entry["tie"] for name, entry in types.items() if "tie" in entry},
        tasks={name: entry["tasks"] for name, entry in types.items() if "tasks" in entry},
        heads={name: tuple(entry["heads"]) for name, entry in types.items() if "heads" in entry},
    )


def _architecture(name: str, entry: Mapping[str, Any]) -> Architecture:
    return Architecture(
        name,
        entry.get("type", ""),
        entry.get("prefix", ""),
        tuple((path, part, key) for path, part, key in entry.get("parts", ())),
        frozenset(entry.get("conv1d", ())),
        {module: tuple(names) for module, names in entry.get("experts", {}).items()},
        transposed_if(entry.get("transposed")),
        entry.get("gates", ""),
        entry.get("output", ""),
        entry.get("tied", {}),
        entry.get("head", {}),
        tuple(entry.get("needs", ())),
        frozenset(entry.get("across", ())),
    )


def _rule(entry: Any) -> Rule:
    if isinstance(entry, list):
        entry = dict(zip(("from", "to", "back"), entry, strict=False))
    back = entry.get("back")
    return Rule(
        _strings(entry["from"]),
        _strings(entry["to"]),
        tuple(_frozen(operation) for operation in entry.get("ops", ())),
        entry.get("group", False),
        entry.get("offset", 0),
        entry.get("prefix", False),
        (_strings(back[0]), _strings(back[1])) if back else None,
    )


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _frozen(operation: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(item) if isinstance(item, list) else item for item in operation)


def find(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a config.json names: by its class, else by its model type."""
    known = table()
    named = config.get("architectures")
    for name in named[:1] if isinstance(named, list) else ():
        if isinstance(name, str) and name in known.architectures:
            return known.architectures[name]
    roles = _roles(config)
    return known.architectures[roles["head"]] if "head" in roles else None


def parts(
    architecture: Architecture, config: Mapping[str, Any], path: str = "", depth: int = 0, key: str = ""
) -> Iterator[Part]:
    """The model itself and its parts, parents first. The model type in a part's config decides the part's class."""
    yield Part(path, architecture, config, key)
    if depth > 8:
        return
    for below, name, inner_key in architecture.parts:
        inner = _inner(config, inner_key)
        part = _class_for(name, inner, inner_key)
        if part:
            at = ".".join(filter(None, (key, inner_key)))
            yield from parts(part, inner, f"{path}.{below}" if path else below, depth + 1, at)


def _inner(config: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    if key is None:
        return {}
    for segment in key.split(".") if key else ():
        value = config.get(segment)
        config = value if isinstance(value, Mapping) else {}
    return config


def _class_for(name: str, config: Mapping[str, Any], key: str | None) -> Architecture | None:
    """The class of a part, by the config's model type where that is not the usual one; None if it is not known."""
    known = table()
    usual = known.architectures[name]
    model_type = config.get("model_type")
    if not key or model_type is None or model_type == usual.model_type:
        return usual
    here = _roles(config)
    usual_roles = known.roles.get(usual.model_type, {})
    role = next((role for role, of_role in usual_roles.items() if of_role == name and role in here), "model")
    return known.architectures[here[role]] if role in here else None


def _roles(config: Mapping[str, Any]) -> Mapping[str, str]:
    model_type = config.get("model_type")
    return table().roles.get(model_type, {}) if isinstance(model_type, str) else {}


def ties(part: Part) -> bool:
    """Whether a part's weights are tied to its embedding, by its config or else by the default of its model type."""
    mode = table().ties.get(part.architecture.model_type, False)
    top = part.config.get("tie_word_embeddings")
    top = top if isinstance(top, bool) else None
    if isinstance(mode, bool):
        return mode if top is None else top
    if mode == "always":
        return True
    # {"with": key, "cases": "TFTFTF"}: top absent, true, false; of each: the part's true, false.
    inner = _inner(part.config, mode["with"])
    value = inner.get("tie_word_embeddings")
    if not isinstance(value, bool):
        model_type = inner.get("model_type", mode["type"])
        default = table().ties.get(model_type, False) if isinstance(model_type, str) else False
        value = default is True or default == "always"
    row = {None: 0, True: 1, False: 2}[top]
    return bool(mode["cases"][2 * row + (not value)] == "T")
