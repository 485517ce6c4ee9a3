"""How near each stage of a merge comes to what the machine can do: read, compute and write, each alone.

    python -m benchmarks.stages --shape tinyllama --runs 3

The stages are shardmerge's own: a shard is merged by its engine, in whose place of a pipeline stands a loop that takes
the time of one stage only. Limits and stages are measured in turns; the table has medians. What is written goes to a
folder of its own, which is removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from unittest import mock

import shardmerge
from benchmarks import direct, limits, machine, report
from benchmarks.making import Made, add_work_option, place
from benchmarks.measure import ROOT, cool, warm
from benchmarks.shapes import MERGED, SHAPES, Shape
from shardmerge.destinations.shard_writer import ShardWriter
from shardmerge.execution import engine, pipeline
from shardmerge.execution.engine import Engine
from shardmerge.execution.jobs import Job
from shardmerge.execution.pipeline import Buffer, Work, Worked
from shardmerge.spec.plans import MergePlan, ShardPlan
from shardmerge.spec.receipts import Fidelity, Receipt
from shardmerge.system.checksums import Checksums
from shardmerge.system.directory import Directory

GB = 1e9
#: What the machine's limits are measured on, at most: a part of a shard.
LIMIT_BYTES = 2 << 30

Done = TypeVar("Done")


@dataclass(slots=True)
class Clock:
    """Seconds spent in a stage, and the bytes that went through it."""

    seconds: float = 0.0
    nbytes: int = 0

    def time(self, step: Callable[[], Done], nbytes: int = 0) -> Done:
        started = time.perf_counter()
        done = step()
        self.seconds += time.perf_counter() - started
        self.nbytes += nbytes
        return done

    @property
    def speed(self) -> float:
        return self.nbytes / self.seconds if self.seconds else 0.0


class NoWriter(ShardWriter):
    """Takes blocks and keeps none."""

    shares = False

    def __init__(self) -> None:
        self.checksums = Checksums()

    def commit(self, active: Sequence[int] = (), fidelity: Mapping[str, Fidelity] | None = None) -> Receipt:
        return Receipt("", 0, {}, ())

    def write_block(
        self, memory: memoryview, position: int, offset: int, size: int, source: tuple[int, int] | None = None
    ) -> None:
        pass


@contextmanager
def alone(stage: str, clock: Clock) -> Iterator[None]:
    """Merge with one stage under the clock, and of the others no more than that one needs."""

    def run(
        jobs: Iterable[Job],
        buffers: Sequence[Buffer],
        read: Callable[[Job, Buffer], None],
        work: Work[Job],
        write: Callable[[Job, Buffer], None],
        done: Callable[[Job], None],
    ) -> None:
        """The last job is waited for when the next has been handed out, as threads may be at its last tiles."""
        last = Worked(buffers[0])
        for number, job in enumerate(jobs):
            source, target = buffers[number % 2], buffers[2 + number % 2]
            targets = iter([target])
            if stage == "read":
                clock.time(partial(read, job, source), job.read_bytes)
            elif stage == "write":
                clock.time(partial(write, job, target), job.write_bytes)
            elif job.tensor is not None:
                read(job, source)
                before, last = last, clock.time(partial(work, job, source, targets.__next__), job.read_bytes)
                clock.time(before.wait)
        clock.time(last.wait)

    # Where tiles are only read, or only written, no update is done, which is all right here alone.
    with mock.patch.object(pipeline, "run", run), mock.patch.object(engine, "missing", lambda tensor, given: ""):
        yield


def make_plan(made: Made, output: Path) -> MergePlan:
    value = {"base": str(made.base), "adapters": [str(made.adapter)], "output": {"path": str(output)}}
    return shardmerge.plan(value)


def with_workers(plan: MergePlan, workers: int) -> MergePlan:
    return dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, workers=workers))


def run_stage(plan: MergePlan, shard: ShardPlan, stage: str, writer: ShardWriter) -> Clock:
    clock = Clock()
    with Engine(plan) as merging, alone(stage, clock):
        merging.merge_shard(shard, writer, lambda _: None)
    return clock


def write_stage(plan: MergePlan, shard: ShardPlan, folder: Path) -> Clock:
    """The writer with whatever lies in the buffers, from the reservation to the last fsync."""
    started = time.perf_counter()
    with Directory(folder) as directory, ShardWriter(directory / shard.name, shard) as writer:
        run_stage(plan, shard, "write", writer)
    seconds = time.perf_counter() - started
    (folder / shard.name).unlink()
    return Clock(seconds, shard.nbytes)


@dataclass(frozen=True, slots=True)
class Product:
    """The matrix product of the tile that there is most of: (out, rank) x (rank, into)."""

    out: int
    rank: int
    into: int

    @property
    def name(self) -> str:
        return f"product of a tile ({self.out}×{self.rank} by {self.rank}×{self.into}), one thread"

    def bytes_per_second(self, operations: float) -> float:
        """How fast bytes of a weight of 16 bits go by, if the product is all that is done."""
        return operations / (2 * self.rank) * 2


def usual_product(shard: ShardPlan) -> Product | None:
    """None where nothing in the shard has an update."""
    worked = [tensor for tensor in shard.tensors if tensor.updates and tensor.tiles]
    if not worked:
        return None
    largest = max(worked, key=lambda tensor: tensor.source.nbytes)
    return Product(max(len(rows) for rows in largest.ranges()), largest.updates[0].rank, largest.row_elements)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Row:
    """What was measured in every round, and the limit that it is held against."""

    name: str
    measure: Callable[[], float]
    limit: str | None = None
    unit: str = "GB/s"
    #: Of the limit's value, what one could reach.
    scale: Callable[[float], float] = lambda value: value
    values: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def machine_rows(made: Made, source: Path, folder: Path, product: Product) -> list[Row]:
    # Whole pages: that is what direct I/O reads.
    size = min(LIMIT_BYTES, source.stat().st_size) // direct.PAGE * direct.PAGE
    target = folder / "limit"
    return [
        Row("direct read", lambda: limits.direct_read(source, size)),
        Row("direct write", lambda: limits.direct_write(target, size)),
        Row("direct read and write together, each way", lambda: limits.direct_both(source, target, size)),
        Row("direct read, huge pages", lambda: limits.direct_read(source, size, huge=True)),
        Row("direct write, huge pages", lambda: limits.direct_write(target, size, huge=True)),
        Row("both together, huge pages, each way", lambda: limits.direct_both(source, target, size, huge=True)),
        Row("read from the page cache", lambda: limits.warm_read(source, size)),
        Row("memcpy, one thread", limits.memcpy),
        Row("product of squares, one thread", limits.square_product, unit="GFLOP/s"),
        Row(product.name, lambda: limits.products(product.out, product.rank, product.into), unit="GFLOP/s"),
    ]


def stage_rows(plan: MergePlan, shard: ShardPlan, files: Sequence[Path], folder: Path, product: Product) -> list[Row]:
    def reading(prepare: Callable[[Sequence[Path]], None]) -> float:
        os.sync()
        prepare(files)
        return run_stage(plan, shard, "read", NoWriter()).speed

    def computing(workers: int) -> float:
        warm(files)
        return run_stage(with_workers(plan, workers), shard, "work", NoWriter()).speed

    return [
        Row("reader, cold", lambda: reading(cool), "direct read, huge pages"),
        Row("reader, warm", lambda: reading(warm), "read from the page cache"),
        Row("compute, 1 worker", lambda: computing(1), product.name, scale=product.bytes_per_second),
        Row(
            "compute, 2 workers", lambda: computing(2), product.name, scale=lambda of: 2 * product.bytes_per_second(of)
        ),
        Row("writer", lambda: write_stage(plan, shard, folder).speed, "direct write, huge pages"),
    ]


def table(rows: Sequence[Row]) -> str:
    known = {row.name: row for row in rows}
    lines = []
    for row in rows:
        limit = share = report.NONE
        if row.limit is not None:
            most = row.scale(known[row.limit].median)
            limit, share = f"{most / GB:.2f} GB/s ({row.limit})", f"{row.median / most:.0%}"
        spread = report.median_and_range([value / GB for value in row.values])
        lines.append([row.name, spread, row.unit, limit, share])
    return report.markdown(["", "measured", "unit", "limit", "share of it"], lines)


def rows_for(shape: Shape, made: Made, folder: Path) -> list[Row]:
    """Everything that is measured, of the first shard with updates."""
    plan = make_plan(made, folder / "never-written")
    for shard in plan.shards:
        if (product := usual_product(shard)) is not None:
            files = sorted({Path(tensor.source.uri) for tensor in shard.tensors})
            return [
                *machine_rows(made, files[0], folder, product),
                *stage_rows(plan, shard, files, folder, product),
            ]
    raise ValueError(f"{shape.name}: no shard has an update")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description="Stages against the machine.")
    parser.add_argument("--shape", choices=MERGED, default="tinyllama")
    parser.add_argument("--runs", type=int, default=3, help="rounds; in each everything is measured once")
    add_work_option(parser)
    options = parser.parse_args(arguments)
    shape, work = SHAPES[options.shape], options.work.resolve()
    make = [sys.executable, "-m", "benchmarks.making", shape.name, "--work", str(work)]
    subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    description = {"shape": shape.name, **machine.describe(work)}
    folder = Path(tempfile.mkdtemp(prefix="stages-", dir=work))
    try:
        rows = rows_for(shape, place(shape, work), folder)
        for number in range(1, options.runs + 1):
            for row in rows:
                row.values.append(row.measure())
                line = {"event": "stage", "name": row.name, "run": number, "unit": row.unit}
                print(json.dumps({**line, "value": round(row.values[-1] / GB, 4)}, ensure_ascii=False), flush=True)
    finally:
        shutil.rmtree(folder)
    description["load"] += f"; {os.getloadavg()[0]:.2f} when it ended"
    print(f"\n{report.facts(description)}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
