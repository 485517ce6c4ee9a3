"""The small files of a model from which the metadata of a GGUF file is made, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shardmerge.system import json_text

_NAMES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "tekken.json",
    }
)
_TEMPLATES = "additional_chat_templates/"
#: Of a file that is read whole, and of the memory that its JSON may take: a tokenizer.json of 35 MB is the largest of
#: well-known models.
MAX_BYTES, _MAX_PARSED = 50_000_000, 400_000_000


def wanted(names: Iterable[str]) -> list[str]:
    """The files of a model that `metadata.describe` needs."""
    return sorted(name for name in names if name in _NAMES or (name.startswith(_TEMPLATES) and name.endswith(".jinja")))


def too_large(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Problems with the sizes of these files, in bytes."""
    large = [name for name, size in sizes.items() if size > MAX_BYTES]
    if not large and sum(sizes.values()) > 2 * MAX_BYTES:
        large = [max(sizes, key=lambda name: sizes[name])]
    return tuple(
        f"{name} is {sizes[name]:,} bytes long; the files that a GGUF file is made of are read whole, each up to "
        f"{MAX_BYTES:,} bytes and all of them up to {2 * MAX_BYTES:,}"
        for name in large
    )


class ModelFiles:
    """Files by name, read as text or JSON; problems with them are collected."""

    def __init__(self, contents: Mapping[str, bytes], problems: list[str]) -> None:
        self._contents = contents
        self._problems = problems
        self._objects: dict[str, dict[str, Any] | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._contents

    def bytes(self, name: str) -> bytes:
        return self._contents[name]

    def text(self, name: str) -> str | None:
        """A file as UTF-8 with universal newlines; None where there is none."""
        if name not in self._contents:
            return None
        try:
            return self._contents[name].decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            self._problems.append(f"{name} is not UTF-8: {error}")
            return None

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None where there is no such file, or something else in it."""
        if name not in self._objects:
            self._objects[name] = self._parsed(name)
        return self._objects[name]

    def _parsed(self, name: str) -> dict[str, Any] | None:
        if name not in self._contents:
            return None
        try:
            return json_text.parse_object(self._contents[name], MAX_BYTES, _MAX_PARSED)
        except json_text.JsonError as error:
            self._problems.append(f"{name} {error}")
            return None

    def templates(self) -> list[tuple[str, str]]:
        """Additional chat templates: (name, template)."""
        names = sorted(name for name in self._contents if name.startswith(_TEMPLATES))
        texts = [(name.removeprefix(_TEMPLATES).removesuffix(".jinja"), self.text(name)) for name in names]
        return [(name, text) for name, text in texts if text is not None]


def items(value: Any) -> list[Any]:
    """A list as it is, [] for anything else: files are untrusted."""
    return value if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object as it is, {} for anything else."""
    return value if isinstance(value, dict) else {}
