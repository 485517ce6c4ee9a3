"""Prove an output: from its record, base and adapters, without the code that wrote it.

- *Structure*: every recorded file is there and none besides that a program may load, headers tile their files, index
  and headers agree, no tensor is missing, new or stored twice; the files beside the weights are those of base and
  adapter; config.json fits the tensors.
- *Checksums* of the record itself, without which nothing is believed, of the files beside the weights, and of whole
  shards, from the same reading as what follows.
- *Untouched* tensors: the source's bytes, all of them (or its numbers, rounded to the output's dtype).
- *Touched* tensors: a seeded sample of rows, or all, computed again in float64 and compared within one rounding of the
  output's dtype and what the compute dtype may be off; `shardmerge.verification.exact` states the bound, and which
  families have a formula of their own there.

A GGUF file has none of the base's bytes: there rows of every tensor are computed again; see
`shardmerge.verification.gguf`.

The merge is planned again from the record: which tensor an adapter's module means, and where it is stored, is decided
by `key_mapping` and `planning.planner`, here as in the merge. Everything that computes or moves bytes (engine,
tiles, factors, direct I/O) is not used. Memory does not grow with the model, except for families that make a weight's
whole update at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from shardmerge.destinations.record import Record, open_record
from shardmerge.errors import FormatError, VerifyError
from shardmerge.spec.packed import moved
from shardmerge.system.events import Stopwatch, event
from shardmerge.system.garbage import give_back
from shardmerge.verification.findings import Advanced, Findings, Problem, VerifyReport, describe, summary
from shardmerge.verification.record import Again, plan_again

__all__ = ["ROWS", "Problem", "VerifyReport", "describe", "summary", "verify_output"]

#: Rows of a touched tensor that are computed again, if nothing else is asked for.
ROWS = 16

#: Looks at an output; ``rows`` None looks at all rows.
Check = Callable[[Path, Record, Again, Findings, "int | None", Advanced], None]


def _checkpoint() -> Check:
    from shardmerge.verification.checkpoint import check_checkpoint

    return check_checkpoint


def _gguf() -> Check:
    from shardmerge.verification.gguf import check_gguf

    return check_gguf


#: What proves an output of each layout of `shardmerge.planning.layouts`. It imports torch, so it is asked for when the
#: plan is made and the record is read: at no time both take memory.
FORMATS: Mapping[str, Callable[[], Check]] = {"safetensors": _checkpoint, "gguf": _gguf}


def verify_output(
    output: Path,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    rows: int | None = ROWS,
    seed: int = 0,
    progress: Advanced = lambda done, total, name, number, shards: None,
) -> VerifyReport:
    """Look at everything; what is wrong is in the report.

    ``base`` and ``adapters`` (all of them, in their order) say where those are now, if not where the merge found them.
    ``rows`` None computes all rows again. Raises `VerifyError` where there is nothing to verify, `ConfigError` for
    wrong arguments, `SourceError` where reading fails.
    """
    watch = Stopwatch()
    try:
        record = moved(partial(open_record, output))
    except FormatError as error:
        raise VerifyError(str(error)) from None
    findings = Findings(str(output), seed)
    findings.notes += record.notes
    again = plan_again(record, output, base, adapters, findings)
    event(
        "verifying", f"verifying {output}: {len(record.shards)} shards", seconds=watch.lap(), shards=len(record.shards)
    )
    findings.format = record.format if record.format in FORMATS else "safetensors"
    give_back()
    FORMATS[findings.format]()(output, record, again, findings, rows, progress)
    return findings.report()
