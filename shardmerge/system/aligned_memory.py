"""Memory in whole pages, as direct I/O requires, and in huge pages where the system grants them.

A direct transfer lists every piece of memory that is not adjacent to the last, and huge pages are fewer pieces. In a
VM, with pages of 4 KiB, a merge of 2.2 GB that is not in the page cache takes 1.4 times as long (4.8 s and 3.4 s,
medians of 5 alternating runs); docs/benchmarks.md has figures of the disk alone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
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


def resident(view: memoryview) -> int:
    """Bytes of `pages` that take memory by now; 0 where the system does not say."""
    if sys.platform != "linux" or not len(view):
        return 0
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    found = ctypes.create_string_buffer(-(-len(view) // mmap.PAGESIZE))
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(view)), found):
        return 0
    return sum(page & 1 for page in found.raw) * mmap.PAGESIZE


def _private() -> dict[str, int]:
    # Huge pages of memory that is shared with other processes are a setting of their own, and mostly off.
    return {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
