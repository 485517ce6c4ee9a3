"""The console script: told to stop, the process stops without a traceback, also while the rest of the program loads.

Nothing is imported before the handlers stand but what the interpreter has by then; until the interpreter itself is up,
a signal does what Python does with it.
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
    from shardmerge.cli import main as run

    run()
