"""What is done, step by step, as records of Python's ``logging``: the logger is called ``shardmerge``.

A program that uses the library gets them as from any other (``logging.basicConfig(level="INFO")``); without that
nothing is printed. A record has a text, and as attributes ``event``, a word, and ``facts``, what JSON can hold: sizes
in bytes, times in seconds. There is one for a step or a shard; those for single tensors are of level DEBUG.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from shardmerge.spec.notices import severity
from shardmerge.system.terminal_text import one_line

LOG = logging.getLogger("shardmerge")
LOG.addHandler(logging.NullHandler())  # or warnings would be printed where nobody has asked for any


def event(name: str, text: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Record one step."""
    if LOG.isEnabledFor(level):
        LOG.log(level, "%s", one_line(text), extra={"event": name, "facts": facts})


def notices(texts: Sequence[str]) -> None:
    """Record warnings and notes."""
    for text in texts:
        kind = severity(text)
        event(kind, text, level=logging.WARNING if kind == "warning" else logging.INFO)


class Stopwatch:
    """Seconds since it was made, or asked last."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        """Seconds, to the millisecond; begins anew."""
        before, self._since = self._since, time.monotonic()
        return round(self._since - before, 3)
