"""Verify a checkpoint: headers and index, config.json, and then every shard in one pass.

Only the last step imports torch: the headers of a large model and torch together may not fit into memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardmerge.codecs.registry import CODECS
from shardmerge.destinations.record import Record
from shardmerge.errors import SourceError
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.sources.source import read_file
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import TensorInfo
from shardmerge.system import json_text
from shardmerge.system.events import Stopwatch, event
from shardmerge.system.garbage import give_back
from shardmerge.verification.files import check_added, check_files
from shardmerge.verification.findings import Advanced, Findings
from shardmerge.verification.record import Again, files_of
from shardmerge.verification.structure import (
    Stored,
    ask_library,
    check_config,
    check_structure,
    contradictions,
    read_shards,
)


def check(output: Path, record: Record, again: Again, findings: Findings, rows: int | None, progress: Advanced) -> None:
    """Verify the whole output; problems go to ``findings``. ``rows`` None computes all rows again."""
    stored = read_shards(output, record, findings)
    check_files(output, record, again.plan, findings)
    check_structure(output, record, stored, again.plan, _called(again), findings)
    _check_config(output, record, stored, again, findings)
    check_added(output, record, findings)
    give_back()
    _check_shards(output, stored, record, again, findings, rows, progress)


def _called(again: Again) -> dict[str, str]:
    """The stored names of the values of encoded weights, by the weight's name."""
    if again.plan is not None:
        tensors = (tensor for shard in again.plan.shards for tensor in shard.tensors)
        return {tensor.source.name: tensor.values_name for tensor in tensors if tensor.values_name}
    coded = [] if again.base is None else [weight for weight in again.base.weights.values() if weight.stored_as]
    return {
        weight.name: CODECS[weight.stored_as.codec].outputs(weight.name, weight.tensor.shape, weight.stored_as)[0].name
        for weight in coded
        if weight.stored_as
    }


def _check_config(output: Path, record: Record, stored: Sequence[Stored], again: Again, findings: Findings) -> None:
    config = record.values.get("config")
    section = config.get("output") if isinstance(config, dict) else None
    dtype = section.get("dtype") if isinstance(section, dict) else "same"
    check_config(output, stored, _contradictions_of_base(again), dtype != "same", findings)


def _contradictions_of_base(again: Again) -> dict[str, str] | None:
    """Contradictions in the base's own config.json; None where the base is not available."""
    if again.plan is None:
        return None
    aux = next((aux for aux in again.plan.aux if aux.name == "config.json"), None)
    if aux is None:
        return None
    try:
        config = json_text.parse_object(read_file(aux.source, json_text.MAX_BYTES))
    except (SourceError, json_text.JsonError):
        return None
    tensors = {
        tensor.source.name: TensorInfo(tensor.source.dtype, tensor.source.shape, (0, tensor.source.nbytes))
        for shard in again.plan.shards
        for tensor in shard.tensors
    }
    return dict(contradictions(config, tensors))


def _check_shards(
    output: Path,
    stored: Sequence[Stored],
    record: Record,
    again: Again,
    findings: Findings,
    rows: int | None,
    progress: Advanced,
) -> None:
    from shardmerge.verification.exact import Exact  # these import torch
    from shardmerge.verification.reading import Files, threads
    from shardmerge.verification.shards import ShardCheck

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
                shard_check.run(shard, planned.of(shard), recorded, advance)
            seconds, problems = watch.lap(), sum(findings.counts.values())
            text = f"verified {shard.name} in {seconds:.1f} s; problems so far: {problems}"
            sizes = {"bytes": shard.file.size, "tensors": len(shard.tensors)}
            event("shard-verified", text, shard=shard.name, **sizes, problems=problems, seconds=seconds)
    if again.plan is None and again.base is not None:
        findings.notes.append("what was not merged was compared with the base, as far as it keeps its dtype")


class _Planned:
    """The plan of each tensor. Without a plan of the merge, only untouched tensors have one: the base's."""

    def __init__(self, again: Again, record: Record) -> None:
        self._shards = () if again.plan is None else again.plan.shards
        self._untouched = {} if again.plan or again.base is None else _untouched(again.base, record)

    def of(self, shard: Stored) -> Mapping[str, TensorPlan]:
        """The plans of a shard's tensors by name, whichever shard they are planned in, with ``out`` as it was found.

        A tensor of another dtype or shape than planned has none. Only the shard's plans are made: those of a large
        model take 100 MB together.
        """
        found = {name: self._untouched[name] for name in shard.tensors.keys() & self._untouched.keys()}
        # The planned shard of this name has them all, unless the output was changed.
        for planned in sorted(self._shards, key=lambda planned: planned.name != shard.name):
            if found.keys() >= shard.tensors.keys():
                break
            plans = ((next(tensor.outputs())[0], tensor) for tensor in planned.tensors)
            found |= {name: tensor for name, tensor in plans if name in shard.tensors}
        fitting = {}
        for name, plan in found.items():
            info = shard.tensors[name]
            if (plan.out.dtype, plan.out.shape) == (info.dtype, info.shape):
                fitting[name] = dataclasses.replace(plan, out=info)
        return fitting


def _untouched(base: Checkpoint, record: Record) -> dict[str, TensorPlan]:
    touched = {ref.extent for name in record.targets if name in base.weights for _, ref in base.weights[name].parts}
    refs = (ref for shard in base.shards for ref in shard.tensors if ref.extent not in touched)
    return {ref.name: TensorPlan(ref, TensorInfo(ref.dtype, ref.shape, (0, ref.nbytes))) for ref in refs}
