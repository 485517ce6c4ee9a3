"""A signal ends the process within two seconds, whatever it is doing.

SIGINT and SIGTERM become a `KeyboardInterrupt` in the main thread, which cleans up on its way out. But it is raised
only between two steps of the interpreter: not while a large product is being computed, nor while a disk that has died
keeps a write waiting; and code that is not ours may swallow it. As an unfinished merge can be resumed from any state,
the process then simply exits.
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
#: Seconds that tidying up may take.
_GRACE = 1.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    """Whether a signal to stop has come, and what the process says when it exits."""

    stopping = False
    message = "shardmerge: interrupted"
    leaving = threading.Lock()


def interrupt_on_signals() -> None:
    """From now on the first such signal is a `KeyboardInterrupt`, and the second ends the process.

    So does the first where the interrupt has come to nothing after `_GRACE` seconds. Signals that are ignored stay so.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    sys.unraisablehook = _unraisable


def is_stopping() -> bool:
    """Whether such a signal has come."""
    return _State.stopping


def _on_signal(number: int, frame: Any) -> NoReturn:
    if _State.stopping:
        _leave()
    _State.stopping = True
    with suppress(RuntimeError):  # where no thread can be had, a second signal has to do
        threading.Thread(target=_leave_in_time, name="shardmerge-leave", daemon=True).start()
    raise KeyboardInterrupt


def _unraisable(found: Any) -> None:
    """Python shows what is raised where nothing can be, as in ``__del__``; an interrupt need not be shown."""
    if not isinstance(found.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(found)


def _leave_in_time() -> None:
    time.sleep(_GRACE)
    _leave()


def _leave() -> NoReturn:
    if _State.leaving.acquire(blocking=False):  # one thread alone says so
        os.write(2, f"\n{_State.message}\n".encode())
        os._exit(INTERRUPTED)
    while True:
        time.sleep(_GRACE)


@contextmanager
def stopping_in_time() -> Iterator[None]:
    """Within the block, the process ends `_GRACE` seconds after the first such signal, and at once after the second.

    Its exit code then is `INTERRUPTED`. Only the main thread may enter; elsewhere this does nothing.
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
    """Read the numbers of signals, which the interpreter writes even where no handler gets to run, up to the end."""
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
