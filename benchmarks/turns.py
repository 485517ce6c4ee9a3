"""Tools in turns on one setting: each run a process, its output removed after it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.cgroup import limited
from benchmarks.making import Made
from benchmarks.measure import ROOT, cool, measure, warm
from benchmarks.runs import Group, Run, Setting
from benchmarks.tools import MERGES, ORACLE, Command, Task

LOG_LINES = 15
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class Turns:
    """One comparison. Outputs that a check still needs are kept until `remove_all`."""

    def __init__(self, made: Made, setting: Setting, folder: Path, tools: Mapping[str, Command]) -> None:
        self.made = made
        self.folder = folder
        self.tools = tools
        self.group = Group(setting)

    def run(self, rounds: int, keep_last: bool, done: Callable[[Run], None]) -> None:
        """Run every tool once in each round (A B A B …); ``done`` is told of every run."""
        for number in range(1, rounds + 1):
            for tool in self.tools:
                self._turn(tool, number, keep_last and number == rounds and tool in MERGES)
                done(self.group.runs[-1])

    def _task(self, tool: str) -> Task:
        return Task(self.made, self.group.setting, self.folder / tool / "output", self.folder / tool / "scratch")

    def _turn(self, tool: str, number: int, keep: bool) -> None:
        self._remove(tool)
        task = self._task(tool)
        task.scratch.mkdir(parents=True)
        log = self.folder / f"{tool}.log"
        command = self.tools[tool](task)
        self._prepare_cache()
        with limited(self.group.setting.memory_limit) as wrap:
            run = Run(tool, number, measure(wrap(command), log))
        self.group.runs.append(run)
        if run.failed:
            print(f"{tool} failed with {run.usage.exit_code}; the end of {log}:\n{_tail(log)}", file=sys.stderr)
        shutil.rmtree(task.scratch)
        if not keep or run.failed:
            self._remove(tool)

    def _prepare_cache(self) -> None:
        os.sync()  # what is still to be written is not the next run's, and cannot be dropped
        if self.group.setting.cache == "warm":
            warm(self.made.files())
            return
        cool(self.made.files())
        if self.group.setting.cache == "drop":
            DROP_CACHES.write_text("3")

    def _remove(self, tool: str) -> None:
        shutil.rmtree(self.folder / tool, ignore_errors=True)

    def remove_all(self) -> None:
        for tool in self.tools:
            self._remove(tool)

    def check(self, ignored: str | None) -> Iterator[tuple[str, bool]]:
        """A line for every merge that was kept, and whether it equals the oracle's.

        Tensors with ``ignored`` in their names may differ.
        """
        shape = self.group.setting.shape
        merges = [tool for tool in MERGES if tool in self.tools and self._task(tool).output.exists()]
        if ORACLE not in merges or len(merges) == 1:
            yield f"{shape}: nothing to compare; {ORACLE} and another merge must have succeeded", False
            return
        expected = str(self._task(ORACLE).output)
        options = ["--ignore", ignored] if ignored else []
        for tool in merges:
            if tool != ORACLE:
                found = str(self._task(tool).output)
                command = [sys.executable, "-m", "benchmarks.check", expected, found, *options]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                last = (done.stdout or done.stderr).strip().rpartition("\n")[2]
                yield f"{shape}: {tool} against {ORACLE}: {last}", done.returncode == 0 or tool != "shardmerge"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
