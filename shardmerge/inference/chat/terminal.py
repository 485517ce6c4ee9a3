"""A chat's terminal: its echo, which is off while an answer is written, and the history of typed lines.

So text that is typed meanwhile does not appear inside the answer. The echo is restored however the answer ends: by
itself, by an exception, or by a signal that stops or ends the process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from shardmerge.system.installation import state_folder
from shardmerge.system.terminal_text import one_line

#: Signals that, unless handled, stop or end a process without an exception.
_FATAL = (signal.SIGTSTP, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)
_LOCAL_FLAGS = 3  # the index of c_lflag in the attributes of termios


class Terminal:
    """The terminal that a stream is connected to. Without one, no method has an effect."""

    def __init__(self, stream: TextIO) -> None:
        self._fd: int | None = None
        self._before: list[Any] = []
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):  # a stream without a descriptor
            if stream.isatty():
                self._before = termios.tcgetattr(stream.fileno())
                self._fd = stream.fileno()

    @contextlib.contextmanager
    def muted(self, *, forget: bool = False) -> Iterator[None]:
        """Switch the echo off in the block.

        Text typed meanwhile is kept for the next read, or dropped with ``forget``: only line editing can still show it.
        """
        if self._fd is None:
            yield
            return
        handled = self._handle_signals()
        try:
            self._mute()
            yield
        finally:
            self.restore()
            if forget and self._is_ours():
                termios.tcflush(self._fd, termios.TCIFLUSH)
            for number in handled:
                signal.signal(number, signal.SIG_DFL)

    def restore(self) -> None:
        """Restore the attributes that the terminal had when this object was made."""
        self._set(self._before)

    def _mute(self) -> None:
        muted = [*self._before]
        muted[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ECHONL)
        self._set(muted)

    def _set(self, attributes: list[Any]) -> None:
        if self._fd is not None and self._is_ours():
            with contextlib.suppress(termios.error):  # it may have been hung up
                termios.tcsetattr(self._fd, termios.TCSANOW, attributes)

    def _is_ours(self) -> bool:
        """Whether this process is in the foreground; otherwise a change of the terminal would stop it."""
        try:
            return self._fd is not None and os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False

    def _handle_signals(self) -> list[signal.Signals]:
        if threading.current_thread() is not threading.main_thread():
            return []  # only the main thread may
        unhandled = [number for number in _FATAL if signal.getsignal(number) == signal.SIG_DFL]
        for number in unhandled:
            signal.signal(number, self._on_signal)
        return unhandled

    def _on_signal(self, number: int, frame: Any) -> None:
        """Restore the terminal and let the signal have its default effect; continue muted after a stop."""
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_kill(threading.get_ident(), number)
        signal.signal(number, self._on_signal)
        self._mute()


#: Lines of history that are kept.
_HISTORY = 1000


class History:
    """The lines typed in this session and earlier ones, which the arrow keys bring back.

    Each line is appended to a file of the user at once, since the program may be killed. Without such a file, only this
    session's lines are remembered. Pasted text may hold control characters: they are escaped before readline shows it.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._known = 0
        with contextlib.suppress(ImportError):
            # Importing it gives input() line editing.
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
        """Append the lines typed since the last call to the file."""
        if self._file is None:
            return
        count = self._readline.get_current_history_length()
        self._escape_from(self._known)
        with contextlib.suppress(OSError, AttributeError):  # libedit in readline's place may lack it
            # readline does not count a line that repeats the one before it.
            self._readline.append_history_file(count - self._known, self._file)
        self._known = count

    def _escape_from(self, first: int) -> None:
        for place in range(first, self._readline.get_current_history_length()):
            line = self._readline.get_history_item(place + 1)  # counts from 1, while replace_history_item does from 0
            if line is not None and one_line(line) != line:
                self._readline.replace_history_item(place, one_line(line))


def history_file() -> Path:
    return state_folder() / "chat_history"
