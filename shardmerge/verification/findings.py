"""The report of a verification: problems, counts, and the parts that could not be verified."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shardmerge.errors import VerifyError
from shardmerge.reporting.text import count, human_bytes, human_seconds, labelled, table
from shardmerge.spec.plans import jsonable
from shardmerge.system.memory_use import peak_memory
from shardmerge.system.terminal_text import one_line

#: Problems of one kind that are listed; of the rest only the number is reported.
LISTED = 10
#: Problems that an error's message has.
_SUMMARY = 3

_NOT_ALL = "not all of it could be verified"
_IF_THAT_IS_ENOUGH = "If the part that could be verified is enough, allow it with partial=True"

STRUCTURE, CHECKSUMS, UNTOUCHED, TOUCHED = "structure", "checksums", "untouched", "touched"


#: Receives the bytes of the shards that are done, their total, the shard's name, its number, the number of shards.
Advanced = Callable[[int, int, str, int, int], None]

#: How the tensors that no adapter touches are compared, by the output's format.
_COMPARED = {"safetensors": ", the bytes of the base", "gguf": " of their rows, the base's numbers"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``row`` is a stored row, ``column`` counts within it; both may be unknown.

    ``error`` and ``allowed`` are absolute; they are set for rows that were computed again.
    """

    kind: str
    text: str
    file: str | None = None
    tensor: str | None = None
    row: int | None = None
    column: int | None = None
    found: float | str | None = None
    expected: float | str | None = None
    error: float | None = None
    allowed: float | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was verified of an output, and what is wrong with it.

    Sizes are bytes. ``checksums`` counts shards, ``other_files`` the files beside them whose checksums were compared.
    ``worst`` is the largest error of a touched value, as a multiple of the error allowed, and is in ``worst_tensor``.
    ``added`` lists all files that the merge did not write. ``unverified`` lists what could not be compared, and why;
    ``notes`` lists remarks that are not faults of the output. ``problems`` holds the first of every kind, ``counts``
    their number. ``record_checksum`` is the record's own, which identifies the merge; older records have none.
    """

    output: str
    format: str
    files: int
    tensors: int
    checksums: int
    checksum_bytes: int
    other_files: int
    untouched: int
    untouched_bytes: int
    touched: int
    rows: int
    all_rows: int
    seed: int
    worst: float
    worst_tensor: str | None
    added: tuple[str, ...]
    unverified: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    counts: dict[str, int]
    seconds: float
    peak_memory_bytes: int
    record_checksum: str | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with what could be verified."""
        return not self.problems

    @property
    def complete(self) -> bool:
        """Whether everything could be verified."""
        return not self.unverified

    def raise_for_status(self, *, partial: bool = False) -> VerifyReport:
        """This report. Raises `VerifyError`, with the report, where something is wrong or could not be verified.

        With ``partial`` the part that could be verified is enough.
        """
        if self.ok and (self.complete or partial):
            return self
        error = VerifyError(summary(self))
        error.report = self
        raise error

    def to_json(self) -> dict[str, Any]:
        """``peak_memory`` is the older name of ``peak_memory_bytes``."""
        return {"ok": self.ok, "complete": self.complete, **jsonable(self), "peak_memory": self.peak_memory_bytes}


@dataclass(slots=True)
class Findings:
    """The report while it is being made; see `VerifyReport` for the fields."""

    output: str
    seed: int
    format: str = "safetensors"
    files: int = 0
    tensors: int = 0
    checksums: int = 0
    checksum_bytes: int = 0
    other_files: int = 0
    untouched: int = 0
    untouched_bytes: int = 0
    touched: int = 0
    rows: int = 0
    all_rows: int = 0
    worst: float = 0.0
    worst_tensor: str | None = None
    added: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    record_checksum: str | None = None
    started: float = field(default_factory=time.monotonic)

    def problem(self, kind: str, text: str, **where: Any) -> None:
        self._add(Problem(kind, text, **where))

    def wrong_value(self, problem: Problem, columns: str = "") -> None:
        """Add a problem with a value of a tensor; its text is completed by the place and the error.

        ``columns`` names the place in the row, where that is more than one column.
        """
        where = f"{problem.tensor}, row {problem.row}, {columns or f'column {problem.column}'}"
        text = f"{where}: {problem.text}"
        if problem.error is not None:
            text += f"; that is off by {problem.error:.3g}, where {problem.allowed:.3g} is allowed"
        self._add(replace(problem, text=f"{text} ({problem.file})"))

    def _add(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= LISTED:
            self.problems.append(problem)

    def take(self, other: Findings) -> None:
        """Add the problems of a second pass; its other counts are dropped."""
        self.problems += other.problems
        self.counts.update(other.counts)

    def report(self) -> VerifyReport:
        values = {of.name: getattr(self, of.name) for of in fields(self) if of.name != "started"}
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        values["counts"] = dict(self.counts)
        return VerifyReport(**values, seconds=time.monotonic() - self.started, peak_memory_bytes=peak_memory())


def describe(report: VerifyReport) -> str:
    """The verdict as a person reads it."""
    parts = [table(_rows(report))]
    if report.problems:
        parts.append("\n".join(_problem_lines(report)))
    if report.unverified:
        parts.append("\n".join(f"not verified: {one_line(text)}" for text in report.unverified))
    if report.notes:
        parts.append("\n".join(map(labelled, report.notes)))
    return "\n\n".join([*parts, verdict(report)])


def verdict(report: VerifyReport) -> str:
    """The verdict in one line."""
    if not report.ok:
        return f"{report.output}: NOT what base and adapter make of it: {count_of_problems(report)}"
    if not report.complete:
        return f"{report.output}: nothing wrong was found, but {_NOT_ALL} (see above)"
    return f"{report.output}: verified in {human_seconds(report.seconds)}"


def summary(report: VerifyReport) -> str:
    """The text of an error: the first problems, or if there are none, what could not be verified."""
    if report.ok:
        lines = [f"  - {one_line(text)}" for text in report.unverified]
        return "\n".join([f"{report.output}: nothing wrong was found, but {_NOT_ALL}:", *lines, _IF_THAT_IS_ENOUGH])
    lines = [f"  - {one_line(problem.text)}" for problem in report.problems[:_SUMMARY]]
    return "\n".join([f"{report.output}: {count_of_problems(report)}:", *lines])


def count_of_problems(report: VerifyReport) -> str:
    """``"1 problem"``, ``"12 problems"``."""
    return count(sum(report.counts.values()), "problem")


def _rows(report: VerifyReport) -> Sequence[tuple[str, str, str]]:
    checked = f"{count(report.untouched, 'tensor')}, {human_bytes(report.untouched_bytes)}{_COMPARED[report.format]}"
    sampled = "all rows" if report.rows == report.all_rows else f"{report.rows:,} of {report.all_rows:,} rows"
    seeded = "" if report.rows == report.all_rows else f" (seed {report.seed})"
    within = ", all within the rounding of their dtypes"
    worst = within if report.worst <= 1 else f", the largest error is {report.worst:.3g} times what rounding explains"
    worst = worst if report.worst_tensor else ""
    touched = f"{count(report.touched, 'tensor')}, {sampled}{seeded} computed again in float64{worst}"
    return [
        (
            STRUCTURE,
            _word(report, STRUCTURE, True),
            f"{count(report.files, 'file')}, {count(report.tensors, 'tensor')}",
        ),
        (
            CHECKSUMS,
            _word(report, CHECKSUMS, report.checksums > 0),
            f"{count(report.checksums, 'shard')}, {human_bytes(report.checksum_bytes)}; "
            f"{count(report.other_files, 'other file')}",
        ),
        (UNTOUCHED, _word(report, UNTOUCHED, report.untouched > 0), checked if report.untouched else ""),
        (TOUCHED, _word(report, TOUCHED, report.touched > 0), touched if report.touched else ""),
    ]


def _word(report: VerifyReport, kind: str, looked: bool) -> str:
    if report.counts.get(kind):
        return "WRONG"
    return "ok" if looked else "-"


def _problem_lines(report: VerifyReport) -> list[str]:
    lines = []
    for kind, total in report.counts.items():
        listed = [problem for problem in report.problems if problem.kind == kind]
        lines += [f"wrong ({kind}): {one_line(problem.text)}" for problem in listed]
        if total > len(listed):
            lines.append(f"wrong ({kind}): … and {total - len(listed)} more")
    return lines
