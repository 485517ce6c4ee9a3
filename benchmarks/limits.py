"""What the machine can do by itself: its disk, its memory, one of its cores. Bytes or operations per second.

What shardmerge's stages reach is held against these by `benchmarks.stages`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import direct
from benchmarks.measure import warm

_COPY_BYTES = 256 << 20
_SQUARE = 1024
_SECONDS = 0.3


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def direct_read(source: Path, size: int, huge: bool = False) -> float:
    return size / timed(lambda: direct.read(source, 0, size, huge))


def direct_write(target: Path, size: int, huge: bool = False) -> float:
    try:
        return size / timed(lambda: direct.write(target, size, huge))
    finally:
        target.unlink(missing_ok=True)


def direct_both(source: Path, target: Path, size: int, huge: bool = False) -> float:
    """Bytes per second each way, when as much is read as is written at the same time."""

    def both() -> None:
        reading = threading.Thread(target=direct.read, args=(source, 0, size, huge))
        reading.start()
        try:
            direct.write(target, size, huge)
        finally:
            reading.join()

    try:
        return size / timed(both)
    finally:
        target.unlink(missing_ok=True)


def warm_read(source: Path, size: int) -> float:
    """From the page cache into a buffer that is used again."""
    warm([source])
    buffer = bytearray(direct.BLOCK)

    def read() -> None:
        with open(source, "rb", buffering=0) as file:
            for _ in range(0, size, len(buffer)):
                file.readinto(buffer)

    return size / timed(read)


def memcpy(size: int = _COPY_BYTES) -> float:
    """Bytes copied per second by one thread, in pieces that no cache holds."""
    source, target = memoryview(bytearray(os.urandom(size))), memoryview(bytearray(size))

    def copy() -> None:
        target[:] = source

    copy()  # so that all pages are there
    return size / timed(copy)


def products(out: int, rank: int, into: int) -> float:
    """Operations per second of float32 (out, rank) x (rank, into) on one thread, again and again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right, result = torch.rand(out, rank), torch.rand(rank, into), torch.empty(out, into)
        count, seconds = 1, 0.0

        def multiply() -> None:
            for _ in range(count):
                torch.mm(left, right, out=result)

        multiply()
        while (seconds := timed(multiply)) < _SECONDS:
            count *= 2
        return 2 * out * rank * into * count / seconds
    finally:
        torch.set_num_threads(before)


def square_product() -> float:
    return products(_SQUARE, _SQUARE, _SQUARE)
