"""What a person is to know of a merge that is done all the same: a note, or a warning.

A *warning* says that the result may be other than expected: weaker, of another model, or not what PEFT or llama.cpp
would compute. A *note* says what was decided, and that it is as it should be. Both are text, a note a plain string.
"""

from __future__ import annotations


class Warned(str):
    """A text that says why the result may be other than expected."""

    __slots__ = ()


def prefixed(prefix: str, notice: str) -> str:
    """A notice with words before it, which stays what it is."""
    return type(notice)(prefix + notice) if isinstance(notice, Warned) else prefix + notice


def severity(notice: str) -> str:
    """``"warning"`` or ``"note"``."""
    return "warning" if isinstance(notice, Warned) else "note"
