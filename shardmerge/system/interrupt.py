"""Ends the process within two seconds of a signal, whatever it is doing.

SIGINT and SIGTERM become a `KeyboardInterrupt` in the main thread, which cleans up. But Python raises it only between
two of its own steps, not during a long computation or a blocked write, and other code may swallow it. The process then
exits: an unfinished merge can be resumed from any state.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

INTERRUPTED = 130
ADVICE = "interrupted; run the same command again to resume it"
#: Seconds for cleaning up.
_GRACE = 1.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    """Whether a signal to stop has arrived, and the message at exit."""

    stopping = False
    message = "shardmerge: interrupted"
    leaving = threading.Lock()


def interrupt_on_signals() -> None:
    """From now on the first such signal is a `KeyboardInterrupt`; the second, or `_GRACE` seconds, end the process.

    Signals that are ignored stay ignored.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    sys.unraisablehook = _unraisable


def is_stopping() -> bool:
    """Whether such a signal has arrived."""
    return _State.stopping


def _on_signal(number: int, frame: Any) -> NoReturn:
    if _State.stopping:
        _leave()
    _State.stopping = True
    with suppress(RuntimeError):  # without another thread, a second signal must do
        threading.Thread(target=_leave_in_time, name="shardmerge-leave", daemon=True).start()
    raise KeyboardInterrupt


def _unraisable(found: Any) -> None:
    """Do not print an interrupt that was raised in ``__del__``."""
    if not isinstance(found.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(found)


def _leave_in_time() -> None:
    time.sleep(_GRACE)
    _leave()


def _leave() -> NoReturn:
    if _State.leaving.acquire(blocking=False):  # only one thread prints it
        os.write(2, f"\n{_State.message}\n".encode())
        os._exit(INTERRUPTED)
    while True:
        time.sleep(_GRACE)


@contextmanager
def stopping_in_time() -> Iterator[None]:
    """In the block, the process ends `_GRACE` seconds after the first such signal, at once after the second.

    Its exit code is `INTERRUPTED`. In other threads than the main one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals, notify = os.pipe()
    os.set_blocking(notify, False)
    threading.Thread(target=_watch, args=(signals,), name="shardmerge-interrupt", daemon=True).start()
    before = signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
    message, _State.message = _State.message, f"shardmerge: {ADVICE}"
    try:
        yield
    finally:
        _State.message = message
        signal.set_wakeup_fd(before)
        os.close(notify)


def _watch(signals: int) -> None:
    """Read the numbers of signals until the pipe closes; Python writes them even if no handler gets to run."""
    stopping = False
    while True:
        ready, _, _ = select.select([signals], [], [], _GRACE if stopping else None)
        data = os.read(signals, 64) if ready else b""
        if ready and not data:
            os.close(signals)
            return
        count = sum(number in _SIGNALS for number in data)
        if not ready or stopping + count > 1:
            _leave()
        stopping = stopping or count > 0
