"""Made-up runs for the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.measure import Usage
from benchmarks.runs import Group, Run, Setting
from benchmarks.shapes import SHAPES

MIB = 1 << 20


def usage(seconds: float, peak: int = 0, cpu: float | None = None, exit_code: int = 0) -> Usage:
    """``peak`` in MiB; all CPU time is the user's, as much as the wall's unless told."""
    return Usage(
        exit_code=exit_code,
        seconds=seconds,
        user_seconds=seconds if cpu is None else cpu,
        system_seconds=0.0,
        peak_bytes=peak * MIB,
        read_bytes=2_000_000,
        written_bytes=None,
    )


def group(shape: str, tools: Mapping[str, Sequence[Usage]], **setting: object) -> Group:
    """Each tool's runs, in rounds."""
    made = Group(Setting(shape, SHAPES[shape].base_bytes(), **setting))  # type: ignore[arg-type]
    for tool, usages in tools.items():
        made.runs += [Run(tool, number, one) for number, one in enumerate(usages, 1)]
    return made
