"""Merge one shape with several tools in turn, and say what each took.

    python -m benchmarks.merge --shape tinyllama --tools shardmerge,copy,import-torch,peft --runs 3

Prints a JSON line a run, then a Markdown table of medians. Exit code 1 if a tool failed, if shardmerge needed more
memory than it may, or if a check found a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import machine, report
from benchmarks.measure import ROOT, cool, measure, own_peak, warm
from benchmarks.report import Run
from benchmarks.shapes import SHAPES, Made, add_work_option, place
from benchmarks.tools import MERGES, ORACLE, Command, Task, all_tools

LOG_LINES = 15


class Bench:
    """Runs tools on one shape. Outputs are removed after a run, except those that a check still needs."""

    def __init__(self, made: Made, folder: Path, cold: bool) -> None:
        self.made = made
        self.folder = folder
        self.cold = cold
        self.runs: list[Run] = []

    def task(self, tool: str) -> Task:
        return Task(self.made, self.folder / tool / "output", self.folder / tool / "scratch")

    def run(self, tool: str, command: Command, number: int, keep: bool) -> None:
        self.remove(tool)
        task = self.task(tool)
        task.scratch.mkdir(parents=True)
        log = self.folder / f"{tool}.log"
        (cool if self.cold else warm)(self.made.files())
        os.sync()  # whatever is still to be written is not this run's
        run = Run(tool, number, measure(command(task), log))
        self.runs.append(run)
        print(json.dumps(run.to_json()), flush=True)
        if run.failed:
            print(f"{tool} failed; the end of {log}:\n{_tail(log)}", file=sys.stderr)
        shutil.rmtree(task.scratch)
        if not keep or run.failed:
            self.remove(tool)

    def remove(self, tool: str) -> None:
        shutil.rmtree(self.folder / tool, ignore_errors=True)

    def check(self) -> Iterator[tuple[str, bool]]:
        """A line for every merge that was kept, and whether it equals the oracle's."""
        merges = [tool for tool in MERGES if self.task(tool).output.exists()]
        if ORACLE not in merges or len(merges) == 1:
            yield f"check: nothing to compare; {ORACLE} and another merge must have succeeded", False
            return
        expected = str(self.task(ORACLE).output)
        for tool in merges:
            if tool != ORACLE:
                command = [sys.executable, "-m", "benchmarks.check", expected, str(self.task(tool).output)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                last = (done.stdout or done.stderr).strip().rpartition("\n")[2]
                yield f"check: {tool} against {ORACLE}: {last}", done.returncode == 0 or tool != "shardmerge"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description="Compare tools that merge.")
    parser.add_argument(
        "--shape", choices=[name for name in SHAPES if not name.startswith("index-")], default="tinyllama"
    )
    parser.add_argument("--tools", default="shardmerge,copy,import-torch", help="in the order in which they take turns")
    parser.add_argument("--runs", type=int, default=3, help="rounds; in each every tool runs once")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before every run")
    parser.add_argument("--check", action="store_true", help=f"compare the last outputs with {ORACLE}'s, bit for bit")
    parser.add_argument("--mergekit-python", metavar="PATH", help="an interpreter that has mergekit")
    add_work_option(parser)
    options = parser.parse_args(arguments)
    options.tools = options.tools.split(",")
    if unknown := set(options.tools) - all_tools(options.mergekit_python).keys():
        hint = "; mergekit needs --mergekit-python" if "mergekit" in unknown else ""
        parser.error(f"no such tool: {', '.join(sorted(unknown))}{hint}")
    return options


def main() -> None:
    options = parse()
    shape = SHAPES[options.shape]
    # In another process, so that this one stays small.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.shapes", shape.name, "--work", options.work.resolve()],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    made = place(shape, options.work.resolve())
    description = {
        "shape": f"{shape.name}, base of {report.human(made.base_bytes())}",
        **machine.describe(options.work),
    }
    description["inputs"] = "dropped from the page cache before every run" if options.cold else "read before every run"
    if options.mergekit_python:
        description["mergekit"] = machine.mergekit_version(options.mergekit_python)
    print(json.dumps(description), flush=True)
    bench = Bench(made, options.work.resolve() / "runs", options.cold)
    try:
        good = compare(bench, options, description)
    finally:
        for tool in options.tools:
            bench.remove(tool)
    sys.exit(0 if good else 1)


def compare(bench: Bench, options: argparse.Namespace, description: dict[str, str]) -> bool:
    """Run every tool in every round and print the report; whether all is as promised."""
    tools = all_tools(options.mergekit_python)
    for number in range(1, options.runs + 1):
        for tool in options.tools:
            keep = options.check and number == options.runs and tool in MERGES
            bench.run(tool, tools[tool], number, keep)
    checks = list(bench.check()) if options.check else []
    kept, verdict = report.memory_verdict(bench.runs)
    description["load"] += f", {os.getloadavg()[0]:.2f} when it ended"
    print(f"\n{report.facts(description)}\n\n{report.table(bench.runs, own_peak())}\n\n{verdict}")
    for line, _ in checks:
        print(line)
    return kept and all(good for _, good in checks) and not any(run.failed for run in bench.runs)


if __name__ == "__main__":
    main()
