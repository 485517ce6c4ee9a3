"""How much memory this process has resident, and had at most."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from shardmerge.spec.tensors import LIBRARY_BYTES
from shardmerge.system.aligned_memory import resident


def peak_memory() -> int:
    """The most memory this process has had resident, in bytes."""
    # getrusage would do, but on Linux a child starts with its parent's maximum.
    if (peak := status_bytes("VmHWM")) is not None:
        return peak
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


class WorkingSet:
    """Measures what a merge takes, buffers included, above the interpreter with all modules in it.

    Pages of files, which are the libraries' code, count up to `LIBRARY_BYTES`: the kernel maps as many around a touched
    page as it holds in one piece (10 MB of torch's here, 33 MB where its files had been read at once before), and can
    take them back at any time.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        """``buffers`` are as `shardmerge.system.aligned_memory.pages` makes them."""
        self._buffers = buffers
        self._peak = peak_memory()
        self.begin()

    def begin(self) -> None:
        """Measure from what is resident now, without the buffers, which are in use already."""
        filled, now = -1, self._filled()
        while now != filled:  # another thread may be reading into them, but not for ever
            filled, whole = now, status_bytes("VmRSS")
            now = self._filled()
        self._resident = None if whole is None else whole - filled
        self._code = status_bytes("RssFile") or 0

    def _filled(self) -> int:
        return sum(map(resident, self._buffers))

    def grown(self) -> int | None:
        """The peak of resident bytes above those at the beginning; None where it cannot be measured."""
        peak = peak_memory()
        if self._resident is None or peak <= self._peak:
            return None
        code = (status_bytes("RssFile") or 0) - self._code
        return peak - self._resident - max(0, code - LIBRARY_BYTES)


def status_bytes(name: str) -> int | None:
    """Bytes by name, from /proc/self/status; None where there is no such file."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
