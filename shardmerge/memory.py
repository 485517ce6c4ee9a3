"""Memory in whole pages, as direct I/O wants it; in huge pages as far as the system gives them.

A direct transfer names every piece of memory that lies apart from the last, and huge pages are fewer pieces. In a VM,
whose host looks at each of them, that alone can make a disk twice as fast: benchmarks/README.md has figures.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

#: Of x86-64 and most ARM64; where they are larger, none are given, and nothing else changes.
_HUGE = 2 << 20


def pages(size: int) -> memoryview:
    """``size`` bytes of zeros, which begin on a page; on a huge one where a huge one fits.

    It belongs to no file, and goes back to the system with its last view. What is not touched takes no memory.
    """
    huge = size // _HUGE * _HUGE
    memory = mmap.mmap(-1, max(size + (_HUGE if huge else 0), 1), **_private())
    if not huge:
        return memoryview(memory)[:size]
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE
    with suppress(OSError, AttributeError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return memoryview(memory)[start : start + size]


def _private() -> dict[str, int]:
    # Huge pages of memory that is shared with other processes are a setting of their own, and mostly off.
    return {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
