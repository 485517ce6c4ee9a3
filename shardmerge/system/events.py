"""Logs each step with Python's ``logging``, to the logger ``shardmerge``.

Nothing is printed unless a program configures logging. A record has a text, and the attributes ``event``, a word, and
``facts``, a JSON object with sizes in bytes and times in seconds. Steps and shards are logged as INFO, single tensors
as DEBUG.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from shardmerge.spec.notices import severity
from shardmerge.system.terminal_text import one_line

LOG = logging.getLogger("shardmerge")
LOG.addHandler(logging.NullHandler())  # without a handler, Python would print warnings


def event(name: str, text: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Log one step."""
    if LOG.isEnabledFor(level):
        LOG.log(level, "%s", one_line(text), extra={"event": name, "facts": facts})


def notices(texts: Sequence[str]) -> None:
    """Log warnings and notes."""
    for text in texts:
        kind = severity(text)
        event(kind, text, level=logging.WARNING if kind == "warning" else logging.INFO)


class Stopwatch:
    """Measures the seconds between two calls of `lap`."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call or the start, to the millisecond."""
        before, self._since = self._since, time.monotonic()
        return round(self._since - before, 3)
