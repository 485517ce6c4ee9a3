"""The lines that were typed, which the arrow keys bring back."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

from shardmerge.system.installation import state_folder
from shardmerge.system.terminal_text import one_line

#: Lines of history that are kept.
_HISTORY = 1000


class History:
    """The lines that were typed, of this session and of those before it; the arrow keys bring them back.

    They are kept in a file of the user's own, one line at a time, as the program may be ended at any. Where there can
    be none, only this session's are remembered. What was pasted may hold commands to the terminal: readline gets, and
    shows, lines without them.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._known = 0
        with contextlib.suppress(ImportError):
            # Its import is what gives input() line editing.
            self._readline: Any = importlib.import_module("readline")
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
                self._file = self._open(history_file())

    def _open(self, file: Path) -> Path | None:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0o600))
        if not file.is_file():
            return None
        readline = self._readline
        readline.set_history_length(_HISTORY)  # of the file, when it is written to
        readline.clear_history()
        readline.read_history_file(file)
        self._known = readline.get_current_history_length()
        self._escape_from(0)
        return file

    def keep(self) -> None:
        """Write down what was typed since."""
        if self._file is None:
            return
        count = self._readline.get_current_history_length()
        self._escape_from(self._known)
        with contextlib.suppress(OSError, AttributeError):  # libedit in readline's place may lack it
            # A line that repeats the one before it is not counted twice.
            self._readline.append_history_file(count - self._known, self._file)
        self._known = count

    def _escape_from(self, first: int) -> None:
        for place in range(first, self._readline.get_current_history_length()):
            line = self._readline.get_history_item(place + 1)  # which are counted from 1, unlike those to replace
            if line is not None and one_line(line) != line:
                self._readline.replace_history_item(place, one_line(line))


def history_file() -> Path:
    """Where lines are kept."""
    return state_folder() / "chat_history"
