"""How long the commands that compute nothing take: ``shardmerge plan`` on an index of 1,000 shards, and ``--help``.

python -m benchmarks.plan_time --runs 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import machine, report
from benchmarks.measure import ROOT, Usage, cool, measure, warm
from benchmarks.shapes import SHAPES, Made, add_work_option, place

SHAPE = "index-1000"


def commands(made: Made, folder: Path) -> dict[str, list[str]]:
    config = folder / "plan.yaml"
    value = {"base": str(made.base), "adapters": [str(made.adapter)], "output": {"path": str(folder / "never-written")}}
    config.write_text(json.dumps(value))
    python = sys.executable
    return {
        "python -c pass": [python, "-c", "pass"],
        "shardmerge --help": [python, "-m", "shardmerge", "--help"],
        f"shardmerge plan, {SHAPE}": [python, "-m", "shardmerge", "plan", str(config)],
        "python -c 'import torch'": [python, "-c", "import torch"],
    }


def row(name: str, usages: list[Usage]) -> list[str]:
    if any(usage.exit_code for usage in usages):
        return [name, "failed", "–", "–", "–"]
    seconds = [usage.seconds for usage in usages]
    cpu = statistics.median(usage.cpu_seconds for usage in usages)
    peak = max(usage.peak_bytes for usage in usages) / report.MIB
    return [name, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}", f"{cpu:.2f}", f"{peak:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_time", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before every run")
    add_work_option(parser)
    options = parser.parse_args()
    work = options.work.resolve()
    make = [sys.executable, "-m", "benchmarks.shapes", SHAPE, "--work", str(work)]
    subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    made = place(SHAPES[SHAPE], work)
    usages: dict[str, list[Usage]] = {}
    for _ in range(options.runs):
        for name, command in commands(made, work).items():
            (cool if options.cold else warm)(made.files())
            usages.setdefault(name, []).append(measure(command, work / "plan.log"))
    shape = SHAPES[SHAPE]
    counts = f"{shape.shards} shards, {sum(1 for _ in shape.base_tensors())} tensors, {7 * shape.layers} targets"
    rows = [["command", "wall s, median", "least", "CPU s", "peak MiB"], ["---", *["---:"] * 4]]
    rows += [row(name, values) for name, values in usages.items()]
    print(report.facts({"shape": counts, **machine.describe(work)}), end="\n\n")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    sys.exit(any(usage.exit_code for values in usages.values() for usage in values))


if __name__ == "__main__":
    main()
