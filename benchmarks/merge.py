"""Merge shapes with several tools in turn, and say what each took and which promises hold.

    python -m benchmarks.merge --shape tinyllama --tools shardmerge,copy,import-torch,peft --runs 3

Prints JSON lines, and writes them to a file; then a Markdown table for each comparison, and a verdict. Exit code 1 if a
tool failed (unless it was to run within a memory limit), if shardmerge needed more memory than it may, or if a check
found a difference. Time is judged, but is no reason to fail: it depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from benchmarks import cgroup, machine, report, space, verdict
from benchmarks.making import add_work_option, is_made, place
from benchmarks.measure import ROOT, environment, own_peak
from benchmarks.runs import Group, Run, Setting, human
from benchmarks.shapes import DEFAULT_RANK, MERGED, REAL, SHAPES, Shape
from benchmarks.tools import ORACLE, all_tools, tools_in_memory
from benchmarks.turns import DROP_CACHES, Turns

RESULTS = ROOT / "output" / "bench" / "results.jsonl"
SWEPT = ["shardmerge"]
#: A base of more than this part of the memory does not stay in the page cache beside its output.
_CACHED_PART = 1 / 3


@dataclass(frozen=True, slots=True)
class Comparison:
    """A shape, the tools that merge it in turn, whether their outputs are compared, and the folder for all of it."""

    shape: Shape
    setting: Setting
    tools: Sequence[str]
    check: bool
    work: Path


def main() -> None:
    options = parse()
    results: Path = options.results
    results.parent.mkdir(parents=True, exist_ok=True)
    with open(results, "a") as file:
        good = session(options, Log(file))
    print(f"\nThese lines are in {results}")
    sys.exit(0 if good else 1)


class Log:
    """Lines of JSON, on stdout and in a file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def event(self, name: str, **fields: object) -> None:
        self.line({"event": name, **fields})

    def line(self, value: dict[str, object]) -> None:
        text = json.dumps(value, ensure_ascii=False)
        print(text, flush=True)
        self._file.write(text + "\n")
        self._file.flush()


def session(options: argparse.Namespace, log: Log) -> bool:
    """Everything that was asked for, and the report; whether all is as promised."""
    work: Path = options.work.resolve()
    description = describe(options, work)
    log.event("begin", at=datetime.now(timezone.utc).isoformat(timespec="seconds"), **description)
    groups: list[Group] = []
    checks: list[tuple[str, bool]] = []
    notes: list[str] = []

    def note(text: str) -> None:
        log.event("note", text=text)
        notes.append(text)

    compile_ours()
    planned = list(comparisons(options, note))
    for comparison in planned:
        log.event("space", text=space_text(comparison)[0])
    for comparison in planned:
        fitting = fit(comparison, note)  # others may have filled the disk meanwhile
        if fitting is not None:
            group, found_same = compare(fitting, options, log)
            groups.append(group)
            checks += found_same
    description["load"] += f"; {os.getloadavg()[0]:.2f} when it ended"
    found = verdict.claims(groups)
    for claim in found:
        log.event("claim", text=claim.text, holds=claim.holds, figures=claim.figures)
    for text, is_same in checks:
        log.event("check", text=text, good=is_same)
    print(f"\n{summary(description, groups, found, checks, notes)}")
    broken = [claim for claim in found if claim.is_bound and claim.holds is False]
    failed = [run for group in groups if not group.setting.memory_limit for run in group.runs if run.failed]
    return not broken and not failed and all(is_same for _, is_same in checks)


def compile_ours() -> None:
    """Bytecode for the checkout, as the other tools have theirs since pip installed them."""
    command = [sys.executable, "-m", "compileall", "-q", "shardmerge", "benchmarks"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL)


def describe(options: argparse.Namespace, work: Path) -> dict[str, str]:
    found = machine.describe(work)
    if options.mergekit_python:
        found["mergekit"] = machine.mergekit_version(options.mergekit_python)
    return found


def comparisons(options: argparse.Namespace, note: Callable[[str], None]) -> Iterator[Comparison]:
    """Every shape and rank with every tool that can run it here; for ranks to sweep, shardmerge alone; in memory."""
    work: Path = options.work.resolve()
    for shape in options.shape:
        for rank in options.rank:
            tools = []
            for tool in options.tools:
                if space.lacks_memory(tool, shape, options.dtype):
                    note(f"{shape.name}: {tool} left out: it holds the model, which this machine's memory does not")
                else:
                    tools.append(tool)
            ranked = shape.with_rank(rank)
            yield Comparison(ranked, setting(ranked, options), tools, options.check and ORACLE in tools, work)
    for rank in options.sweep:
        if rank not in options.rank:
            ranked = options.shape[0].with_rank(rank)
            yield Comparison(ranked, setting(ranked, options), SWEPT, False, work)
    if options.in_memory is not None:
        shape, folder = options.shape[0].with_rank(options.rank[0]), options.in_memory.resolve()
        of = dataclasses.replace(setting(shape, options), storage="memory", cache="warm")
        yield Comparison(shape, of, list(tools_in_memory()), False, folder)


def setting(shape: Shape, options: argparse.Namespace) -> Setting:
    cache = options.cache
    if cache == "auto":
        cache = "cold" if shape.base_bytes() > space.memory() * _CACHED_PART else "warm"
    return Setting(
        shape=shape.name,
        base_bytes=shape.base_bytes(),
        rank=shape.rank,
        dtype=options.dtype,
        compute_dtype=options.compute_dtype,
        device=options.device,
        cache=cache,
        memory_limit=options.memory_limit,
        cores=len(os.sched_getaffinity(0)),
    )


def space_text(comparison: Comparison) -> tuple[str, bool]:
    """What a comparison needs of disk, and whether it is there."""
    shape, setting, work = comparison.shape, comparison.setting, comparison.work
    need, free = space.disk(shape, work, setting.dtype, comparison.tools, comparison.check), space.free_disk(work)
    return f"{setting.title()}: {need.text(free)} under {work}", need.more <= free


def fit(comparison: Comparison, note: Callable[[str], None]) -> Comparison | None:
    """The comparison, without its check where the disk does not hold all outputs at a time; None if none fits."""
    text, is_enough = space_text(comparison)
    if is_enough:
        return comparison
    if comparison.check:
        note(f"{text}: outputs are not compared, space lacks for all of them at a time")
        return fit(dataclasses.replace(comparison, check=False), note)
    note(f"{text}: SKIPPED, space lacks")
    return None


def compare(comparison: Comparison, options: argparse.Namespace, log: Log) -> tuple[Group, list[tuple[str, bool]]]:
    """Make the inputs, run the tools, compare the outputs."""
    shape, work = comparison.shape, comparison.work
    was_there = is_made(shape, work)
    make(shape, work)
    known = all_tools(options.mergekit_python) | tools_in_memory()
    tools = {name: known[name] for name in comparison.tools}
    turns = Turns(place(shape, work), comparison.setting, work / "runs", tools)

    def done(run: Run) -> None:
        log.line(turns.group.line(run))

    try:
        turns.run(options.runs, comparison.check, done)
        checks = list(turns.check(None if shape.rounds_once else ".experts.")) if comparison.check else []
    finally:
        turns.remove_all()
        if not was_there and (options.remove_inputs or comparison.setting.storage == "memory"):
            shutil.rmtree(work / shape.name)
    return turns.group, checks


def make(shape: Shape, work: Path) -> None:
    """In another process, so that this one stays small."""
    command = [sys.executable, "-m", "benchmarks.making", shape.name, "--rank", str(shape.rank), "--work", str(work)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def summary(
    description: dict[str, str],
    groups: Sequence[Group],
    found: Sequence[verdict.Claim],
    checks: Sequence[tuple[str, bool]],
    notes: Sequence[str],
) -> str:
    """The whole report, in Markdown."""
    parts = [report.facts(description)]
    parts += [f"### {group.setting.title()}\n\n{report.table(group, own_peak())}" for group in groups]
    if notes:
        parts.append("\n".join(["### Left out", "", *(f"- {text}" for text in notes)]))
    parts.append("\n".join(["### Verdict", "", *(claim.line() for claim in found)]))
    if checks:
        parts.append("\n".join(["### Outputs", "", *(f"- {text}" for text, _ in checks)]))
    return "\n\n".join(parts)


# --- options ----------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description="Compare tools that merge.")
    add = parser.add_argument
    add("--shape", default="tinyllama", help=f"all ({', '.join(REAL)}), or some of {', '.join(MERGED)}, with commas")
    add("--tools", help="in the order in which they take turns (default: all)")
    add("--runs", type=_positive, default=3, help="rounds; in each every tool runs once")
    add("--rank", default=str(DEFAULT_RANK), help="of the adapter, from 8 to 256; several with commas")
    add("--sweep", default="", metavar="RANKS", help="on the first shape, shardmerge's memory with these ranks, too")
    add("--dtype", choices=("same", "float32", "bfloat16", "float16"), default="same", help="of every tool's output")
    add("--compute-dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="of shardmerge's sums")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the merges compute")
    cache = parser.add_mutually_exclusive_group()
    for name, text in (
        ("warm", "inputs are read before every run"),
        ("cold", "inputs are dropped from the page cache before every run"),
        ("drop", "all caches of the machine are dropped before every run (root)"),
    ):
        cache.add_argument(f"--{name}", dest="cache", action="store_const", const=name, help=text)
    add("--memory-limit", metavar="SIZE", help="run each tool in a memory cgroup of this size, for example 512MiB")
    add("--check", action="store_true", help=f"compare the last outputs with {ORACLE}'s, bit for bit")
    add("--in-memory", type=Path, metavar="DIR", help="a folder in memory (tmpfs), to merge the first shape there, too")
    add("--mergekit-python", metavar="PATH", help="an interpreter that has mergekit")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help=f"append JSON lines here (default: {RESULTS})")
    add("--remove-inputs", action="store_true", help="remove each base that this run has made once it is through")
    add_work_option(parser)
    parser.set_defaults(cache="auto")
    options = parser.parse_args(arguments)
    try:
        _complete(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _complete(options: argparse.Namespace) -> None:
    """Names become what they stand for. ``ValueError`` where they stand for nothing, or cannot be had here."""
    names = REAL if options.shape == "all" else options.shape.split(",")
    options.shape = [SHAPES[name] for name in _known("shape", names, MERGED)]
    known = all_tools(options.mergekit_python)
    names = options.tools.split(",") if options.tools else list(known)
    if "mergekit" in names and not options.mergekit_python:
        raise ValueError("mergekit needs --mergekit-python")
    options.tools = _known("tool", names, known)
    options.rank, options.sweep = _ranks(options.rank), _ranks(options.sweep)
    if options.cache == "drop" and not os.access(DROP_CACHES, os.W_OK):
        raise ValueError(f"--drop: {DROP_CACHES} is not writable; that takes root (--cold drops the inputs alone)")
    if options.in_memory is not None and machine.filesystem(options.in_memory) not in ("tmpfs", "ramfs"):
        raise ValueError(f"--in-memory {options.in_memory}: that file system is not in memory")
    if options.memory_limit is not None:
        options.memory_limit = cgroup.parse_size(options.memory_limit)
        try:
            with cgroup.limited(options.memory_limit):
                pass
        except cgroup.LimitError as error:
            raise ValueError(f"--memory-limit {human(options.memory_limit)}: {error}") from None


def _known(kind: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no such {kind}: {', '.join(unknown)}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _ranks(text: str) -> list[int]:
    ranks = [int(part) for part in text.split(",") if part.strip()]
    if wrong := [rank for rank in ranks if not 8 <= rank <= 256]:
        raise ValueError(f"a rank is from 8 to 256, not {wrong[0]}")
    return list(dict.fromkeys(ranks))


if __name__ == "__main__":
    main()
