"""Notes and warnings about a merge.

A *warning* says that the result may differ from what is expected: weaker, of another model, or not what PEFT or
llama.cpp would compute. A *note* says what was decided, and is a plain string.
"""

from __future__ import annotations


class Warned(str):
    """A warning."""

    __slots__ = ()


def prefixed(prefix: str, notice: str) -> str:
    """A notice with words before it, of the same severity."""
    return type(notice)(prefix + notice) if isinstance(notice, Warned) else prefix + notice


def severity(notice: str) -> str:
    """``"warning"`` or ``"note"``."""
    return "warning" if isinstance(notice, Warned) else "note"
