"""Draw what a session has measured: peak memory and time against the size of the model, a line a tool.

    python -m benchmarks.plot output/bench/results.jsonl --out docs/images

Writes ``memory`` and ``time``, each as PNG and SVG. The background is transparent, and all colours can be told on a
white and on a dark page. The only module that needs matplotlib.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.report import GB, MIB
from benchmarks.runs import Group, Setting, Value, median, read_groups, seconds

INK = "#737b84"
LINES = {
    "shardmerge": ("#d0611f", "o"),
    "peft": ("#3b82c4", "s"),
    "mergekit": ("#a060b8", "D"),
    "copy": ("#3f9250", "^"),
    "import-torch": (INK, "v"),
}
NAMES = {"peft": "PEFT", "copy": "durable copy", "import-torch": "import torch"}
_STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # The same figures give the same files, and text stays text.
    "svg.hashsalt": "shardmerge",
    "svg.fonttype": "none",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One tool: sizes in GB, medians, and the least and the most."""

    tool: str
    sizes: tuple[float, ...]
    middle: tuple[float, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]


def lines(groups: Sequence[Group], tools: Sequence[str], value: Value) -> list[Line]:
    """A line for each tool that has runs."""
    found = []
    for tool in tools:
        points = []
        for group in sorted(groups, key=lambda group: group.setting.base_bytes):
            if good := group.good(tool):
                values = [value(usage) for usage in good]
                points.append((group.setting.base_bytes / GB, median(good, value), min(values), max(values)))
        if points:
            found.append(Line(tool, *map(tuple, zip(*points, strict=True))))
    return found


def comparable(groups: Sequence[Group]) -> list[Group]:
    """One group a shape, of the first one's rank: those of a sweep over ranks have other tools."""
    if not groups:
        return []
    first: dict[str, Group] = {}
    for group in groups:
        if group.setting.rank == groups[0].setting.rank:
            first.setdefault(group.setting.shape, group)
    return list(first.values())


def draw(found: Sequence[Line], sizes: Mapping[float, str], title: str, unit: str) -> dict[str, bytes]:
    """The chart as files, by suffix. ``sizes`` are what stands below the axis, by size in GB."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        for line in found:
            colour, marker = LINES[line.tool]
            below = [middle - least for middle, least in zip(line.middle, line.least, strict=True)]
            above = [most - middle for middle, most in zip(line.middle, line.most, strict=True)]
            axes.errorbar(
                line.sizes,
                line.middle,
                yerr=[below, above],
                color=colour,
                marker=marker,
                linewidth=2.5 if line.tool == "shardmerge" else 1.5,
                markersize=5,
                capsize=2,
                elinewidth=1,
                label=NAMES.get(line.tool, line.tool),
            )
        _set_axes(axes, sizes, unit)
        axes.set_title(title, loc="left", pad=28)
        legend: dict[str, Any] = {"ncols": len(found), "fontsize": 9, "columnspacing": 1.3, "handletextpad": 0.5}
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), **legend)
        files = {}
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=130, transparent=True, metadata=metadata)
            files[suffix] = buffer.getvalue()
        pyplot.close(figure)
    return files


def _set_axes(axes: Axes, sizes: Mapping[float, str], unit: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    # The sizes that there are say more than powers of ten.
    axes.set_xticks(list(sizes), list(sizes.values()), fontsize=9)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.tick_params(axis="y", which="minor", left=False)
    axes.set_xlabel("size of the model")
    axes.set_ylabel(unit)
    axes.grid(True, which="major", axis="y", color=INK, alpha=0.25, linewidth=0.6)


def _label(setting: Setting) -> str:
    return f"{setting.base_bytes / GB:.2g} GB, {setting.cache}\n{setting.shape}"


def charts(groups: Sequence[Group]) -> dict[str, bytes]:
    """Every file, by name. ``ValueError`` where there is nothing to draw."""
    chosen = comparable(groups)
    # A copy's memory is less than what can be told apart from the measuring process's own.
    memory = lines(chosen, [tool for tool in LINES if tool != "copy"], lambda usage: usage.peak_bytes / MIB)
    time = lines(chosen, list(LINES), seconds)
    if not memory or not time:
        raise ValueError("no run of a tool succeeded; there is nothing to draw")
    sizes = {group.setting.base_bytes / GB: _label(group.setting) for group in chosen}
    files: dict[str, bytes] = {}
    for name, found, title, unit in (
        ("memory", memory, "Peak memory", "MiB resident"),
        ("time", time, "Time, until it is on the disk", "seconds"),
    ):
        files |= {f"{name}.{suffix}": data for suffix, data in draw(found, sizes, title, unit).items()}
    return files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw a session's runs.")
    parser.add_argument("results", type=Path, help="JSON lines of benchmarks.merge; its last session is drawn")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    options = parser.parse_args(arguments)
    try:
        files = charts(read_groups(options.results))
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.plot: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (options.out / name).write_bytes(data)
        print(f"{options.out / name}: {len(data) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
