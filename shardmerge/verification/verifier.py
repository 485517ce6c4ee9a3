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

The merge is planned again from the record: which tensor an adapter's module means, and where it lies, is decided by
`key_mapping` and `planning.planner`, here as in the merge. Everything that computes or moves bytes (engine,
tiles, factors, direct I/O) is not used. Memory does not grow with the model, except for families that make a weight's
whole update at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shardmerge.destinations.record import Record, open_record
from shardmerge.errors import FormatError, SourceError, VerifyError
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.sources.source import read_file
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import TensorInfo
from shardmerge.system import json_text
from shardmerge.system.events import Stopwatch, event
from shardmerge.verification.exact import Exact
from shardmerge.verification.files import check_added, check_files
from shardmerge.verification.findings import Findings, Problem, VerifyReport, describe, summary
from shardmerge.verification.gguf import check_gguf
from shardmerge.verification.reading import Files, threads
from shardmerge.verification.record import Again, files_of, plan_again
from shardmerge.verification.shards import Piece, ShardCheck, ShardFile
from shardmerge.verification.structure import (
    Stored,
    check_config,
    check_structure,
    contradictions,
    read_shards,
)

__all__ = ["ROWS", "Problem", "VerifyReport", "describe", "summary", "verify_output"]

#: Rows of a touched tensor that are computed again, if nothing else is asked for.
ROWS = 16

#: Is told: bytes of the shards that are done, of how many, the shard's name, its number, of how many.
Told = Callable[[int, int, str, int, int], None]


def verify_output(
    output: Path,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    rows: int | None = ROWS,
    seed: int = 0,
    told: Told = lambda done, total, name, number, shards: None,
) -> VerifyReport:
    """Look at everything; what is wrong is in the report.

    ``base`` and ``adapters`` (all of them, in their order) say where those are now, if not where the merge found them.
    ``rows`` None computes all rows again. Raises `VerifyError` where there is nothing to verify, `ConfigError` for
    wrong arguments, `SourceError` where reading fails.
    """
    watch = Stopwatch()
    try:
        record = open_record(output)
    except FormatError as error:
        raise VerifyError(str(error)) from None
    findings = Findings(str(output), seed)
    findings.notes += record.notes
    again = plan_again(record, output, base, adapters, findings)
    event(
        "verifying", f"verifying {output}: {len(record.shards)} shards", seconds=watch.lap(), shards=len(record.shards)
    )
    if record.is_gguf:
        findings.format = "gguf"
        check_files(output, record, again.plan, findings)
        check_gguf(output, record, again, findings, rows, told)
        check_added(output, record, findings)
        return findings.report()
    stored = read_shards(output, record, findings)
    check_files(output, record, again.plan, findings)
    check_structure(output, record, stored, again.plan, findings)
    _check_config(output, record, stored, again, findings)
    check_added(output, record, findings)
    with Files([*files_of(again), *(shard.file for shard in stored)]) as files:
        exact = None if again.plan is None else Exact(files, again.plan, again.adapters)
        by_chance = again.plan is not None and again.plan.rounding == "stochastic"
        check = ShardCheck(files, exact, findings, rows, seed, by_chance)
        planned = _planned(again, record)
        total = sum(shard.file.size - shard.data_start for shard in stored)
        done = 0
        for number, shard in enumerate(stored, 1):

            def advance(count: int, name: str = shard.name, number: int = number) -> None:
                nonlocal done
                done += count
                told(done, total, name, number, len(stored))

            advance(0)
            recorded = record.shards[shard.name][1]
            if not recorded:
                findings.unverified.append(f"{shard.name}: its checksum was not recorded")
            with threads(1):
                check.run(_shard_file(shard, planned, recorded), advance)
            _checked(shard, findings, watch.lap())
    if again.plan is None and again.base is not None:
        findings.notes.append("what was not merged was compared with the base, as far as it keeps its dtype")
    return findings.report()


def _checked(shard: Stored, findings: Findings, seconds: float) -> None:
    problems = sum(findings.counts.values())
    event(
        "shard-verified",
        f"verified {shard.name} in {seconds:.1f} s; problems so far: {problems}",
        shard=shard.name,
        bytes=shard.file.size,
        tensors=len(shard.tensors),
        problems=problems,
        seconds=seconds,
    )


def _shard_file(shard: Stored, planned: Mapping[str, TensorPlan], recorded: Mapping[str, str]) -> ShardFile:
    pieces = tuple(Piece(name, info, _fitting(planned.get(name), info)) for name, info in shard.tensors.items())
    return ShardFile(shard.name, shard.file, shard.data_start, pieces, recorded)


def _fitting(plan: TensorPlan | None, info: TensorInfo) -> TensorPlan | None:
    """What a tensor must be, also where it lies elsewhere than planned; None if it is another altogether."""
    if plan is None or (plan.out.dtype, plan.out.shape) != (info.dtype, info.shape):
        return None
    return dataclasses.replace(plan, out=info)


def _planned(again: Again, record: Record) -> dict[str, TensorPlan]:
    """What each tensor must be; without a plan, that what was not merged is the base's."""
    if again.plan is not None:
        return {tensor.source.name: tensor for shard in again.plan.shards for tensor in shard.tensors}
    return {} if again.base is None else _untouched(again.base, record)


def _untouched(base: Checkpoint, record: Record) -> dict[str, TensorPlan]:
    refs = (weight.tensor for name, weight in base.weights.items() if name not in record.targets)
    return {ref.name: TensorPlan(ref, TensorInfo(ref.dtype, ref.shape, (0, ref.nbytes))) for ref in refs}


def _check_config(output: Path, record: Record, stored: Sequence[Stored], again: Again, findings: Findings) -> None:
    config = record.values.get("config")
    section = config.get("output") if isinstance(config, dict) else None
    told = section.get("dtype") if isinstance(section, dict) else "same"
    check_config(output, stored, _contradictions_of_base(again), told != "same", findings)


def _contradictions_of_base(again: Again) -> dict[str, str] | None:
    """What the base's own config.json says that is not so."""
    if again.plan is None:
        return None
    aux = next((aux for aux in again.plan.aux if aux.name == "config.json"), None)
    if aux is None:
        return None
    try:
        config = json_text.parse_object(read_file(aux.source))
    except (SourceError, json_text.JsonError):
        return None
    tensors = {
        tensor.source.name: TensorInfo(tensor.source.dtype, tensor.source.shape, (0, tensor.source.nbytes))
        for shard in again.plan.shards
        for tensor in shard.tensors
    }
    return dict(contradictions(config, tensors))
