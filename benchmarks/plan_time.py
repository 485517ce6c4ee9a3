"""How long the commands that compute nothing take: ``--help``, and ``plan`` on a small index and on 1,000 shards.

python -m benchmarks.plan_time --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import machine, report
from benchmarks.making import Made, add_work_option, place
from benchmarks.measure import ROOT, cool, measure, own_peak, warm
from benchmarks.runs import Run
from benchmarks.shapes import SHAPES

PLANNED = ("tiny", "index-1000", "index-1000-wide")


def commands(made: dict[str, Made], folder: Path) -> dict[str, list[str]]:
    python = sys.executable
    found = {"python -c pass": [python, "-c", "pass"], "shardmerge --help": [python, "-m", "shardmerge", "--help"]}
    for shape, there in made.items():
        config = folder / f"plan-{shape}.yaml"
        output = str(folder / "never-written")
        value = {"base": str(there.base), "adapters": [str(there.adapter)], "output": {"path": output}}
        config.write_text(json.dumps(value))  # JSON is YAML
        found[f"shardmerge plan, {shape}"] = [python, "-m", "shardmerge", "plan", str(config)]
    return {**found, "python -c 'import torch'": [python, "-c", "import torch"]}


def size(name: str) -> str:
    shape = SHAPES[name]
    targets = shape.layers * len(shape.linears())
    return f"{shape.shards} shards, {sum(1 for _ in shape.base_tensors())} tensors, {targets} targets"


def table(runs: list[Run], floor: int) -> str:
    """Medians. A peak of ``floor`` bytes, the measuring process's own, may be less in truth."""
    head = ["command", "wall s", "CPU s", "peak MiB"]
    rows = []
    for name in dict.fromkeys(run.tool for run in runs):
        mine = [run for run in runs if run.tool == name]
        usages = [run.usage for run in mine]
        if any(run.failed for run in mine):
            rows.append([name, "failed", "–", "–"])
            continue
        cpu = f"{statistics.median(usage.cpu_seconds for usage in usages):.2f}"
        wall = report.median_and_range([usage.seconds for usage in usages])
        rows.append([name, wall, cpu, report.peak_mib(usages, floor)])
    return report.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_time", description="Time what computes nothing.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before every run")
    add_work_option(parser)
    options = parser.parse_args()
    work = options.work.resolve()
    for name in PLANNED:
        make = [sys.executable, "-m", "benchmarks.making", name, "--work", str(work)]
        subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    made = {name: place(SHAPES[name], work) for name in PLANNED}
    description = {**{name: size(name) for name in PLANNED}, **machine.describe(work)}
    runs: list[Run] = []
    folder = work / "runs"
    folder.mkdir(exist_ok=True)
    for number in range(1, options.runs + 1):
        for name, command in commands(made, folder).items():
            for there in made.values():
                (cool if options.cold else warm)(there.files())
            runs.append(Run(name, number, measure(command, folder / "plan.log")))
            print(json.dumps(runs[-1].to_json()), flush=True)
    description["load"] += f", {os.getloadavg()[0]:.2f} when it ended"
    print(f"\n{report.facts(description)}\n\n{table(runs, own_peak())}")
    sys.exit(any(run.failed for run in runs))


if __name__ == "__main__":
    main()
