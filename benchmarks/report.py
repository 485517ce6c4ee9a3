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
        usage = dataclasses.asdict(self.usage)
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in usage.items()}
        return {"tool": self.tool, "run": self.number, "failed": self.failed, **rounded}


def human(count: float) -> str:
    """Bytes in powers of 1000."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def facts(description: Mapping[str, str]) -> str:
    """The machine and the rest, as a Markdown list."""
    return "\n".join(f"- {name}: {value}" for name, value in description.items())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def median_and_range(seconds: Sequence[float]) -> str:
    """``"9.31 (9.02–9.80)"``: the median, the least and the most; a single value stands alone."""
    middle = f"{statistics.median(seconds):.2f}"
    return f"{middle} ({min(seconds):.2f}–{max(seconds):.2f})" if len(seconds) > 1 else middle


def peak_mib(usages: Sequence[Usage], floor: int) -> str:
    """The largest peak. Where it is the measuring process's own, ``floor``, the truth may be less."""
    peak = max(usage.peak_bytes for usage in usages)
    return f"{'≤ ' if peak <= floor else ''}{peak / MIB:.0f}"


def table(runs: Sequence[Run], floor: int) -> str:
    """Medians, a row a tool, in the order of their first runs."""
    tools = list(dict.fromkeys(run.tool for run in runs))
    yardstick = "copy" if "copy" in tools else tools[0]
    head = ["tool", "runs", "wall s", f"wall ÷ {yardstick}", "CPU s", "peak MiB", "read MB", "written MB"]
    return markdown(head, [_row(tool, yardstick, runs, floor) for tool in tools])


def _row(tool: str, yardstick: str, runs: Sequence[Run], floor: int) -> list[str]:
    mine = [run for run in runs if run.tool == tool]
    good = [run.usage for run in mine if not run.failed]
    if not good:
        return [tool, f"all {len(mine)} failed", *["–"] * 6]
    return [
        tool,
        str(len(mine)) if len(good) == len(mine) else f"{len(good)}, and {len(mine) - len(good)} failed",
        median_and_range([usage.seconds for usage in good]),
        _ratio(tool, yardstick, runs),
        f"{statistics.median(usage.cpu_seconds for usage in good):.2f}",
        peak_mib(good, floor),
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
