"""Run one command as a process of its own and say what it took: time, memory, bytes from and to the storage.

Linux only. Memory is ``ru_maxrss`` of `os.wait4`, the maximum over the process and its children. A process inherits its
parent's maximum when it is started, by vfork too (the kernel carries it over at exec), so no result can be below
`own_peak`: that is why whoever measures must stay small, and imports neither torch nor numpy.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: The folder that holds `benchmarks` and `shardmerge`; commands run in it.
ROOT = Path(__file__).resolve().parents[1]
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command took. Bytes are None where the kernel does not say."""

    exit_code: int
    seconds: float
    user_seconds: float
    system_seconds: float
    peak_bytes: int
    read_bytes: int | None
    written_bytes: int | None

    @property
    def cpu_seconds(self) -> float:
        return self.user_seconds + self.system_seconds


def own_peak() -> int:
    """The most memory that this process has had resident, in bytes: the least a measured peak can be."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, str]:
    """The environment of what is measured: ours, but Python may keep the bytecode of what it imports.

    Pip compiles what it installs. Of a checkout Python does, when it first imports a module; where it must not, every
    start of shardmerge, and of no other tool, would compile it anew.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def measure(command: list[str], log: Path) -> Usage:
    """Run a command to its end. What it prints goes to ``log``."""
    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        # It has ended but is not reaped yet, so its counters of bytes are still there.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - started
        counters = _io_counters(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would look for it again
    return Usage(
        exit_code=process.returncode,
        seconds=seconds,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        read_bytes=counters.get("read_bytes"),
        written_bytes=counters.get("write_bytes"),
    )


def _io_counters(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(":") for line in lines)}


def warm(files: Iterable[Path]) -> None:
    """Read files once, so that they are in the page cache as far as they fit."""
    buffer = bytearray(_READ_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(files: Iterable[Path]) -> None:
    """Drop files from the page cache. They must be on the disk already, or the kernel keeps them."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
