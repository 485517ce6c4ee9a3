"""Lines of a conversation that are for the program and not for the model."""

from __future__ import annotations

import difflib

from shardmerge.errors import ConfigError

HELP = """\
/help         this text
/reset        forget the conversation
/system TEXT  forget the conversation, and tell the model TEXT before the next
/exit, /quit  leave, as Ctrl-D does
//TEXT        send /TEXT to the model
Ctrl-C stops an answer. The arrow keys bring back earlier lines."""

#: Commands, and whether text may follow.
_COMMANDS = {"/help": False, "/reset": False, "/system": True, "/exit": False, "/quit": False}


def command(line: str) -> tuple[str, str] | None:
    """The command in a line and the text after it; None where the line is for the model.

    `ConfigError` where it begins as a command does and is none: a slip of the finger is no question to the model.
    """
    text = line.strip()
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name.lower(), _COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"there is no command {name}; {meant}/help lists them, and a line that begins with // goes to the model "
            "with one slash"
        )
    if rest and not _COMMANDS[name]:
        raise ConfigError(f"{name} takes no text after it; nothing was done")
    return name, rest


def for_model(line: str) -> str:
    """What the model gets of a line that is not a command."""
    return line.replace("//", "/", 1) if line.lstrip().startswith("//") else line
