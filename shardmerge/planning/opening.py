"""Open the base and the adapters of a config, or report every reason known by then why they cannot be merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from shardmerge.adapters.registry import are_factors, are_weights
from shardmerge.config.schema import AdapterConfig, MergeConfig
from shardmerge.destinations.destination import open_destination
from shardmerge.destinations.record import RECORD_NAME, is_unfinished
from shardmerge.errors import FormatError, MissingError, OtherKindError, PlanError, ShardmergeError
from shardmerge.file_formats import recognise
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.file_formats.checkpoint import Checkpoint, open_checkpoint
from shardmerge.sources.source import Source, open_source
from shardmerge.spec.tensors import SourceFile
from shardmerge.system.events import Stopwatch, event

Opened = TypeVar("Opened")
Adapters = list[tuple[AdapterConfig, AdapterFile]]

_SWAPPED = "base and adapter are swapped: {base} is an adapter, and {adapter} is a model"


def open_all(config: MergeConfig, overwrite: bool, check_output: bool) -> tuple[Checkpoint, Adapters]:
    """Open the base and every adapter.

    Raises `PlanError` where a place is not there, or where several things are wrong: with all of it, and with what is
    known without what is missing. Anything else that is wrong alone keeps its own class.
    """
    errors: list[ShardmergeError] = []

    def attempt(opening: Callable[[], Opened], what: str) -> Opened | None:
        try:
            return opening()
        except MissingError as error:
            errors.append(MissingError(f"{what} {error}"))
        except ShardmergeError as error:
            errors.append(error)
        return None

    adapters: Adapters = []
    watch = Stopwatch()
    for entry in config.adapters:
        adapter = attempt(lambda entry=entry: _adapter(entry), "adapter")  # type: ignore[misc]
        if adapter is not None:
            adapters.append((entry, adapter))
            _opened("adapter", adapter.source, len(adapter.tensors), adapter.files, watch)
    checkpoint = None
    if config.base != "auto" or not errors:
        what = "base: auto: the adapter names" if config.base == "auto" else "base"
        checkpoint = attempt(lambda: _base(_base_location(config, adapters)), what)
    if errors or checkpoint is None:
        raise _all_of(errors, config, adapters, overwrite, check_output)
    files = [shard.file for shard in checkpoint.shards]
    _opened("base", checkpoint.source, len(checkpoint.weights), files, watch)
    of_base = {shard.file.uri for shard in checkpoint.shards}
    return checkpoint, [(entry, adapter.apart_from(of_base)) for entry, adapter in adapters]


def _all_of(
    errors: Sequence[ShardmergeError], config: MergeConfig, adapters: Adapters, overwrite: bool, check_output: bool
) -> ShardmergeError:
    """One error of all. A place that is not there is a refusal of the plan, alone or not."""
    if len(errors) == 1 and not isinstance(errors[0], MissingError):
        alone = errors[0]
        return alone if isinstance(alone, PlanError) else type(alone)(f"{alone}. Nothing was written")
    problems = [problem for error in errors for problem in error.problems]
    mixed_up = sum(isinstance(error, OtherKindError) for error in errors)
    if mixed_up == 2 and len(config.adapters) == 1:
        problems.insert(0, _SWAPPED.format(base=config.base, adapter=config.adapters[0].path))
    problems += _refused_anyway(adapters)
    if check_output:
        problems += check_device(config.compute.device)
        problems += open_destination(config.output.path, overwrite).problems()
    return PlanError(problems)


def _refused_anyway(adapters: Adapters) -> list[str]:
    """Why adapters cannot be merged into any base."""
    all_claims = ((entry, adapter.claims(entry)) for entry, adapter in adapters)
    return [
        f"adapter {entry.path}: {text}" for entry, claims in all_claims if claims.refused for text in claims.problems
    ]


def _adapter(entry: AdapterConfig) -> AdapterFile:
    source = open_source(entry.path)
    adapter = _or_unfinished(source, lambda: open_adapter(source, entry.ignore_files))
    if adapter.config is None and not entry.prefix and are_weights(adapter.tensors):
        names = source.directory().names()
        known = recognise.other_than_adapter(names) if RECORD_NAME in names else ""
        raise OtherKindError(f"{source.location}: {known or recognise.IS_MODEL}")
    return adapter


def _base(location: str) -> Checkpoint:
    source = open_source(location)
    checkpoint = _or_unfinished(source, lambda: open_checkpoint(source))
    if are_factors(checkpoint.weights):
        raise OtherKindError(f"{source.location}: {recognise.IS_ADAPTER}")
    return checkpoint


def _or_unfinished(source: Source, opening: Callable[[], Opened]) -> Opened:
    """The result of ``opening``; an unfinished merge in the directory is reported as the cause if that fails."""
    try:
        return opening()
    except FormatError as error:
        folder = source.local_path
        if folder is not None and source.directory() is source and is_unfinished(folder):
            raise FormatError(
                f"{source.location}: holds a merge that was not finished; finish it by running the same command again"
            ) from None
        raise error


def _base_location(config: MergeConfig, adapters: Sequence[tuple[AdapterConfig, AdapterFile]]) -> str:
    if config.base != "auto":
        return config.base
    named = {adapter.trained_on: entry.path for entry, adapter in adapters if adapter.trained_on}
    if len(named) == 1:
        return next(iter(named))
    if named:
        found = "; ".join(f"{path} was trained on {base}" for base, path in named.items())
        raise PlanError([f"base: auto: the adapters name different bases ({found}); give the base's path"])
    raise PlanError(["base: auto: no adapter says what it was trained on; give the base's path"])


def _opened(what: str, source: Source, tensors: int, files: Sequence[SourceFile], watch: Stopwatch) -> None:
    """The headers of a base or an adapter were read."""
    size, seconds = sum(file.size for file in files), watch.lap()
    event(
        f"{what}-opened",
        f"opened the {what} {source.location}: {tensors} tensors, {len(files)} files, {size:,} bytes, {seconds:.1f} s",
        location=source.location,
        revision=source.revision,
        tensors=tensors,
        files=len(files),
        bytes=size,
        seconds=seconds,
    )


def check_device(name: str) -> list[str]:
    """Whether a device is there. torch takes a second to import, so it is asked only where it is not the CPU."""
    if name in ("auto", "cpu"):
        return []
    from shardmerge.system import torch_devices

    return list(filter(None, [torch_devices.missing(name)]))
