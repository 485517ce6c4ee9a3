"""The base and the adapters of a finished merge, from its record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardmerge.config.recorded import recorded_config, relocated
from shardmerge.config.schema import AdapterConfig
from shardmerge.destinations.record import RECORD_NAME, open_record
from shardmerge.errors import ConfigError, FormatError, SourceError
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.file_formats.checkpoint import open_checkpoint
from shardmerge.sources.source import Source, open_source

#: Suffixes of the files of a Hub repo that transformers needs to load a model, apart from its weights.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")


@dataclass(frozen=True, slots=True)
class Origin:
    """Base and adapters of a merge, at the places that its record or the caller names, and how they were applied."""

    base: str
    adapters: tuple[AdapterConfig, ...]
    #: The weights that the merge updated, by their names in the output.
    targets: frozenset[str]
    #: What the base's weights were rounded through before they were updated, or ``none``.
    base_rounding: str = "none"

    def base_folder(self) -> Path:
        """The base's directory; of a Hub repo, its folder in the cache. Raises `SourceError` or `ConfigError`."""
        source = open_recorded("base", "base", self.base).directory()
        names = source.names()
        if "config.json" not in names:
            raise ConfigError(
                f"{source.location}: the base has no config.json, so transformers cannot load it; base= may name "
                "another directory with the same weights"
            )
        for shard in open_checkpoint(source).shards:
            source.fetch(shard.file.uri.rpartition("/")[2])
        for name in names:
            if "/" not in name and name.endswith(_BESIDE):
                source.fetch(name)
        return source.fetch("config.json").parent

    def open_adapters(self) -> Iterator[tuple[AdapterFile, AdapterConfig]]:
        """The adapters in the order in which they were applied."""
        of_base = {shard.file.uri for shard in open_checkpoint(open_recorded("base", "base", self.base)).shards}
        for entry in self.adapters:
            adapter = open_adapter(open_recorded("adapter", "adapters", entry.path), entry.ignore_files)
            yield adapter.apart_from(of_base), entry


def read_origin(output: Path, base: str | None = None, adapters: Sequence[str] = ()) -> Origin:
    """The origin of the merge in ``output``; ``base`` and ``adapters`` (all of them) are where those are now.

    Raises `SourceError` if there is no such directory, `FormatError` if no record of a finished merge is in it,
    `ConfigError` where the number of adapters is another.
    """
    record = open_record(output)
    try:
        config = recorded_config(record.values.get("config"), RECORD_NAME)
    except ConfigError as error:
        raise FormatError(f"{output}: the config in {RECORD_NAME} is damaged: {error}") from None
    config = relocated(config, record.values, base, adapters)
    return Origin(config.base, config.adapters, frozenset(record.targets), config.base_rounding)


def stored_dtypes(output: Path, names: frozenset[str]) -> set[str]:
    """The dtypes of these weights of a checkpoint, by safetensors' names."""
    weights = open_checkpoint(open_source(str(output))).weights
    return {weight.tensor.dtype for name, weight in weights.items() if name in names}


def open_recorded(what: str, parameter: str, place: str) -> Source:
    """Open a base or an adapter of a merge. The `SourceError` names the ``parameter`` for its new place."""
    try:
        return open_source(place)
    except SourceError as error:
        raise SourceError(
            f"the {what} is not there: {error}; if it was moved, {parameter}= says where it is now"
        ) from None
