"""Untrusted text (names, settings, answers) as a terminal may show it: no command to it, and no line of ours.

Names of tensors are refused where they are read (`naming.fault`); this is for what may hold anything: names of files,
values of configs and of metadata.
"""

from __future__ import annotations

import re

#: Control characters but the end of a line, what turns the order of what follows (all of Unicode's Bidi_Control, and
#: the deprecated controls after them), and halves of surrogate pairs.
_COMMANDS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")


def shown(text: str) -> str:
    """Text of ours, in which lines end where they do."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown_answer(text: str) -> str:
    """A model's text, of which newlines and tabs are a part.

    Characters are escaped one by one, so a text may be given in pieces: of a sequence that is split over two of them,
    each is escaped. A piece is never less than a character.
    """
    return "\t".join(map(shown, text.split("\t")))


def one_line(text: str) -> str:
    """Text in which no line may end: one name, one cell of a table, one problem of a list."""
    return shown(text).replace("\n", "\\n")


def shown_json(text: str) -> str:
    """JSON, which stays what it means."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
