"""Memory for direct I/O: where it begins, what it takes, and that huge pages are asked for."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from shardmerge.system.aligned_memory import pages, resident

HUGE = 2 << 20


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE + 4096])
def test_it_is_writable_zeros_that_begin_on_a_page(size: int) -> None:
    view = pages(size)
    assert len(view) == size and not view.readonly
    assert not any(view[::509])
    if size:
        assert address(view) % (HUGE if size >= HUGE else mmap.PAGESIZE) == 0
        view[:] = b"x" * size


def test_it_goes_back_to_the_system_with_its_last_view() -> None:
    view = pages(4 * HUGE)
    part, where = view[HUGE:], f"{address(view):x}-"
    del view
    assert where[:-4] in Path("/proc/self/maps").read_text()
    part[:1] = b"x"
    del part
    assert not any(line.startswith(where) for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it gave")
def test_what_was_touched_is_resident() -> None:
    assert resident(pages(0)) == 0
    view = pages(4 * HUGE)
    assert resident(view) == 0
    view[0] = view[HUGE + 1] = 1  # a page each, or a huge one
    assert resident(view[2 * HUGE :]) == 0
    assert 2 * mmap.PAGESIZE <= resident(view) <= 2 * HUGE
    view[:] = b"x" * len(view)
    assert resident(view) == len(view)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it gave")
def test_huge_pages_are_asked_for_and_no_more_than_fit() -> None:
    """In a process of its own, of which /proc/self/smaps then tells."""
    code = """
import ctypes, re
from shardmerge.system.aligned_memory import pages

view = pages(4 * (2 << 20) + 4096)
view[:] = bytes(len(view))
address = ctypes.addressof(ctypes.c_char.from_buffer(view))
size, flags, found = 0, "", False
for line in open("/proc/self/smaps"):
    if m := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        found = int(m[1], 16) <= address < int(m[2], 16)
    if found and line.startswith("Rss:"):
        size = int(line.split()[1])
    if found and line.startswith("VmFlags:"):
        flags = line
print(size, "hg" in flags.split())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    thp = Path("/sys/kernel/mm/transparent_hugepage")
    assert found[1] == str(thp.exists())
    assert int(found[0]) <= 4 * 2048 + 4
