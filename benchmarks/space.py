"""What a comparison needs of disk and memory, known before anything is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from benchmarks.making import is_made, place
from benchmarks.runs import human
from benchmarks.shapes import MoeShape, Shape
from benchmarks.tools import MERGES, WHOLE

#: Headers, configs, logs, and the file system's own.
_MARGIN = 0.02
#: Who builds the model holds it whole, and an interpreter and a shard beside it.
_OF_MODEL = 1.1
#: Experts stored one by one are put together while the model loads, so there is more than twice of them (measured).
_OF_MODEL_WITH_EXPERTS = 2.5


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of disk, in all and beyond what is there already."""

    total: int
    more: int

    def text(self, free: int) -> str:
        there = f", {human(self.total - self.more)} of it there already" if self.more < self.total else ""
        return f"needs {human(self.total)} of disk{there}; {human(free)} are free"


def disk(shape: Shape, work: Path, dtype: str, tools: Collection[str], check: bool) -> Need:
    """Inputs, and the most outputs that are there at a time."""
    base, adapter = shape.base_bytes(), shape.adapter_bytes()
    output = base * 2 if dtype == "float32" else base
    kept = len(set(tools) & set(MERGES)) if check else 0  # until they have been compared
    outputs = output * (kept + (kept < len(set(tools))))
    if "mergekit" in tools:
        outputs += output  # it merges the adapter into a copy first
    there = base if is_made(shape, work) else 0
    there += adapter if there and place(shape, work).adapter.exists() else 0
    total = base + adapter + outputs
    return Need(int(total * (1 + _MARGIN)), int((total - there) * (1 + _MARGIN)))


def free_disk(work: Path) -> int:
    """Of the file system that holds ``work``, which need not be there yet."""
    folder = next(folder for folder in (work, *work.parents) if folder.exists())
    return shutil.disk_usage(folder).free


def memory() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def lacks_memory(tool: str, shape: Shape, dtype: str) -> bool:
    """Whether a tool holds a model that this machine cannot hold: to try would be to have it, or others, killed."""
    model = shape.base_bytes() * (2 if dtype == "float32" else 1)
    times = _OF_MODEL_WITH_EXPERTS if isinstance(shape, MoeShape) else _OF_MODEL
    return tool in WHOLE and model * times > memory()
