"""What a measurement was made on: the machine, the versions, the command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import ROOT

PACKAGES = ("torch", "safetensors", "transformers", "peft")


def describe(work: Path) -> dict[str, str]:
    """Everything that the figures depend on, as text."""
    return {
        "cpu": f"{_field('/proc/cpuinfo', 'model name')}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "filesystem": filesystem(work),
        "load": f"{os.getloadavg()[0]:.2f} when it began; niceness {os.getpriority(os.PRIO_PROCESS, 0)}",
        "versions": ", ".join([f"Python {platform.python_version()}", _shardmerge(), *map(_version, PACKAGES)]),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def mergekit_version(python: str) -> str:
    """Versions of mergekit and its torch, asked of the interpreter that runs it."""
    code = 'from importlib.metadata import version as v; print(f\'mergekit {v("mergekit")} (torch {v("torch")})\')'
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "mergekit: not installed there"


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def filesystem(work: Path) -> str:
    """The type of the file system that holds ``work``: of the mount points above it, the nearest."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4]
        if work.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def _shardmerge() -> str:
    commit = _git("rev-parse", "--short", "HEAD") or "unknown commit"
    changed = " with changes" if _git("status", "--porcelain", "--", "shardmerge") else ""
    return f"shardmerge {commit}{changed}"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
