"""The small files of a model that the metadata of a GGUF file is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shardmerge.system import json_text

_NAMES = frozenset(
    {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    | {"added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "tekken.json"}
)
_TEMPLATES = "additional_chat_templates/"
#: Bytes of a file, and of the memory for its JSON. The largest tokenizer.json of a well-known model has 35 MB.
MAX_BYTES, _MAX_PARSED = 50_000_000, 400_000_000


def wanted(names: Iterable[str]) -> list[str]:
    """The names of the files that `metadata.describe` needs."""
    return sorted(name for name in names if name in _NAMES or (name.startswith(_TEMPLATES) and name.endswith(".jinja")))


def too_large(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Problems with the files' sizes in bytes."""
    large = [name for name, size in sizes.items() if size > MAX_BYTES]
    if not large and sum(sizes.values()) > 2 * MAX_BYTES:
        large = [max(sizes, key=lambda name: sizes[name])]
    return tuple(
        f"{name} is {sizes[name]:,} bytes long; the files for the metadata of a GGUF file may have {MAX_BYTES:,} bytes "
        f"each and {2 * MAX_BYTES:,} together"
        for name in large
    )


class ModelFiles:
    """Files by name, read as text or JSON. Problems are collected."""

    def __init__(self, contents: Mapping[str, bytes], problems: list[str]) -> None:
        self._contents = contents
        self._problems = problems
        self._objects: dict[str, dict[str, Any] | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._contents

    def bytes(self, name: str) -> bytes:
        return self._contents[name]

    def text(self, name: str) -> str | None:
        """A file as UTF-8 with universal newlines; None if it does not exist."""
        if name not in self._contents:
            return None
        try:
            return self._contents[name].decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            self._problems.append(f"{name} is not UTF-8: {error}")
            return None

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None if the file does not exist or is something else."""
        if name not in self._objects:
            self._objects[name] = None
            try:
                if name in self._contents:
                    self._objects[name] = json_text.parse_object(self._contents[name], MAX_BYTES, _MAX_PARSED)
            except json_text.JsonError as error:
                self._problems.append(f"{name} {error}")
        return self._objects[name]

    def templates(self) -> list[tuple[str, str]]:
        """Additional chat templates: (name, template)."""
        names = sorted(name for name in self._contents if name.startswith(_TEMPLATES))
        texts = [(name.removeprefix(_TEMPLATES).removesuffix(".jinja"), self.text(name)) for name in names]
        return [(name, text) for name, text in texts if text is not None]


def items(value: Any) -> list[Any]:
    """The value if it is a list, else []: files are untrusted."""
    return value if isinstance(value, list) else []


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else {}."""
    return value if isinstance(value, dict) else {}
