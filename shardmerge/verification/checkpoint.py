"""Prove a checkpoint: headers and index, config.json, and then every shard in one pass.

All but the last is done without torch: for the headers of a large model and torch together there may not be memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardmerge.codecs.registry import CODECS
from shardmerge.destinations.record import Record
from shardmerge.errors import SourceError
from shardmerge.sources.source import read_file
from shardmerge.spec.tensors import TensorInfo
from shardmerge.system import json_text
from shardmerge.system.garbage import give_back
from shardmerge.verification.files import check_added, check_files
from shardmerge.verification.findings import Advanced, Findings
from shardmerge.verification.record import Again
from shardmerge.verification.structure import Stored, check_config, check_structure, contradictions, read_shards


def check(output: Path, record: Record, again: Again, findings: Findings, rows: int | None, progress: Advanced) -> None:
    """Verify the whole output; problems go to ``findings``. ``rows`` None computes all rows again."""
    stored = read_shards(output, record, findings)
    check_files(output, record, again.plan, findings)
    check_structure(output, record, stored, again.plan, _called(again), findings)
    _check_config(output, record, stored, again, findings)
    check_added(output, record, findings)
    give_back()
    from shardmerge.verification.contents import check_shards  # imports torch

    check_shards(output, stored, record, again, findings, rows, progress)


def _called(again: Again) -> dict[str, str]:
    """The names of the values of weights that are not stored plainly, by the weight's name."""
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
    """Contradictions in the base's own config.json; None where the base is not there."""
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
