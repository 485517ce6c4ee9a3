"""Config and headers → a `MergePlan`, or a `PlanError` with every reason why not.

No tensor data is read here, nothing is written, and torch is not imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shardmerge.adapters.work import tile_dtype
from shardmerge.codecs.registry import encoder
from shardmerge.config.schema import AdapterConfig, MergeConfig
from shardmerge.destinations.destination import open_destination
from shardmerge.errors import FormatError, PlanError
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.key_mapping.table import table
from shardmerge.planning.aux_files import AuxFiles, collect
from shardmerge.planning.changes import Changes, changes_of
from shardmerge.planning.fingerprint import fingerprint_of
from shardmerge.planning.layout import Layout, lay_out
from shardmerge.planning.layouts import LAYOUTS, LaidOut
from shardmerge.planning.opening import check_device, open_all
from shardmerge.planning.quantised_output import QuantisedOutput, quantised_output
from shardmerge.planning.tiling import tile_all
from shardmerge.planning.totals import bytes_read, totals_of
from shardmerge.planning.trained_on import another_than
from shardmerge.spec.notices import Warned
from shardmerge.spec.packed import moved
from shardmerge.spec.plans import (
    AdapterInfo,
    MergePlan,
    ShardPlan,
    TensorPlan,
)
from shardmerge.spec.tensors import DTYPE_BITS, FLOAT_DTYPES, Encoding, dtype_code
from shardmerge.spec.words import words_for
from shardmerge.system.events import Stopwatch, event
from shardmerge.system.garbage import give_back, no_garbage_collection


def make_plan(config: MergeConfig, overwrite: bool = False, *, check_output: bool = True) -> MergePlan:
    """Decide everything about a merge; without ``check_output``, of one that is done already.

    Raises `PlanError` with all problems; `FormatError` or `SourceError` where the base or an adapter cannot be read.
    """
    try:
        watch = Stopwatch()
        table()  # stays, so it is made before what goes: see `moved`
        with no_garbage_collection():
            plan = moved(partial(_make_plan, config, overwrite, check_output))
        give_back()  # what a plan of 45,000 targets leaves free is 46 MB, which torch would not get
        _planned(plan, watch.lap())
        return plan
    except PlanError as error:
        raise PlanError(error.problems, f"the {words_for(config.adapters).noun}") from None


def _make_plan(config: MergeConfig, overwrite: bool, check_output: bool) -> MergePlan:
    checkpoint, adapters = open_all(config, overwrite, check_output)
    destination = open_destination(config.output.path, overwrite)
    changes = changes_of(checkpoint, adapters, config)
    quantised = quantised_output(checkpoint, changes.updates, config.output)
    changes.config.update(quantised.config)
    stored = _as_checkpoint(config, checkpoint, changes, quantised)
    aux = _aux_files(config, checkpoint, adapters, changes)
    laid_out = _laid_out(config, stored, changes, aux, Path(destination.location).name)
    shards, unrounded = _rounded(config, laid_out.layout.shards)
    limits = [None if limit == "auto" else limit for limit in (config.compute.max_memory, config.compute.threads)]
    shards, memory = tile_all(shards, dtype_code(config.compute.dtype), *limits)
    plan = MergePlan(
        base=checkpoint.info(),
        adapters=tuple(_adapter_info(entry, adapter) for entry, adapter in adapters),
        output=destination.location,
        output_dtype=config.output.dtype,
        compute_dtype=config.compute.dtype,
        compute_device=config.compute.device,
        shards=shards,
        index_name=laid_out.layout.index_name,
        index_metadata=tuple(_index_metadata(checkpoint, stored).items()),
        aux=laid_out.aux,
        memory=memory,
        totals=totals_of(shards),
        bytes_read=bytes_read(shards),
        bytes_written=sum(shard.nbytes for shard in shards) + sum(file.nbytes for file in laid_out.aux),
        warnings=(
            *changes.notes,
            *quantised.notes,
            *_warnings(config, checkpoint, adapters),
            *aux.warnings,
            *laid_out.warnings,
        ),
        overwrite=overwrite,
        config=config.model_dump(mode="json"),
        fingerprint={},
    )
    problems = [*changes.problems, *quantised.problems, *aux.unfit, *aux.problems, *laid_out.problems, *unrounded]
    problems += [] if problems else _memory_problems(plan)
    if check_output:
        problems += _rounding_problems(plan) + check_device(plan.compute_device) + destination.problems(plan)
    if problems:
        raise PlanError(problems)
    fingerprint = fingerprint_of(plan, checkpoint, laid_out.made_of)
    return dataclasses.replace(plan, shards=tuple(shard.packed() for shard in shards), fingerprint=fingerprint)


def _planned(plan: MergePlan, seconds: float) -> None:
    """A plan was made."""
    words, updated = words_for(plan.adapters), plan.totals.updated
    event(
        "planned",
        f"planned in {seconds:.1f} s: {words.noun} of {plan.base.location} into {plan.output}, "
        f"{len(plan.shards)} shards, {updated} tensors with updates",
        kind=words.noun,
        seconds=seconds,
        output=plan.output,
        digest=plan.digest,
        config=plan.config,
        shards=len(plan.shards),
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        updated=updated,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        memory=plan.memory.total,
    )


# --- settings that only the whole plan can judge ----------------------------------------------------------------------


def _memory_problems(plan: MergePlan) -> list[str]:
    """Whether the memory that the config allows is enough."""
    allowed = plan.config["compute"]["max_memory"]
    if allowed == "auto" or plan.memory.total <= allowed:
        return []
    return [
        f"compute.max_memory is {allowed:,} bytes, but the largest layer needs {plan.memory.total:,} to work on at "
        "least 16 of its rows at a time; give at least that"
    ]


def _rounding_problems(plan: MergePlan) -> list[str]:
    """Whether stochastic rounding was asked for where no updated weight is rounded at all."""
    if plan.rounding != "stochastic":
        return []
    compute_dtype = dtype_code(plan.compute_dtype)
    updated = [tensor for shard in plan.shards for tensor in shard.tensors if tensor.updates]
    kinds = {(tile_dtype(tensor, compute_dtype), encoder(tensor).rounds_to(tensor)) for tensor in updated}
    if not kinds or any(DTYPE_BITS[to] < DTYPE_BITS[of] for of, to in kinds):
        return []
    of, to = min(kinds)
    return [
        f"output.rounding: stochastic has no effect: updated weights are computed in {of} and stored in {to}, so none "
        "is rounded; remove it, or give a narrower output.dtype"
    ]


# --- the output's files -----------------------------------------------------------------------------------------------


def _as_checkpoint(config: MergeConfig, checkpoint: Checkpoint, changes: Changes, quantised: QuantisedOutput) -> Layout:
    """The output as a checkpoint; its dtype and the name of its main file come to the ``changes`` of config.json."""
    dtype = "same" if config.output.dtype == "same" else dtype_code(config.output.dtype)
    max_shard_size = None if config.output.max_shard_size == "same" else config.output.max_shard_size
    left_out = {*changes.left_out, *quantised.left_out}
    layout = lay_out(checkpoint, dtype, max_shard_size, changes.updates, changes.added, left_out, quantised.encodings)
    tensors = (tensor for shard in layout.shards for tensor in shard.tensors)
    if dtype != "same" and any(tensor.source.dtype != tensor.out.dtype for tensor in tensors):
        changes.config["dtype"] = config.output.dtype
    main = layout.index_name or layout.shards[0].name
    if checkpoint.config.get("transformers_weights") not in (None, main):
        changes.config["transformers_weights"] = main
    return layout


def _aux_files(
    config: MergeConfig,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[AdapterConfig, AdapterFile]],
    changes: Changes,
) -> AuxFiles:
    """The files beside the weights."""
    try:
        return collect(checkpoint, adapters, changes.config, LAYOUTS[config.output.format].copies_weights)
    except FormatError as error:
        raise FormatError(f"{error}. Nothing was written") from None


def _laid_out(config: MergeConfig, stored: Layout, changes: Changes, aux: AuxFiles, name: str) -> LaidOut:
    """All files of an output called ``name``."""
    if aux.unfit:
        return LaidOut(stored, tuple(aux.files))
    return LAYOUTS[config.output.format].lay_out(stored, changes.updates, aux, name, config.output)


def _rounded(config: MergeConfig, shards: Sequence[ShardPlan]) -> tuple[Sequence[ShardPlan], list[str]]:
    """The shards, whose updated weights are rounded as the config says; and which of them cannot be."""
    if config.output.rounding != "stochastic":
        return shards, []
    problems: list[str] = []

    def rounded(tensor: TensorPlan) -> TensorPlan:
        if not tensor.updates or (tensor.encoding is None and tensor.out.dtype not in FLOAT_DTYPES):
            return tensor
        codec = encoder(tensor)
        encoding = codec.stochastic(tensor.encoding or Encoding(codec.name), config.output.seed)
        if encoding is None:
            what = f"{tensor.source.name} is stored as {codec.name}"
            problems.append(f"output.rounding: stochastic cannot be used: {what}, which is rounded to nearest only")
            return tensor
        return dataclasses.replace(tensor, encoding=encoding)

    return [dataclasses.replace(shard, tensors=tuple(map(rounded, shard.tensors))) for shard in shards], problems


def _index_metadata(checkpoint: Checkpoint, layout: Layout) -> dict[str, Any]:
    """The metadata of the base's index, in which a number of parameters follows what was added or resized.

    transformers counts a model's parameters, which need not be the elements that are stored, so the difference counts.
    """
    metadata = dict(checkpoint.index_metadata)
    if type(count := metadata.get("total_parameters")) is int:
        before = sum(math.prod(weight.tensor.shape) for weight in checkpoint.weights.values())
        now = sum(math.prod(tensor.out.shape) for shard in layout.shards for tensor in shard.tensors)
        metadata["total_parameters"] = count + now - before
    return metadata


# --- what a plan says of its sources --------------------------------------------------------------------------------


def _adapter_info(entry: AdapterConfig, adapter: AdapterFile) -> AdapterInfo:
    kind = adapter.format(entry.format)
    return AdapterInfo(
        location=adapter.source.location,
        revision=adapter.source.revision,
        format=kind,
        family=adapter.family,
        weight=entry.weight,
        nbytes=sum(file.size for file in adapter.files) + sum(of.file.size for of in adapter.beside),
        tensors=len(adapter.tensors) + sum(len(of.tensors) for of in adapter.beside),
        trained_on=adapter.trained_on,
        files=adapter.all_files,
    )


def _warnings(
    config: MergeConfig,
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[AdapterConfig, AdapterFile]],
) -> list[str]:
    warnings: list[str] = []
    for entry, adapter in adapters:
        trained_on = adapter.trained_on
        if trained_on and config.base != "auto" and (why := another_than(trained_on, checkpoint)):
            text = f"adapter {entry.path} says it was trained on {trained_on}, not on {config.base}: {why}"
            warnings.append(Warned(text))
    warnings += checkpoint.notes
    for source in (checkpoint.source, *(adapter.source for _, adapter in adapters)):
        if source.note:
            warnings.append(Warned(source.note))
    if config.compute.dtype == "bfloat16":
        rounds = "compute.dtype bfloat16 rounds the update before it is added; float32 rounds only the result"
        warnings.append(Warned(rounds))
    return warnings
