"""Runs of tools as data: what was measured under which setting, as lines of JSON, and ratios within a round."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Usage
from benchmarks.shapes import DEFAULT_RANK

Value = Callable[[Usage], float]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all tools of a comparison have in common."""

    shape: str
    base_bytes: int
    rank: int = DEFAULT_RANK
    #: The output's; ``same`` is the base's own.
    dtype: str = "same"
    #: shardmerge's; the others have no such choice.
    compute_dtype: str = "float32"
    device: str = "cpu"
    #: ``warm``: inputs read before a run; ``cold``: dropped from the page cache; ``drop``: the whole cache dropped.
    cache: str = "warm"
    #: Of the memory cgroup that each tool runs in; None without one.
    memory_limit: int | None = None
    #: ``disk`` or ``memory``: the file system that inputs and outputs are on.
    storage: str = "disk"
    #: Cores that the tools may use; 0 where that is not known.
    cores: int = 0

    def title(self) -> str:
        """All that is not as it is by default."""
        parts = [self.shape, f"{human(self.base_bytes)}", f"rank {self.rank}", self.cache]
        if self.dtype != "same":
            parts.append(f"output {self.dtype}")
        if self.compute_dtype != "float32":
            parts.append(f"computed in {self.compute_dtype}")
        if self.device != "cpu":
            parts.append(self.device)
        if self.storage != "disk":
            parts.append(f"in {self.storage}")
        if self.memory_limit:
            parts.append(f"within {human(self.memory_limit)} of memory")
        return ", ".join(parts)


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


@dataclass(slots=True)
class Group:
    """Runs that may be compared: one setting, made in turns."""

    setting: Setting
    runs: list[Run] = dataclasses.field(default_factory=list)

    def tools(self) -> list[str]:
        """In the order of their first runs."""
        return list(dict.fromkeys(run.tool for run in self.runs))

    def good(self, tool: str) -> list[Usage]:
        """What the runs of a tool took that did not fail."""
        return [run.usage for run in self.runs if run.tool == tool and not run.failed]

    def line(self, run: Run) -> dict[str, object]:
        return {"event": "run", **dataclasses.asdict(self.setting), **run.to_json()}


def read_groups(path: Path) -> list[Group]:
    """The groups of the last session in a file of JSON lines; a session begins with the event ``begin``.

    ``ValueError`` where there is none.
    """
    events = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    begins = [number for number, event in enumerate(events) if event.get("event") == "begin"]
    if not begins:
        raise ValueError(f"{path}: no line says that a session begins; this is not a file of benchmarks.merge")
    groups: dict[Setting, Group] = {}
    for event in events[begins[-1] :]:
        if event.get("event") == "run":
            setting = Setting(**_fields(Setting, event))
            run = Run(event["tool"], event["run"], Usage(**_fields(Usage, event)))
            groups.setdefault(setting, Group(setting)).runs.append(run)
    return list(groups.values())


def _fields(kind: Any, event: dict[str, Any]) -> dict[str, Any]:
    return {field.name: event[field.name] for field in dataclasses.fields(kind) if field.name in event}


def seconds(usage: Usage) -> float:
    return usage.seconds


def cpu_seconds(usage: Usage) -> float:
    return usage.cpu_seconds


def ratio(group: Group, tool: str, yardstick: Sequence[str], value: Value, combine: Any = sum) -> float | None:
    """The median over the rounds of a tool's value by the yardstick's in the same round.

    Where the yardstick has several tools, their values are combined, by default added up. None if there is no round in
    which all of them succeeded.
    """
    values = {(run.tool, run.number): value(run.usage) for run in group.runs if not run.failed}
    found = [
        mine / combine([values[name, number] for name in yardstick])
        for (name, number), mine in values.items()
        if name == tool and all((other, number) in values for other in yardstick)
    ]
    return statistics.median(found) if found else None


def median(usages: Iterable[Usage], value: Value) -> float:
    return statistics.median(map(value, usages))


def human(count: float) -> str:
    """Bytes in powers of 1000."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
