"""The disk's own speed: read files, or write one, past the page cache and with no other work.

Several requests at a time, as a disk is fastest then; a copy reads and writes by turns, as two at a time were no
faster. With ``--huge`` the memory is in huge pages, as shardmerge's is, else as any program gets it. Where the file
system has no direct I/O, ordinary I/O with fsync, and it says so.

    python -m benchmarks.direct [--huge] read FILE...
    python -m benchmarks.direct [--huge] write FILE BYTES
    python -m benchmarks.direct [--huge] copy FILE... FOLDER
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from shardmerge.system.aligned_memory import pages

#: Requests at a time.
DEPTH = 4
BLOCK = 4 << 20
PAGE = 4096


def _open(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor, and whether it goes past the page cache."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError:
        return os.open(path, flags, 0o666), False


def _memory(huge: bool) -> memoryview:
    return pages(BLOCK) if huge else memoryview(mmap.mmap(-1, BLOCK))


def _side_by_side(size: int, fill: bytes, transfer: Callable[[memoryview, int], None], huge: bool) -> None:
    """Call ``transfer`` with memory that begins with ``fill`` and the offset of every block, from several threads.

    What it raises is raised when all threads have ended.
    """
    errors: list[BaseException] = []

    def lane(number: int) -> None:
        try:
            view = _memory(huge)
            view[: len(fill)] = fill
            for offset in range(number * BLOCK, size, DEPTH * BLOCK):
                transfer(view, offset)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=lane, args=(number,)) for number in range(DEPTH)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def read(path: Path, start: int = 0, size: int | None = None, huge: bool = False) -> bool:
    """Read a file, or ``size`` bytes from ``start``, a multiple of a page; whether that was direct."""
    descriptor, is_direct = _open(path, os.O_RDONLY)
    end = os.fstat(descriptor).st_size

    def transfer(view: memoryview, offset: int) -> None:
        wanted = min(BLOCK, end - start - offset)
        if (count := os.preadv(descriptor, [view], start + offset)) < wanted:
            raise OSError(f"{path}: {count} bytes came where {wanted} were asked for")

    try:
        _side_by_side(end - start if size is None else size, b"", transfer, huge)
    finally:
        os.close(descriptor)
    return is_direct


def write(path: Path, size: int, huge: bool = False) -> bool:
    """Write a file of ``size`` bytes, up to a page more, so that it is on the disk; whether that was direct."""
    descriptor, is_direct = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    whole = -(-size // PAGE) * PAGE

    def transfer(view: memoryview, offset: int) -> None:
        done, length = 0, min(BLOCK, whole - offset)
        while done < length:
            done += os.pwrite(descriptor, view[done:length], offset + done)

    try:
        os.posix_fallocate(descriptor, 0, whole)
        # Random, so that no storage makes less of it than there is.
        _side_by_side(whole, os.urandom(BLOCK), transfer, huge)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return is_direct


def copy(source: Path, target: Path, huge: bool = False) -> bool:
    """Copy a file, up to a page more of it, so that it is on the disk; whether that was direct."""
    reading, is_direct = _open(source, os.O_RDONLY)
    writing, is_direct_too = _open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    size = os.fstat(reading).st_size
    memory = _memory(huge)
    try:
        os.posix_fallocate(writing, 0, -(-size // PAGE) * PAGE)
        for offset in range(0, size, BLOCK):
            count = os.preadv(reading, [memory], offset)
            done, length = 0, -(-count // PAGE) * PAGE
            while done < length:
                done += os.pwrite(writing, memory[done:length], offset + done)
        os.fsync(writing)
    finally:
        os.close(reading)
        os.close(writing)
    return is_direct and is_direct_too


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    huge = "--huge" in given
    action, *rest = [argument for argument in given if argument != "--huge"]
    if action == "read":
        found = [read(Path(name), huge=huge) for name in rest]
    elif action == "write":
        path = Path(rest[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [write(path, int(rest[1]), huge)]
    elif action == "copy":
        *sources, folder = map(Path, rest)
        folder.mkdir(parents=True, exist_ok=True)
        found = [copy(source, folder / source.name, huge) for source in sources]
    else:
        sys.exit(f"{action}: neither read, write nor copy")
    print("direct I/O" if all(found) else "no direct I/O here: through the page cache")


if __name__ == "__main__":
    main()
