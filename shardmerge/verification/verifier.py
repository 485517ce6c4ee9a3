"""Verify an output against its record, its base and its adapters, without the code that wrote it.

- *Structure*: every recorded file exists, and no other file that a program may load. Headers cover their files, and
  agree with the index. No tensor is missing, new or stored twice. The files beside the weights are those of base and
  adapter, and config.json fits the tensors.
- *Checksums* of the record, of the files beside the weights, and of whole shards. A record whose own checksum is wrong
  is not used. Each shard is read once, for its checksum and for its tensors.
- *Untouched* tensors hold the source's bytes, all of them, or its numbers rounded to the output's dtype.
- *Touched* tensors: a seeded sample of rows, or all rows, are computed again in float64. They must agree within one
  rounding of the output's dtype and the error of the compute dtype. `shardmerge.verification.exact` states the bound,
  and which families have an independent formula there.

A GGUF file holds none of the base's bytes, so rows of every tensor are computed again
(`shardmerge.verification.gguf`).

The merge is planned again from the record, with the merge's own `key_mapping` and `planning`: they decide which tensor
an adapter's module means, and where it is stored. The code that computes or moves bytes (engine, tiles, factors, direct
I/O) is not used. Memory does not grow with the model, except for families that make a weight's whole update at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from shardmerge.destinations.record import open_record
from shardmerge.errors import FormatError, VerifyError
from shardmerge.spec.packed import moved
from shardmerge.system.events import Stopwatch, event
from shardmerge.verification.findings import Advanced, Findings, Problem, VerifyReport, describe, summary
from shardmerge.verification.record import plan_again

__all__ = ["ROWS", "Problem", "VerifyReport", "describe", "summary", "verify_output"]

#: Rows of a touched tensor that are computed again by default.
ROWS = 16

#: The module whose ``check`` verifies an output, by its layout (`shardmerge.planning.layouts`). They import torch, so
#: they are imported after the record was read and the plan was made, whose temporary memory is free again by then.
FORMATS: Mapping[str, str] = {
    "safetensors": "shardmerge.verification.checkpoint",
    "gguf": "shardmerge.verification.gguf",
}


def verify_output(
    output: Path,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    rows: int | None = ROWS,
    seed: int = 0,
    progress: Advanced = lambda done, total, name, number, shards: None,
) -> VerifyReport:
    """Verify an output; the report holds every problem.

    ``base`` and ``adapters`` (all of them, in their order) are where those are now, if they were moved. ``rows`` None
    computes all rows again. Raises `VerifyError` where there is nothing to verify, `ConfigError` for wrong arguments,
    `SourceError` where reading fails.
    """
    watch = Stopwatch()
    try:
        record = moved(partial(open_record, output))
    except FormatError as error:
        raise VerifyError(str(error)) from None
    findings = Findings(str(output), seed)
    findings.notes += record.notes
    findings.record_checksum = record.seal
    again = plan_again(record, output, base, adapters, findings)
    event(
        "verifying", f"verifying {output}: {len(record.shards)} shards", seconds=watch.lap(), shards=len(record.shards)
    )
    findings.format = record.format if record.format in FORMATS else "safetensors"
    import_module(FORMATS[findings.format]).check(output, record, again, findings, rows, progress)
    return findings.report()
