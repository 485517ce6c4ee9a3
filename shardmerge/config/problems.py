"""Messages about a wrong config: pydantic's errors in our words, and settings that would have no effect.

Every error of pydantic is put into words here by its type. One of a type that is not in the table is "not valid", with
what was found: pydantic's own text, which speaks of its types and not of a config, is never printed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from shardmerge.config import suggestions
from shardmerge.config.choices import DEVICE, DEVICES, Quantization

#: Characters of a key that are shown.
_LONGEST = 1000
#: How a wrong value is shown: enough of it to be recognised, whatever it is.
brief = reprlib.Repr()
brief.maxlevel = 2
brief.maxstring = brief.maxother = 80

_TEXT, _NUMBER, _WHOLE, _FLAG, _LIST = "text", "a number", "a whole number", "true or false", "a list"
#: pydantic's type of an error → what was expected in its place.
_EXPECTED: Mapping[str, str] = {
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), _TEXT),
    **dict.fromkeys(("float_type", "float_parsing"), _NUMBER),
    "finite_number": "a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), _WHOLE),
    **dict.fromkeys(("bool_type", "bool_parsing"), _FLAG),
    **dict.fromkeys(("tuple_type", "list_type", "iterable_type", "frozen_set_type", "set_type"), _LIST),
}
_SECTION = frozenset({"model_type", "model_attributes_type", "dict_type", "mapping_type", "dataclass_type"})
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "{} or less"),
    "less_than": ("lt", "less than {}"),
}


def explain(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """One of the errors of validating ``model``: where, what is wrong, what was expected, and what was found."""
    kind, place = error["type"], ".".join(str(step)[:_LONGEST] for step in error["loc"]) or "the config"
    if kind == "extra_forbidden":
        valid = _section(error["loc"][:-1], model).model_fields
        near = suggestions.near_key(error["loc"][-1], valid)
        return f"{place}: there is no such key{near}; valid are {', '.join(valid)}"
    if kind in ("missing", "invalid_key"):
        return f"{place}: {'is missing' if kind == 'missing' else 'a key must be a word'}"
    problem, value = _problem(error, model, place), error.get("input")
    if value is None:
        return f"{place}: has no value; {problem}"
    said = isinstance(value, dict) or (kind == "value_error" and brief.repr(value) in problem)
    return f"{place}: {problem}" + ("" if said else f" (found {brief.repr(value)})")


def _problem(error: Mapping[str, Any], model: type[BaseModel], place: str) -> str:
    kind, value, limits = error["type"], error.get("input"), error.get("ctx") or {}
    if kind == "value_error":  # of a validator of ours
        return str(limits.get("error", "is not valid"))
    if kind in ("literal_error", "string_pattern_mismatch", "string_type") and (
        allowed := _allowed(error["loc"], model)
    ):
        return _of_these(value, allowed, place)
    if kind in _SECTION:
        return f"expected a mapping with the keys {', '.join(_section(error['loc'], model).model_fields)}"
    if kind == "string_too_short":
        return "is empty"
    if kind in _BOUNDS:
        limit, words = _BOUNDS[kind]
        return f"expected {words.format(limits.get(limit))}"
    if kind not in _EXPECTED:
        return "is not valid"
    quotes = isinstance(value, (bool, int, float)) and _EXPECTED[kind] == _TEXT
    return f"expected {_EXPECTED[kind]}" + (f"; in quotes it is text: '{brief.repr(value)}'" if quotes else "")


def _of_these(value: object, allowed: tuple[str, ...], place: str) -> str:
    hint = suggestions.hint(value, allowed, place, get_args(Quantization))
    return f"expected {' or '.join(filter(None, (', '.join(allowed[:-1]), allowed[-1])))}" + (
        f"; {hint}" if hint else ""
    )


def _allowed(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[str, ...]:
    """The allowed words of a key, or the devices; empty where any text is allowed."""
    field = _section(location[:-1], model).model_fields.get(str(location[-1])) if location else None
    if field is None:
        return ()
    has_pattern = any(getattr(constraint, "pattern", None) == DEVICE for constraint in field.metadata)
    literals = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return DEVICES if has_pattern else tuple(map(str, literals))


def _section(location: tuple[str | int, ...], model: type[BaseModel]) -> type[BaseModel]:
    """The model that the keys at a place are of; the innermost there is."""
    for step in location:
        field = model.model_fields.get(str(step))
        model = next(_models(field.annotation), model) if field else model
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


# --- settings without effect ------------------------------------------------------------------------------------------

_Output = Mapping[str, Any]
#: Key of output → whether it would do nothing beside the other keys, and what to do. What a key is by default is no
#: offence where it says that nothing is to be done; ``quantization`` has no such default.
_IDLE: tuple[tuple[str, Callable[[_Output], bool], str], ...] = (
    (
        "quantization",
        lambda out: not _is_gguf(out),
        "is the type of a GGUF file, and output.format is safetensors, so it has no effect; add output.format: gguf, "
        "or remove it (output.dtype is what a checkpoint is stored in)",
    ),
    (
        "allow_config_loss",
        lambda out: not _is_gguf(out) and _is_on(out, "allow_config_loss", False),
        "is for a GGUF file, and output.format is safetensors, so it has no effect; add "
        "output.format: gguf, or remove it",
    ),
    (
        "max_shard_size",
        lambda out: _is_gguf(out) and _is_on(out, "max_shard_size", "same"),
        "has no effect with output.format: gguf, which is always one file; remove it (llama-gguf-split cuts that file)",
    ),
    (
        "seed",
        lambda out: type(out["seed"]) is int and out["seed"] != 0 and out.get("rounding", "nearest") == "nearest",
        "is that of stochastic rounding, and output.rounding is nearest, so it has no effect; add output.rounding: "
        "stochastic, or remove it",
    ),
)


def without_effect(given: Mapping[str, Any]) -> list[str]:
    """Settings in a config, as it was written, that would do nothing. Those that only a plan can know are not here."""
    output = given.get("output")
    if not isinstance(output, Mapping) or output.get("format", "safetensors") not in ("safetensors", "gguf"):
        return []
    return [f"output.{key}: {what}" for key, idle, what in _IDLE if output.get(key) is not None and idle(output)]


def _is_gguf(output: _Output) -> bool:
    return output.get("format") == "gguf"


def _is_on(output: _Output, key: str, default: object) -> bool:
    return bool(output.get(key, default) != default)
