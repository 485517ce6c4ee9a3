"""When looking for garbage is a waste: while many objects are made that all stay. And who gets what was freed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within, cycles are not searched for. Of a plan that costs a third, of importing torch a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back() -> None:
    """Let others have what is free: malloc keeps it, for the thread that freed it, in pieces into which few fit."""
    import ctypes

    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
