"""A terminal that does not show what is typed while an answer is written to it.

What is typed then would be shown in the midst of the answer. So the terminal's echo is off meanwhile. It is put back
whatever ends the answer: its end, an exception, or a signal that would stop or end the process in another way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import threading
from collections.abc import Iterator
from typing import Any, TextIO

#: Signals that stop or end a process without an exception, where nobody handles them.
_FATAL = (signal.SIGTSTP, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)
_LOCAL_FLAGS = 3  # the place of c_lflag in what termios gives


class Terminal:
    """The terminal that a stream is connected to; without one, nothing here does anything."""

    def __init__(self, stream: TextIO) -> None:
        self._fd: int | None = None
        self._before: list[Any] = []
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):  # a stream without a descriptor
            if stream.isatty():
                self._before = termios.tcgetattr(stream.fileno())
                self._fd = stream.fileno()

    @contextlib.contextmanager
    def muted(self, *, forget: bool = False) -> Iterator[None]:
        """Within the block nothing that is typed is shown.

        It is kept for who reads next, or with ``forget`` dropped: only an editor of lines shows what was typed before.
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
        """Put the terminal back as it was when this object was made."""
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
        """Whether this process is in the foreground: it would be stopped if it changed another's terminal."""
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
        """Do what the signal does by itself, with the terminal as it was; go on where ``fg`` has ended a stop."""
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_kill(threading.get_ident(), number)
        signal.signal(number, self._on_signal)
        self._mute()
