"""Runs → a table of medians, and the verdict on memory."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Usage

MIB = 1 << 20
#: What `shardmerge run` may take above ``import torch``.
MEMORY_BOUND = 128 * MIB


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one tool. Runs with the same number were made one after the other."""

    tool: str
    number: int
    usage: Usage

    @property
    def failed(self) -> bool:
        return self.usage.exit_code != 0

    def to_json(self) -> dict[str, object]:
        return {"tool": self.tool, "run": self.number, "failed": self.failed, **dataclasses.asdict(self.usage)}


def facts(description: Mapping[str, str]) -> str:
    """The machine and the rest, as a Markdown list."""
    return "\n".join(f"- {name}: {value}" for name, value in description.items())


def table(runs: Sequence[Run], floor: int) -> str:
    """A Markdown table, a row a tool in the order of their first runs. Peaks at ``floor`` bytes are no more than it."""
    tools = list(dict.fromkeys(run.tool for run in runs))
    yardstick = "copy" if "copy" in tools else tools[0]
    head = ["tool", "runs", "wall s", f"× {yardstick}", "CPU s", "peak MiB", "read MB", "written MB"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *(_row(tool, yardstick, runs, floor) for tool in tools)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(tool: str, yardstick: str, runs: Sequence[Run], floor: int) -> list[str]:
    mine = [run for run in runs if run.tool == tool]
    good = [run.usage for run in mine if not run.failed]
    if not good:
        return [tool, f"all {len(mine)} failed", *["–"] * 6]
    peak = max(usage.peak_bytes for usage in good)
    return [
        tool,
        str(len(mine)) if len(good) == len(mine) else f"{len(good)}, and {len(mine) - len(good)} failed",
        f"{statistics.median(usage.seconds for usage in good):.2f}",
        _ratio(tool, yardstick, runs),
        f"{statistics.median(usage.cpu_seconds for usage in good):.2f}",
        f"{'≤ ' if peak <= floor else ''}{peak / MIB:.0f}",
        _megabytes(good, lambda usage: usage.read_bytes),
        _megabytes(good, lambda usage: usage.written_bytes),
    ]


def _ratio(tool: str, yardstick: str, runs: Sequence[Run]) -> str:
    """The median over the rounds of a tool's time by the yardstick's in the same round."""
    seconds = {(run.tool, run.number): run.usage.seconds for run in runs if not run.failed}
    ratios = [
        value / seconds[yardstick, number]
        for (name, number), value in seconds.items()
        if name == tool and (yardstick, number) in seconds
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def _megabytes(usages: Sequence[Usage], field: Callable[[Usage], int | None]) -> str:
    values = [value for usage in usages if (value := field(usage)) is not None]
    return f"{statistics.median(values) / 1e6:.0f}" if values else "–"


def memory_verdict(runs: Sequence[Run]) -> tuple[bool, str]:
    """Whether shardmerge keeps its bound, the worst run against the best: its largest peak, torch's smallest."""
    peaks = {
        tool: [run.usage.peak_bytes for run in runs if run.tool == tool and not run.failed]
        for tool in ("shardmerge", "import-torch")
    }
    if not all(peaks.values()):
        return True, "memory: no verdict, since that takes runs of both shardmerge and import-torch"
    most, least = max(peaks["shardmerge"]), min(peaks["import-torch"])
    kept = most - least <= MEMORY_BOUND
    return kept, (
        f"memory: {'kept' if kept else 'MISSED'}: shardmerge {most / MIB:.1f} MiB − import torch {least / MIB:.1f} MiB "
        f"= {(most - least) / MIB:.1f} MiB, of {MEMORY_BOUND / MIB:.0f} MiB allowed"
    )
