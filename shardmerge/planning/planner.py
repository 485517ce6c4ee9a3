"""Config and headers → a `MergePlan`, or a `PlanError` with every reason why not.

No tensor data is read here, nothing is written, and torch is not imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.registry import encoder
from shardmerge.config.schema import AdapterConfig, MergeConfig
from shardmerge.destinations.destination import open_destination
from shardmerge.errors import FormatError, PlanError
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.checkpoint_files import Shard
from shardmerge.key_mapping.names import Names
from shardmerge.key_mapping.table import table
from shardmerge.planning import aux_files, steps
from shardmerge.planning.heads import resolve_heads
from shardmerge.planning.layout import Layout, lay_out
from shardmerge.planning.layouts import LAYOUTS, Placed
from shardmerge.planning.match import match
from shardmerge.planning.opening import open_all
from shardmerge.planning.settings import check_device, check_rounding
from shardmerge.planning.several import undone
from shardmerge.planning.tied import resolve_ties
from shardmerge.planning.tiling import tile_all
from shardmerge.planning.totals import bytes_read, totals_of
from shardmerge.planning.trained_on import another_than
from shardmerge.planning.vocabulary import resized
from shardmerge.spec.notices import Warned
from shardmerge.spec.packed import moved
from shardmerge.spec.plans import (
    AdapterInfo,
    Fingerprint,
    MergePlan,
    ShardPlan,
    TensorPlan,
    digest_of,
    jsonable,
)
from shardmerge.spec.tensors import FLOAT_DTYPES, Encoding, SourceFile, TensorRef, dtype_code
from shardmerge.spec.updates import Place, Update
from shardmerge.spec.words import words_for
from shardmerge.system.events import Stopwatch
from shardmerge.system.garbage import give_back, no_garbage_collection
from shardmerge.version import __version__

#: Raised when the same plan comes to mean other bytes, so that unfinished work of an older version is not mixed in.
_DIGEST_VERSION = 5


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
        steps.planned(plan, watch.lap())
        return plan
    except PlanError as error:
        raise PlanError(error.problems, f"the {words_for(config.adapters).noun}") from None


def _make_plan(config: MergeConfig, overwrite: bool, check_output: bool) -> MergePlan:
    checkpoint, adapters = open_all(config, overwrite, check_output)
    dtype = "same" if config.output.dtype == "same" else dtype_code(config.output.dtype)
    compute_dtype = dtype_code(config.compute.dtype)
    destination = open_destination(config.output.path, overwrite)

    names = _names(checkpoint, checkpoint.config.get("architectures"))
    matches = match(checkpoint, names, adapters)
    heads = resolve_heads(checkpoint, names, matches, adapters)
    if heads.architecture is not None:  # what is tied in the output is what that class ties
        names = _names(checkpoint, [heads.architecture])
    untied = resolve_ties(
        checkpoint, names, matches.updates, [adapter.config or {} for _, adapter in adapters], config.tied
    )
    vocabulary, misfits = resized(checkpoint, matches.updates, untied.added, heads.left_out)
    problems = [*checkpoint.problems, *matches.problems, *heads.problems, *undone(matches.updates, config.adapters)]
    problems += [*untied.problems, *misfits]
    changes = {**untied.changes, **heads.changes}
    if vocabulary is not None:
        changes["vocab_size"] = vocabulary
    output_layout = LAYOUTS[config.output.format]
    max_shard_size = None if config.output.max_shard_size == "same" else config.output.max_shard_size
    added = [*untied.added, *heads.added]
    replaced, worked_on = _replaced(matches.updates), {name for name, of in matches.updates.items() if of}
    layout = lay_out(checkpoint, dtype, max_shard_size, replaced, added, heads.left_out, worked_on)
    if dtype != "same" and _changes_dtype(layout.shards):
        changes["dtype"] = config.output.dtype
    if (weights := _renamed_weights(checkpoint, layout)) is not None:
        changes["transformers_weights"] = weights
    try:
        aux = aux_files.collect(checkpoint, adapters, changes, output_layout.copies_weights)
    except FormatError as error:
        raise FormatError(f"{error}. Nothing was written") from None
    problems += [*aux.unfit, *aux.problems]
    index_metadata = _index_metadata(checkpoint, layout)
    placed = Placed(layout, tuple(aux.files))
    if not aux.unfit:
        placed = output_layout.place(layout, matches.updates, aux, Path(destination.location).name, config.output)
    layout, problems = placed.layout, [*problems, *placed.problems]
    aux.files[:] = placed.aux
    aux.warnings += placed.warnings
    max_memory = None if config.compute.max_memory == "auto" else config.compute.max_memory
    seed = config.output.seed if config.output.rounding == "stochastic" else None
    with_updates, unrounded = _with_updates(layout.shards, matches.updates, seed)
    problems += unrounded
    threads = None if config.compute.threads == "auto" else config.compute.threads
    shards, memory = tile_all(with_updates, compute_dtype, max_memory, threads)
    if max_memory is not None and memory.total > max_memory and not problems:
        problems.append(
            f"compute.max_memory is {max_memory:,} bytes, but the largest layer needs {memory.total:,} to work on at "
            "least 16 of its rows at a time; give at least that"
        )
    written = sum(shard.nbytes for shard in shards) + sum(file.nbytes for file in aux.files)
    infos = tuple(_adapter_info(entry, adapter) for entry, adapter in adapters)
    plan = MergePlan(
        base=checkpoint.info(),
        adapters=infos,
        output=destination.location,
        output_dtype=config.output.dtype,
        compute_dtype=config.compute.dtype,
        compute_device=config.compute.device,
        shards=shards,
        index_name=layout.index_name,
        index_metadata=tuple(index_metadata.items()),
        aux=tuple(aux.files),
        memory=memory,
        totals=totals_of(shards),
        bytes_read=bytes_read(shards),
        bytes_written=written,
        warnings=(
            *heads.notes,
            *untied.notes,
            *matches.warnings,
            *_warnings(config, checkpoint, adapters),
            *aux.warnings,
        ),
        overwrite=overwrite,
        config=config.model_dump(mode="json"),
        fingerprint={},
    )
    if check_output:
        problems += check_rounding(config, shards, compute_dtype) + check_device(config.compute.device)
        problems += destination.problems(plan)
    if problems:
        raise PlanError(problems)
    fingerprint = _fingerprint(plan, checkpoint, placed.made_of)
    return dataclasses.replace(plan, shards=tuple(shard.packed() for shard in shards), fingerprint=fingerprint)


def _names(checkpoint: Checkpoint, architectures: Any) -> Names:
    config = {**checkpoint.config, "architectures": architectures}
    return Names(config, {name: weight.tensor.shape for name, weight in checkpoint.weights.items()})


# --- assembling -------------------------------------------------------------------------------------------------------


def _with_updates(
    shards: Sequence[ShardPlan], updates: Mapping[str, list[Update]], seed: int | None
) -> tuple[list[ShardPlan], list[str]]:
    """The shards with their updates, rounded stochastically if there is a ``seed``; and what cannot be rounded so."""
    problems: list[str] = []

    def updated(tensor: TensorPlan) -> TensorPlan:
        if not (of := updates.get(tensor.source.name)):
            return tensor
        encoding = tensor.encoding
        if seed is not None and (encoding is not None or tensor.out.dtype in FLOAT_DTYPES):
            codec = encoder(tensor)
            encoding = codec.stochastic(encoding or Encoding(codec.name), seed)
            if encoding is None:
                encoding = tensor.encoding
                what = f"{tensor.source.name} is stored as {codec.name}"
                problems.append(f"output.rounding: stochastic cannot be used: {what}, which is rounded to nearest only")
        return dataclasses.replace(tensor, updates=tuple(of), encoding=encoding)

    done = [dataclasses.replace(shard, tensors=tuple(map(updated, shard.tensors))) for shard in shards]
    return done, problems


def _replaced(updates: Mapping[str, Sequence[Update]]) -> dict[str, TensorRef]:
    """Stored tensors for which an adapter has a whole one, as tensors of the base's name."""
    return {
        target: dataclasses.replace(update.factor("whole"), name=target)
        for target, of in updates.items()
        for update in of
        if FAMILIES[update.family].is_source
    }


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


def _renamed_weights(checkpoint: Checkpoint, layout: Layout) -> str | None:
    """What config.json must name as the model's weights, where it names a file that the output has not."""
    main = layout.index_name or layout.shards[0].name
    named = checkpoint.config.get("transformers_weights")
    return None if named is None or named == main else main


def _changes_dtype(shards: Sequence[ShardPlan]) -> bool:
    return any(tensor.source.dtype != tensor.out.dtype for shard in shards for tensor in shard.tensors)


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


def _fingerprint(plan: MergePlan, checkpoint: Checkpoint, made_of: Mapping[str, str]) -> Fingerprint:
    """What the output's bytes depend on: sources as they are now, as far as headers tell, and how they are computed.

    ``made_of`` are checksums of files whose contents the plan has put into the output's headers. Where the output goes
    and what memory may be taken are no part of it.
    """

    def stamp(file: SourceFile) -> list[Any]:
        return [file.uri, file.size, file.mtime_ns]

    def where(place: Place) -> list[Any]:
        return [place.rows, place.start, place.stored_start, place.expert, place.transposed, place.shuffle]

    updates = [
        [
            *[tensor.source.name, update.adapter, update.family, update.module, update.scaling, update.rank],
            *[update.transposes, *where(update.place), _settings_of(update)],
        ]
        for tensor, update in plan.updates()
    ]
    output = [
        [[shard.name, shard.nbytes] for shard in plan.shards],
        *[plan.index_name, plan.output_dtype, plan.compute_dtype, plan.compute_device],
    ]
    return {
        "base": {
            "index": digest_of([checkpoint.index_name, jsonable(plan.index_metadata)]),
            **{shard.name: digest_of([stamp(shard.file), *_header(shard)]) for shard in checkpoint.shards},
        },
        "adapters": {
            str(number): digest_of([info.format, *map(stamp, info.files)]) for number, info in enumerate(plan.adapters)
        },
        "files": {**made_of, **{aux.name: digest_of([stamp(aux.source), aux.content]) for aux in plan.aux}},
        "config": dict(_settings(plan.config)),
        "program": {"shardmerge": __version__, "format": _DIGEST_VERSION},
        "work": {"updates": digest_of(updates), "output": digest_of(output)},
    }


def _settings_of(update: Update) -> list[Any] | None:
    """The method's settings of an update, with what they are called."""
    return None if update.settings is None else [type(update.settings).__name__, jsonable(update.settings)]


def _header(shard: Shard) -> list[Any]:
    return [shard.metadata, [[ref.name, ref.dtype, ref.shape, ref.offset] for ref in shard.tensors]]


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the config says of the output's bytes, by dotted path."""
    for number, adapter in enumerate(config["adapters"]):
        yield from ((f"adapters.{number}.{key}", value) for key, value in adapter.items() if key != "path")
    yield from ((f"output.{key}", value) for key, value in config["output"].items() if key not in ("path", "sha256"))
    yield from ((f"compute.{key}", value) for key, value in config["compute"].items() if key in ("device", "dtype"))
    yield from ((key, value) for key, value in config.items() if key not in ("base", "adapters", "output", "compute"))
