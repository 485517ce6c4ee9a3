"""The console script. A signal ends the process without a traceback, also while the rest of the program is loading.

The handlers are installed before anything is imported that the interpreter has not loaded itself.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def _leave(number: int, frame: Any) -> NoReturn:
    """Exit at once: no work has begun, so there is nothing to clean up."""
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
    """Report why the command line cannot be loaded: one line where memory or open files ran out, else the traceback."""
    try:
        from shardmerge.system.limits import explained_while_loading

        why = explained_while_loading(error)
    except Exception:  # it cannot be loaded either
        why = f"memory or open files ran out while it was loaded (ulimit -v, -d and -n): {type(error).__name__} {error}"
    if why is None:
        raise error
    os.write(2, f"shardmerge: {why}. Nothing was begun\n".encode())
    os._exit(5)
