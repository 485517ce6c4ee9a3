"""Finds the special tokens and the chat template in tokenizer.json, tokenizer_config.json and config.json.

tokenizer_config.json has the text of a role's token, and the added tokens of tokenizer.json its id; missing ids are
those of config.json. The template of the post-processor shows whether a tokenizer adds its first and last token itself;
tokenizer_config.json takes precedence. Source: SpecialVocab in gguf-py's vocab.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_letters, digits
from typing import Any

from shardmerge.gguf.files import ModelFiles, items, mapping
from shardmerge.gguf.formats import KeyValue

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
#: Role → the end of its key; other roles have no key.
_ID_KEYS: Mapping[str, str] = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelt so in the format
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_ADDED_ROLES = ("bos", "eos", "sep")


@dataclass(slots=True)
class SpecialTokens:
    """Ids and flags by role, in the order of finding them."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    #: One template, or several as (name, template).
    template: str | tuple[tuple[str, str], ...] | None = None
    #: What the normalizer does.
    lowercases: bool | None = None
    strips_accents: bool | None = None

    def key_values(self) -> list[KeyValue]:
        found = [
            KeyValue(f"tokenizer.ggml.{_ID_KEYS[role]}", "u32", token)
            for role, token in self.ids.items()
            if role in _ID_KEYS
        ]
        found += [
            KeyValue(f"tokenizer.ggml.add_{role}_token", "bool", adds)
            for role, adds in self.adds.items()
            if role in _ADDED_ROLES
        ]
        found += _template_values(self.template)
        for name, value in (("lowercase", self.lowercases), ("strip_accents", self.strips_accents)):
            if value is not None:
                found.append(KeyValue(f"tokenizer.ggml.normalizer.{name}", "bool", value))
        return found


def _template_values(template: str | tuple[tuple[str, str], ...] | None) -> list[KeyValue]:
    if template is None or isinstance(template, str):
        return [KeyValue("tokenizer.chat_template", "str", template)] if template else []
    found, names, default = [], [], None
    for raw, text in template:
        name = "".join(letter if letter in ascii_letters + digits else "_" for letter in raw)
        if name == "default":
            default = text
        elif name:
            names.append(name)
            if text:
                found.append(KeyValue(f"tokenizer.chat_template.{name}", "str", text))
    if names:
        # In the converter's file they have no order.
        found.append(KeyValue("tokenizer.chat_templates", "str", tuple(sorted(set(names)))))
    if default:
        found.append(KeyValue("tokenizer.chat_template", "str", default))
    return found


def read_special_tokens(files: ModelFiles, tokens: int | None = None) -> SpecialTokens:
    """The special tokens of a model's files, with ids below ``tokens`` if it is given."""
    special = SpecialTokens()
    tokenizer, settings = files.json("tokenizer.json"), files.json("tokenizer_config.json")
    settings = dict(settings) if settings is not None else None
    roles = list(ROLES)
    if tokenizer is not None:
        _read_normalizer(special, tokenizer.get("normalizer"))
        roles = _read_post_processor(special, tokenizer, settings)
    if settings:
        special.template = _template(files, settings)
        _read_roles(special, settings, items((tokenizer or {}).get("added_tokens")), roles, tokens)
    config = files.json("config.json") or {}
    text = mapping(config.get("text_config"))
    for key in roles:
        token = config.get(f"{key}_token_id")
        _set(special, key, text.get(f"{key}_token_id") if token is None else token, tokens)
    return special


def _set(special: SpecialTokens, role: str, token: Any, tokens: int | None) -> None:
    """Set a role's id, unless it has one."""
    limit = 1 << 32 if tokens is None else tokens
    if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < limit:
        special.ids.setdefault(role, token)


def _read_roles(
    special: SpecialTokens, settings: Mapping[str, Any], added: Sequence[Any], roles: Sequence[str], tokens: int | None
) -> None:
    ids: dict[str, Any] = {}
    for token in added:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            ids.setdefault(token["content"], token.get("id"))
    for role in roles:
        if isinstance(adds := settings.get(f"add_{role}_token"), bool):
            special.adds[role] = adds
        text = text_of(settings.get(f"{role}_token"))
        if isinstance(text, str):
            _set(special, role, ids.get(text), tokens)


def text_of(token: Any) -> Any:
    """The text of a token in tokenizer_config.json, which is a text or an object with it."""
    return token.get("content") if isinstance(token, dict) else token


def _template(files: ModelFiles, settings: Mapping[str, Any]) -> str | tuple[tuple[str, str], ...] | None:
    """The chat template of tokenizer_config.json, or of another file."""
    template = settings["chat_template"] if "chat_template" in settings else _template_of_file(files)
    if isinstance(template, list):
        named = [(item.get("name"), item.get("template")) for item in template if isinstance(item, dict)]
        return tuple((name, text) for name, text in named if isinstance(name, str) and isinstance(text, str))
    return template if isinstance(template, str) else None


def _template_of_file(files: ModelFiles) -> Any:
    if (template := files.text("chat_template.jinja")) is not None:
        more = [{"name": name, "template": text} for name, text in files.templates()]
        return [{"name": "default", "template": template}, *more] if more else template
    return (files.json("chat_template.json") or {}).get("chat_template")


def _read_normalizer(special: SpecialTokens, normalizer: Any) -> None:
    if not isinstance(normalizer, dict):
        return
    kind = normalizer.get("type")
    if kind == "Lowercase":
        special.lowercases = True
    elif kind == "StripAccents":
        special.strips_accents = True
    elif kind == "Sequence":
        for inner in items(normalizer.get("normalizers")):
            _read_normalizer(special, inner)


def _read_post_processor(
    special: SpecialTokens, tokenizer: Mapping[str, Any], settings: dict[str, Any] | None
) -> list[str]:
    """Find the special tokens that the tokenizer adds, and adjust ``settings`` to them. Returns the roles."""
    roles = list(ROLES)
    # Tokenizers of encoders have these instead of bos_token and eos_token.
    if settings:
        for role, instead in (("bos", "cls"), ("eos", "sep")):
            if not settings.get(f"{role}_token") and settings.get(f"{instead}_token"):
                settings[f"{role}_token"] = settings[f"{instead}_token"]
    processor = tokenizer.get("post_processor")
    if not isinstance(processor, dict):
        return roles
    for step in items(processor.get("processors")) or [processor]:
        if mapping(step).get("type") == "TemplateProcessing":
            _read_single(special, items(step.get("single")), settings, roles)
            _read_pair(special, step, settings)
    return roles


def _token(piece: Any) -> str | None:
    """The text of a special token in a template."""
    text = mapping(mapping(piece).get("SpecialToken")).get("id")
    return text if isinstance(text, str) and text else None


def _text(settings: Mapping[str, Any] | None, role: str) -> Any:
    return (settings or {}).get(f"{role}_token")


def _read_single(
    special: SpecialTokens, single: Sequence[Any], settings: dict[str, Any] | None, roles: list[str]
) -> None:
    """The template of one text: the tokens before and after it."""
    if len(single) < 2:
        return
    if first := _token(single[0]):
        if settings and first not in (_text(settings, "bos"), _text(settings, "cls")):
            for role in ("bos", "cls"):
                if not _text(settings, role):
                    settings[f"{role}_token"] = first
        special.adds["bos"] = not settings or first in (_text(settings, "bos"), _text(settings, "cls"))
    if last := _token(single[-1]):
        if settings and last != _text(settings, "eos"):
            # eos_token is then the end of a turn, or of a message.
            for role in ("eot", "eom"):
                if role not in roles:
                    roles.append(role)
                    settings[f"{role}_token"] = settings.get("eos_token")
                    break
            settings["eos_token"] = last
        special.adds["eos"] = True


def _read_pair(special: SpecialTokens, step: Mapping[str, Any], settings: dict[str, Any] | None) -> None:
    """The template of two texts: whether there is a separator between them."""
    single, pair = items(step.get("single")), items(step.get("pair"))
    first = _token(single[0]) if len(single) > 1 else None
    last = _token(single[-1]) if len(single) > 1 else None
    if not pair:
        return
    if first and _token(pair[0]) == first:
        pair = pair[1:]
    if pair and last and _token(pair[-1]) == last:
        pair = pair[:-1]
    between = pair[1:-1]
    if not between or [_sequence(pair[0]), _sequence(pair[-1])] != ["A", "B"]:
        return
    separators = [token for token in (_text(settings, "sep"), _text(settings, "eos")) if token]
    adds = (_token(between[0]) in separators and not last) or (len(between) == 2 and _token(between[1]) in separators)
    special.adds["sep"] = adds
    if adds and settings and not settings.get("sep_token"):
        settings["sep_token"] = settings.get("eos_token")


def _sequence(piece: Any) -> Any:
    return mapping(mapping(piece).get("Sequence")).get("id")
