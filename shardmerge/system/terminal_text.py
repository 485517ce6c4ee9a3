"""Escapes untrusted text (names, settings, answers) so that it cannot control a terminal or imitate our lines.

Names of tensors are refused when they are read (`naming.fault`); names of files, values of configs and metadata may
contain anything.
"""

from __future__ import annotations

import re

#: Control characters except the newline, those that change the writing direction (Unicode's Bidi_Control, and the
#: deprecated controls after them), and halves of surrogate pairs.
_COMMANDS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")


def shown(text: str) -> str:
    """Text whose newlines are ours."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown_answer(text: str) -> str:
    """A model's text, or a piece of it, with newlines and tabs. Every character is escaped by itself."""
    return "\t".join(map(shown, text.split("\t")))


def one_line(text: str) -> str:
    """Text without newlines: a name, a cell of a table, a problem of a list."""
    return shown(text).replace("\n", "\\n")


def shown_json(text: str) -> str:
    """JSON with the same meaning."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
