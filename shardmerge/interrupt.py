"""A process that was told to stop does so in time, whatever it is doing.

SIGINT and SIGTERM become a `KeyboardInterrupt` in the main thread, which tidies up on its way out. But it comes through
only between two steps of the interpreter: not while a large product is being computed, nor while a disk that has died
keeps a write waiting. As an unfinished merge can be taken up from any state, the process then simply leaves.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
ADVICE = "interrupted; run the same command again to take it up"
#: Seconds that tidying up may take.
_GRACE = 1.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_in_time() -> Iterator[None]:
    """Within the block, the process ends `_GRACE` seconds after the first such signal, and at once after the second.

    Its exit code then is `INTERRUPTED`. Only the main thread may enter; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, teller = os.pipe()
    os.set_blocking(teller, False)
    threading.Thread(target=_watch, args=(told,), name="shardmerge-interrupt", daemon=True).start()
    before = signal.set_wakeup_fd(teller, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(teller)


def _watch(told: int) -> None:
    """Read the numbers of signals, which the interpreter writes even where no handler gets to run, up to the end."""
    stopping = False
    while True:
        ready, _, _ = select.select([told], [], [], _GRACE if stopping else None)
        data = os.read(told, 64) if ready else b""
        if ready and not data:
            os.close(told)
            return
        count = sum(number in _SIGNALS for number in data)
        if not ready or stopping + count > 1:
            os.write(2, f"\nshardmerge: {ADVICE}\n".encode())
            os._exit(INTERRUPTED)
        stopping = stopping or count > 0
