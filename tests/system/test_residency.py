"""What is in the page cache, and descriptors that go past it."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from random import Random

import pytest

from shardmerge.sources import local
from shardmerge.sources.local import LocalReader
from shardmerge.spec.tensors import PAGE, SourceFile
from shardmerge.system.page_cache import Residency, open_direct

SIZE = 40 * PAGE + 123


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(Random(1).randbytes(SIZE))
    return path


def drop(path: Path) -> bool:
    """Put a file out of the page cache; whether that can be had here."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if not hasattr(os, "posix_fadvise"):
            return False
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return not resident(path, 0, SIZE)
    finally:
        os.close(fd)


def resident(path: Path, offset: int, size: int) -> bool:
    fd = os.open(path, os.O_RDONLY)
    residency = Residency(fd, path.stat().st_size)
    try:
        return residency.has(offset, size)
    finally:
        residency.close()
        os.close(fd)


def reader(path: Path) -> LocalReader:
    status = path.stat()
    return LocalReader(SourceFile(str(path), status.st_size, status.st_mtime_ns))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked in Linux's way")
def test_what_was_just_written_is_in_the_cache_and_can_be_put_out(file: Path) -> None:
    assert resident(file, 0, SIZE)
    assert resident(file, 5, 1) and resident(file, SIZE - 1, 1)
    if not drop(file):
        pytest.skip("this file system keeps its pages")
    with open(file, "rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(opened.fileno(), 10, 3 * PAGE)
    assert resident(file, 3 * PAGE, PAGE) and not resident(file, 0, SIZE)


def test_nothing_is_said_of_what_cannot_be_asked(file: Path) -> None:
    residency = Residency(-1, SIZE)
    assert not residency.has(0, 1)
    residency.close()
    residency.close()
    empty = Residency(-1, 0)
    assert not empty.has(0, 1)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_blocks_hold_what_the_file_holds(
    file: Path, cached: bool, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any offset, size and place in memory; beyond the pages of the block nothing is touched."""
    if not direct:
        monkeypatch.setattr(local, "open_direct", lambda path, flags: -1)
    wanted, random = file.read_bytes(), Random(2)
    opened = reader(file)
    memory = mmap.mmap(-1, 48 * PAGE)
    view = memoryview(memory)
    for number in range(60):
        if not cached:
            drop(file)
        offset = random.randrange(SIZE)
        size = random.choice([1, random.randrange(1, 3 * PAGE), SIZE]) if number else SIZE
        size = min(size, SIZE - offset)
        position = PAGE + (offset % PAGE if random.random() < 0.7 else random.randrange(PAGE))
        view[:] = b"\xaa" * len(view)
        opened.read_block(view, position, offset, size)
        assert bytes(view[position : position + size]) == wanted[offset : offset + size]
        first, last = position - position % PAGE, -(-(position + size) // PAGE) * PAGE
        assert bytes(view[:first]).strip(b"\xaa") == b"" and bytes(view[last:]).strip(b"\xaa") == b""
    opened.close()
    opened.close()
    view.release()
    memory.close()


def test_a_read_past_the_cache_does_not_fill_it(file: Path) -> None:
    if not drop(file) or open_direct(str(file), os.O_RDONLY) < 0:
        pytest.skip("this file system has no reads past its cache")
    opened = reader(file)
    with mmap.mmap(-1, 48 * PAGE) as memory, memoryview(memory) as view:
        opened.read_block(view, 0, 0, SIZE)
    opened.close()
    assert not resident(file, 0, PAGE)


def test_a_file_that_was_cut_is_told(file: Path) -> None:
    from shardmerge import SourceError

    opened = reader(file)
    os.truncate(file, 10 * PAGE)
    with mmap.mmap(-1, 48 * PAGE) as memory, memoryview(memory) as view, pytest.raises(SourceError, match="ends at"):
        opened.read_block(view, 0, 0, SIZE)
    opened.close()


def test_open_direct_says_where_it_cannot(tmp_path: Path) -> None:
    assert open_direct(str(tmp_path / "missing"), os.O_RDONLY) == -1
