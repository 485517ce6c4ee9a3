"""Every shard of a checkpoint in one pass: its checksum, and its tensors against base and adapters.

Importing this module imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardmerge.destinations.record import Record
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import TensorInfo
from shardmerge.system.events import Stopwatch, event
from shardmerge.verification.exact import Exact
from shardmerge.verification.findings import Advanced, Findings
from shardmerge.verification.reading import Files, threads
from shardmerge.verification.record import Again, files_of
from shardmerge.verification.second_opinion import ask_library
from shardmerge.verification.shards import Piece, ShardCheck, ShardFile
from shardmerge.verification.structure import Stored


def check_shards(
    output: Path,
    stored: Sequence[Stored],
    record: Record,
    again: Again,
    findings: Findings,
    rows: int | None,
    progress: Advanced,
) -> None:
    """Problems go to ``findings``. ``rows`` None computes all rows again."""
    watch = Stopwatch()
    with Files([*files_of(again), *(shard.file for shard in stored)]) as files:
        exact = None if again.plan is None else Exact(files, again.plan, again.adapters)
        shard_check = ShardCheck(files, exact, findings, rows)
        planned = _Planned(again, record)
        total = sum(shard.file.size - shard.data_start for shard in stored)
        done = 0
        for number, shard in enumerate(stored, 1):

            def advance(count: int, name: str = shard.name, number: int = number) -> None:
                nonlocal done
                done += count
                progress(done, total, name, number, len(stored))

            advance(0)
            if shard.tensors:
                ask_library(output / shard.name, shard.name, shard.tensors, findings)
            recorded = record.shards[shard.name][1]
            if not recorded:
                findings.unverified.append(f"{shard.name}: its checksum was not recorded")
            with threads(1):
                shard_check.run(_shard_file(shard, planned, recorded), advance)
            _checked(shard, findings, watch.lap())
    if again.plan is None and again.base is not None:
        findings.notes.append("what was not merged was compared with the base, as far as it keeps its dtype")


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


def _shard_file(shard: Stored, planned: _Planned, recorded: Mapping[str, str]) -> ShardFile:
    plans = planned.of(shard)
    pieces = tuple(Piece(name, info, _fitting(plans.get(name), info)) for name, info in shard.tensors.items())
    return ShardFile(shard.name, shard.file, shard.data_start, pieces, recorded)


def _fitting(plan: TensorPlan | None, info: TensorInfo) -> TensorPlan | None:
    """What a tensor must be, also where it is stored elsewhere than planned; None if it is another tensor."""
    if plan is None or (plan.out.dtype, plan.out.shape) != (info.dtype, info.shape):
        return None
    return dataclasses.replace(plan, out=info)


class _Planned:
    """The plan of each tensor. Without a plan of the merge, untouched tensors must be those of the base."""

    def __init__(self, again: Again, record: Record) -> None:
        self._shards = () if again.plan is None else again.plan.shards
        self._untouched = {} if again.plan or again.base is None else _untouched(again.base, record)

    def of(self, shard: Stored) -> Mapping[str, TensorPlan]:
        """The plans of a shard's tensors by name, in whatever shard they are planned.

        Only those are made: the plans of a large model take 100 MB together.
        """
        found = {name: self._untouched[name] for name in shard.tensors.keys() & self._untouched.keys()}
        # Its own shard has them all, but in an output that was changed.
        for planned in sorted(self._shards, key=lambda planned: planned.name != shard.name):
            if found.keys() >= shard.tensors.keys():
                break
            plans = ((next(tensor.outputs())[0], tensor) for tensor in planned.tensors)
            found |= {name: tensor for name, tensor in plans if name in shard.tensors}
        return found


def _untouched(base: Checkpoint, record: Record) -> dict[str, TensorPlan]:
    worked_on = {ref.extent for name in record.targets if name in base.weights for _, ref in base.weights[name].parts}
    refs = (ref for shard in base.shards for ref in shard.tensors if ref.extent not in worked_on)
    return {ref.name: TensorPlan(ref, TensorInfo(ref.dtype, ref.shape, (0, ref.nbytes))) for ref in refs}
