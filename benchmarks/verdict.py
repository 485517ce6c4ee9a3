"""What shardmerge promises of time and memory, each held against the runs of one session.

A promise is only judged where this session has measured what it speaks of. Ratios are medians over rounds, peaks the
worst run's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.report import GB, MIB
from benchmarks.runs import Group, cpu_seconds, median, ratio, seconds
from benchmarks.shapes import SHAPES
from benchmarks.tools import ONE_CORE

OURS = "shardmerge"
LARGE = "llama3-8b"  # 16 GB
SMALL = "tinyllama"  # 2.2 GB
PEERS = ("peft", "mergekit")

OF_COPY = 0.9
OF_COPY_AND_START = 1.0
FASTER = 5.0
OF_DISK = 1.15
CPU_SHARE = 1 / 5
ABOVE_TORCH = 128 * MIB
IN_MEMORY_OF_COPY = 1.3
OF_TWO_CORES = 1.7
SPREAD = 16 * MIB
RANKS = (8, 256)


@dataclass(frozen=True, slots=True)
class Claim:
    """A promise. ``holds`` is None where this session cannot tell."""

    text: str
    holds: bool | None
    figures: str
    #: Whether a miss is an error whatever else the machine does: memory does not depend on its load, time does.
    is_bound: bool = False

    def line(self) -> str:
        word = {True: "holds", False: "does not hold", None: "not measured"}[self.holds]
        return f"- **{word}**: {self.text} ({self.figures})"


def claims(groups: Sequence[Group]) -> list[Claim]:
    """Every promise, once for each group that it speaks of."""
    large = [group for group in groups if not SHAPES[group.setting.shape].is_small]
    in_memory = [group for group in large if group.setting.storage == "memory"]
    real = [group for group in large if group.setting.storage == "disk"]
    return [
        *_ratios(
            f"16 GB: time ≤ {OF_COPY:.2f} × durable copy",
            [group for group in real if group.setting.shape == LARGE],
            lambda group: _by_time(group, ["copy"]),
            OF_COPY,
        ),
        *_ratios(
            f"2.2 GB: time ≤ {OF_COPY_AND_START:.2f} × (durable copy + import torch)",
            [group for group in real if group.setting.shape == SMALL],
            lambda group: _by_time(group, ["copy", "import-torch"]),
            OF_COPY_AND_START,
        ),
        *(claim for peer in PEERS for claim in _faster(real, peer)),
        *_ratios(
            f"16 GB, cold: time ≤ {OF_DISK:.2f} × the slower of direct read and direct write",
            [group for group in real if group.setting.shape == LARGE and group.setting.cache != "warm"],
            lambda group: ratio(group, OURS, ["direct-read", "direct-write"], seconds, max),
            OF_DISK,
        ),
        *_ratios(
            f"16 GB, cold: time ≤ {OF_DISK:.2f} × a bare direct copy, from and to huge pages",
            [group for group in real if group.setting.shape == LARGE and group.setting.cache != "warm"],
            lambda group: ratio(group, OURS, ["direct-copy-huge"], seconds),
            OF_DISK,
        ),
        *_above_torch(groups),
        _over_shapes(real),
        _over_ranks(real),
        *_cpu(real),
        *_ratios(
            f"in memory: time ≤ {IN_MEMORY_OF_COPY:.1f} × durable copy + import torch",
            in_memory,
            lambda group: ratio(group, OURS, ["copy", "import-torch"], seconds, _with_margin),
            1.0,
        ),
        *_cores(in_memory),
    ]


def _by_time(group: Group, yardstick: Sequence[str]) -> float | None:
    return ratio(group, OURS, yardstick, seconds)


def _ratios(
    text: str, groups: Sequence[Group], measured: Callable[[Group], float | None], bound: float
) -> Iterator[Claim]:
    """A claim for each group that has the ratio."""
    found = [(group, value) for group in groups if (value := measured(group)) is not None]
    for group, value in found:
        yield Claim(text, value <= bound, f"{value:.2f} × on {group.setting.title()}")
    if not found:
        yield Claim(text, None, "this session has no such runs")


def _with_margin(times: Sequence[float]) -> float:
    copy, start = times
    return IN_MEMORY_OF_COPY * copy + start


def _cores(groups: Sequence[Group]) -> Iterator[Claim]:
    text = f"in memory: at least {OF_TWO_CORES:.1f} × faster with all cores than with one"
    found = [(group, value) for group in groups if (value := ratio(group, ONE_CORE, [OURS], seconds)) is not None]
    for group, value in found:
        if group.setting.cores > 1:
            figures = f"{value:.2f} × with {group.setting.cores} on {group.setting.title()}"
            yield Claim(text, value >= OF_TWO_CORES, figures)
    if not any(group.setting.cores > 1 for group, _ in found):
        yield Claim(text, None, "that takes runs in memory, on two cores or more")


def _faster(groups: Sequence[Group], peer: str) -> Iterator[Claim]:
    text = f"at least {FASTER:.0f} × faster than {peer}"
    found = [(group, value) for group in groups if (value := ratio(group, peer, [OURS], seconds)) is not None]
    for group, value in found:
        yield Claim(text, value >= FASTER, f"{value:.2f} × on {group.setting.title()}")
    if not found:
        yield Claim(text, None, f"this session has no runs of {peer} that succeeded on a real shape")


def _cpu(groups: Sequence[Group]) -> Iterator[Claim]:
    text = "CPU time per GB ≤ 1/5 of PEFT's"
    found = [(group, value) for group in groups if (value := ratio(group, OURS, ["peft"], cpu_seconds)) is not None]
    for group, value in found:
        size = group.setting.base_bytes / GB
        ours, theirs = (median(group.good(tool), cpu_seconds) / size for tool in (OURS, "peft"))
        figures = f"{ours:.2f} and {theirs:.2f} s/GB, {value:.3f} × on {group.setting.title()}"
        yield Claim(text, value <= CPU_SHARE, figures)
    if not found:
        yield Claim(text, None, "this session has no runs of peft that succeeded on a real shape")


# --- memory -----------------------------------------------------------------------------------------------------------


def _peak(group: Group) -> int | None:
    """The worst run's, of shardmerge."""
    return max((usage.peak_bytes for usage in group.good(OURS)), default=None)


def _above_torch(groups: Sequence[Group]) -> Iterator[Claim]:
    text = f"peak ≤ import torch + {ABOVE_TORCH / MIB:.0f} MiB"
    found = False
    for group in groups:
        most, torch = _peak(group), min((usage.peak_bytes for usage in group.good("import-torch")), default=None)
        if most is not None and torch is not None:
            found = True
            figures = f"{most / MIB:.1f} − {torch / MIB:.1f} = {(most - torch) / MIB:.1f} MiB"
            yield Claim(text, most - torch <= ABOVE_TORCH, f"{figures} on {group.setting.title()}", is_bound=True)
    if not found:
        yield Claim(text, None, "that takes runs of both shardmerge and import-torch")


def _over_shapes(groups: Sequence[Group]) -> Claim:
    text = f"peaks of all shapes within {SPREAD / MIB:.0f} MiB of each other"
    # The rank that most shapes were measured with.
    ranks = [group.setting.rank for group in groups]
    usual = max(ranks, key=ranks.count, default=0)
    peaks = {
        group.setting.shape: peak
        for group in groups
        if group.setting.rank == usual and (peak := _peak(group)) is not None
    }
    if len(peaks) < 2:
        return Claim(text, None, "that takes two real shapes with the same rank")
    return _within(text, {f"{shape}": peak for shape, peak in peaks.items()})


def _over_ranks(groups: Sequence[Group]) -> Claim:
    text = f"peaks over ranks {RANKS[0]} to {RANKS[1]} within {SPREAD / MIB:.0f} MiB of each other"
    for shape in dict.fromkeys(group.setting.shape for group in groups):
        peaks = {
            group.setting.rank: peak
            for group in groups
            if group.setting.shape == shape and (peak := _peak(group)) is not None
        }
        if peaks and min(peaks) <= RANKS[0] and max(peaks) >= RANKS[1]:
            return _within(text, {f"rank {rank}": peak for rank, peak in sorted(peaks.items())}, f" on {shape}")
    return Claim(text, None, "no real shape was measured over these ranks; --sweep does it")


def _within(text: str, peaks: dict[str, int], where: str = "") -> Claim:
    spread = max(peaks.values()) - min(peaks.values())
    listed = ", ".join(f"{name} {peak / MIB:.1f}" for name, peak in peaks.items())
    return Claim(text, spread <= SPREAD, f"{spread / MIB:.1f} MiB apart: {listed}{where}", is_bound=True)
