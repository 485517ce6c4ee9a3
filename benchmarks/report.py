"""Runs → Markdown: the facts, and a table of medians and of ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.measure import Usage
from benchmarks.runs import Group, cpu_seconds, median, ratio, seconds
from benchmarks.tools import ONE_CORE

MIB = 1 << 20
GB = 1e9
NONE = "–"

HEAD = (
    *("tool", "runs", "wall s", "÷ copy", "÷ (copy + import torch)", "÷ PEFT"),
    *("GB/s per core", "CPU s", "CPU s/GB", "peak MiB", "read MB", "written MB"),
)
_KILLED = (-9, 137)


def facts(description: Mapping[str, str]) -> str:
    """The machine and the rest, as a Markdown list."""
    return "\n".join(f"- {name}: {value}" for name, value in description.items())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_and_range(values: Sequence[float]) -> str:
    """``"9.31 (9.02–9.80)"``: the median, the least and the most; a single value stands alone."""
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else middle


def peak_mib(usages: Sequence[Usage], floor: int) -> str:
    """The largest peak. Where it is the measuring process's own, ``floor``, the truth may be less."""
    peak = max(usage.peak_bytes for usage in usages)
    return f"{'≤ ' if peak <= floor else ''}{peak / MIB:.0f}"


def table(group: Group, floor: int) -> str:
    """A row a tool, in the order of their first runs."""
    return markdown(HEAD, [_row(tool, group, floor) for tool in group.tools()])


def _row(tool: str, group: Group, floor: int) -> list[str]:
    count = sum(run.tool == tool for run in group.runs)
    good = group.good(tool)
    if not good:
        return [tool, f"all {count} {_failed(tool, group)}", *[NONE] * (len(HEAD) - 2)]
    return [
        tool,
        str(count) if len(good) == count else f"{len(good)}, and {count - len(good)} {_failed(tool, group)}",
        median_and_range([usage.seconds for usage in good]),
        _number(ratio(group, tool, ["copy"], seconds)),
        _number(ratio(group, tool, ["copy", "import-torch"], seconds)),
        _number(ratio(group, tool, ["peft"], seconds)),
        _per_core(group, tool),
        f"{median(good, cpu_seconds):.2f}",
        f"{median(good, cpu_seconds) / (group.setting.base_bytes / GB):.2f}",
        peak_mib(good, floor),
        _megabytes(good, lambda usage: usage.read_bytes),
        _megabytes(good, lambda usage: usage.written_bytes),
    ]


def _per_core(group: Group, tool: str) -> str:
    """Bytes of the base by the time and by the cores that the tool may use."""
    cores = 1 if tool == ONE_CORE else group.setting.cores
    if not cores:
        return NONE
    return f"{group.setting.base_bytes / GB / median(group.good(tool), seconds) / cores:.2f}"


def _failed(tool: str, group: Group) -> str:
    """The kernel ends what does not fit its memory cgroup."""
    codes = [run.usage.exit_code for run in group.runs if run.tool == tool and run.failed]
    killed = group.setting.memory_limit is not None and all(code in _KILLED for code in codes)
    return "killed at the limit" if killed else "failed"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _megabytes(usages: Sequence[Usage], field: Callable[[Usage], int | None]) -> str:
    values = [value for usage in usages if (value := field(usage)) is not None]
    return f"{statistics.median(values) / 1e6:.0f}" if values else NONE
