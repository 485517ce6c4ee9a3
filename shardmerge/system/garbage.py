"""Python's garbage collection, paused while many objects are made that all stay; and freed memory, returned."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_process_is_ours = False
#: Of mallopt(3).
_M_ARENA_MAX = -8


def process_is_ours() -> None:
    """Say that this process runs one command of ours and nothing else.

    The objects that exist after `no_garbage_collection` are then never looked at again: they stay to the end anyway,
    and a first look at all that torch makes when it is imported takes as long as a hundred megabytes of a merge.
    """
    global _process_is_ours
    _process_is_ours = True
    _allocate_in_one_arena()


def _allocate_in_one_arena() -> None:
    """Let all threads allocate in the same memory: with one piece a thread, a merge takes 1.1 MB more."""
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within, cycles are not searched for. Of a plan that costs a third, of importing torch a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _process_is_ours:
            gc.freeze()
        if enabled:
            gc.enable()


def give_back() -> None:
    """Return free memory to the system: malloc keeps it for the thread that freed it, in pieces too small to reuse.

    Python itself keeps free tuples, which hold 25 MB after a plan of 45,000 targets, until it has looked for garbage.
    """
    if _process_is_ours:  # then what is there is frozen, and the look takes no time
        gc.collect()
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
