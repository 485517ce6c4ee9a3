"""Small configs, and the messages about wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from shardmerge.config.schema import MergeConfig
from shardmerge.errors import ConfigError

GOOD = "base: models/tiny\nadapters:\n  - path: sft\noutput:\n  path: merged\n"

DATA: dict[str, Any] = {"base": "models/tiny", "adapters": [{"path": "sft"}], "output": {"path": "merged"}}

#: What a message may take, however large what is wrong.
BOUND = 20_000


def from_text(folder: Path, text: str | bytes, overrides: Sequence[str] = ()) -> MergeConfig:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return MergeConfig.from_file(path, overrides)


def refusal(action: Callable[[], object]) -> str:
    """The message of the `ConfigError` that ``action`` must raise; it can be printed."""
    with pytest.raises(ConfigError) as raised:
        action()
    message = str(raised.value)
    message.encode()
    assert raised.value.exit_code == 2
    return message


def problems(value: dict[str, Any]) -> list[str]:
    """The lines of what is wrong with a config."""
    head, *lines = refusal(lambda: MergeConfig.from_dict(value)).splitlines()
    assert head == "config: the config is wrong; nothing was written:"
    return [line.removeprefix("  - ") for line in lines]
