"""Run commands within a memory cgroup: what needs more than the limit is killed by the kernel.

The limit counts what is resident and the page cache that the command fills; swap is not given. A limit on addresses
(RLIMIT_AS) would be something else, as a mapped file counts there, so it does not stand in.

A scope of systemd where systemd runs; else a group is made by hand, below our own or beside it: version 2 where it has
the memory controller, else version 1.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Turns a command into one that runs within the limit.
Wrap = Callable[[list[str]], list[str]]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
#: The shell puts itself into the group and becomes the command, so nobody else is in it.
_ENTER = 'echo $$ > "$0" && exec "$@"'
_GONE_SECONDS = 10.0
_numbers = itertools.count(1)


class LimitError(Exception):
    """No memory cgroup can be made here; says why."""


def parse_size(text: str) -> int:
    """``"400MiB"`` or ``"1.5GB"`` → bytes; ``ValueError`` for anything else."""
    upper = text.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if upper.endswith(unit)), None)
    if unit is None:
        raise ValueError(f"{text!r} is not a size; write it like 400MiB or 1.5GB")
    size = int(float(upper.removesuffix(unit)) * _UNITS[unit])
    if size <= 0:
        raise ValueError(f"{text!r} is not a limit")
    return size


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy of cgroups that can limit memory, and the groups in which one may be made, best first."""

    version: int
    parents: tuple[Path, ...]


def hierarchies(own: str, mounts: str) -> list[Hierarchy]:
    """From the texts of ``/proc/self/cgroup`` and ``/proc/self/mountinfo``."""
    groups = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups[2] = path
        elif "memory" in controllers.split(","):
            groups[1] = path
    found = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        (root, point), (kind, _, options) = before.split()[3:5], after.split()[:3]
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        if version not in groups or (version == 1 and "memory" not in options.split(",")):
            continue
        group = groups[version]
        inside = os.path.relpath(group, root) if Path(group).is_relative_to(root) else group.lstrip("/")
        here = Path(os.path.normpath(os.path.join(point, inside)))
        parents = (here, here.parent) if here != Path(point) else (here,)
        found.append(Hierarchy(version, parents))
    return sorted(found, key=lambda hierarchy: -hierarchy.version)


def _make(limit: int) -> Path:
    """A new group with the limit, by hand. Raises `LimitError`."""
    problems = []
    for hierarchy in hierarchies(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()):
        for parent in hierarchy.parents:
            group = parent / f"shardmerge-bench-{os.getpid()}-{next(_numbers)}"
            try:
                if hierarchy.version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                    raise OSError("it does not give the memory controller to groups below it")
                group.mkdir()
            except OSError as error:
                problems.append(f"{parent}: {error.strerror or error}")
                continue
            try:
                _set_limit(group, hierarchy.version, limit)
            except OSError as error:
                group.rmdir()
                problems.append(f"{group}: {error.strerror or error}")
                continue
            return group
    why = "; ".join(problems) or "no cgroups with a memory controller are mounted"
    raise LimitError(f"no memory cgroup can be made, and without one a limit would be another thing: {why}")


def _set_limit(group: Path, version: int, limit: int) -> None:
    if version == 2:
        (group / "memory.max").write_text(str(limit))
        swap, no_swap = group / "memory.swap.max", 0
    else:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        swap, no_swap = group / "memory.memsw.limit_in_bytes", limit  # of memory and swap together
    if swap.exists():
        swap.write_text(str(no_swap))


def _remove(group: Path) -> None:
    """A group can go when the last process in it is gone, and a killed one takes a moment."""
    deadline = time.monotonic() + _GONE_SECONDS
    while True:
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _systemd(limit: int) -> list[str] | None:
    """What to put before a command, where systemd runs. Its scope becomes the command and is gone with it."""
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemd-run") is None:
        return None
    who = [] if os.geteuid() == 0 else ["--user"]
    properties = ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
    return ["systemd-run", *who, "--scope", "--quiet", "--collect", *properties, "--"]


@contextmanager
def limited(limit: int | None) -> Iterator[Wrap]:
    """What wraps a command so that it runs within ``limit`` bytes, alone; None is no limit. Raises `LimitError`."""
    if limit is None:
        yield lambda command: command
        return
    if (scope := _systemd(limit)) is not None:
        yield lambda command: [*scope, *command]
        return
    group = _make(limit)
    try:
        yield lambda command: ["sh", "-c", _ENTER, str(group / "cgroup.procs"), *command]
    finally:
        _remove(group)
