"""The console script: a signal ends the process without a traceback, also while the rest of the program is imported.

So the signal handlers are installed before anything is imported that the interpreter has not imported itself. A signal
that comes before the interpreter has started is Python's to handle.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def _leave(number: int, frame: Any) -> NoReturn:
    """Nothing was begun, so nothing is to be tidied up."""
    os.write(2, b"shardmerge: interrupted\n")
    os._exit(130)


def main() -> NoReturn:
    """Load the command line and run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in the background
            signal.signal(number, _leave)
    try:
        from shardmerge.system.limits import check_room

        check_room()
        from shardmerge.cli.main import main as run
    except Exception as error:
        _fail(error)
    run()


def _fail(error: Exception) -> NoReturn:
    """End, where not even the command line can be loaded: with one line where that is for want of memory or files."""
    try:
        from shardmerge.system.limits import explained_while_loading

        why = explained_while_loading(error)
    except Exception:  # for want of the same
        why = f"memory or open files ran out while it was loaded (ulimit -v, -d and -n): {type(error).__name__} {error}"
    if why is None:
        raise error
    os.write(2, f"shardmerge: {why}. Nothing was begun\n".encode())
    os._exit(5)
