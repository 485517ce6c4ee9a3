"""Reads the index and the headers of a base as weights. No tensor data is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shardmerge.codecs.codec import StoredTensors
from shardmerge.codecs.quantization import MODELOPT_SETTINGS, quantization
from shardmerge.codecs.registry import CODECS
from shardmerge.errors import FormatError
from shardmerge.file_formats.checkpoint_choice import Choice, choose
from shardmerge.file_formats.checkpoint_files import Shard, is_index, read_json, read_shard
from shardmerge.file_formats.model_config import setting
from shardmerge.sources.source import Source
from shardmerge.spec.plans import CheckpointInfo
from shardmerge.spec.tensors import TensorRef, Weight

#: Names that a message lists of many.
_SHOWN = 5
#: Endings of files that exist during a download.
_UNFINISHED = (".aria2", ".part", ".crdownload", ".incomplete")
#: Bytes of a tensor that holds settings, such as the JSON of bitsandbytes.
MAX_SMALL_BYTES = 4096
#: Of these tensors so many are read at a time.
_REQUESTS = 16


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stored base model."""

    source: Source
    shards: tuple[Shard, ...]
    weights: Mapping[str, Weight]
    index_name: str | None
    index_metadata: Mapping[str, Any]
    #: config.json; empty if it does not exist.
    config: Mapping[str, Any]
    #: How it is quantised, by config.json or a file beside it; empty if neither says so.
    quantization: Mapping[str, Any] = field(default_factory=dict)
    #: Notes on the choice of files.
    notes: tuple[str, ...] = ()
    #: Why encoded weights cannot be read.
    problems: tuple[str, ...] = ()

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def ties_embeddings(self) -> bool:
        """Whether transformers makes the output head share the input embedding when it loads this model."""
        return bool(setting(self.config, "tie_word_embeddings"))

    def info(self) -> CheckpointInfo:
        return CheckpointInfo(
            location=self.source.location,
            revision=self.source.revision,
            nbytes=sum(shard.file.size for shard in self.shards),
            shards=len(self.shards),
            tensors=len(self.weights),
            model_type=self.model_type,
            files=tuple(shard.file for shard in self.shards),
        )


def open_checkpoint(source: Source) -> Checkpoint:
    """Read the index and every header. Raises `FormatError` or `SourceError`."""
    directory = source.directory()
    names = source.names()
    if names and directory is not source and is_index(names[0]):
        raise FormatError(f"{source.location}: an index alone is not a model; give the directory {directory.location}")
    beside = directory.names()
    config = read_json(directory, "config.json") if "config.json" in beside else {}
    choice = choose(source, names, None if directory is not source else config.get("transformers_weights"))
    _refuse_unfinished(source, beside, choice)
    shards = tuple(read_shard(source, name) for name in choice.files)
    weights = _weights(source, shards)
    notes = (*choice.notes, *_check_index(source, choice, weights))
    settings = quantization(config) or _settings_beside(directory, beside)
    said = {**config, "quantization_config": settings} if settings else config
    tensors = {name: weight.tensor for name, weight in weights.items()}
    stored = StoredTensors(tensors, partial(_read_small, source, shards), [shard.metadata for shard in shards])
    logical, problems = _logical(weights, stored, said)
    index = choice.index_name, choice.index_metadata
    return Checkpoint(source, shards, logical, *index, config, settings, notes, problems)


def _settings_beside(directory: Source, names: Sequence[str]) -> Mapping[str, Any]:
    """Settings of a quantisation that config.json does not have: older files of modelopt."""
    found = read_json(directory, MODELOPT_SETTINGS).get("quantization") if MODELOPT_SETTINGS in names else None
    return {"quant_method": "modelopt", **found} if isinstance(found, dict) and found else {}


def _refuse_unfinished(source: Source, names: Sequence[str], choice: Choice) -> None:
    """aria2 and browsers write a file with holes at its full size, and another beside it until it is complete."""
    marks = [name + ending for name in choice.files for ending in _UNFINISHED]
    if found := sorted(set(marks).intersection(names)):
        raise FormatError(f"{source.location}: {found[0]} is there: the download of that file is incomplete; resume it")


def _weights(source: Source, shards: tuple[Shard, ...]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for shard in shards:
        for ref in shard.tensors:
            if ref.name in weights:
                raise FormatError(
                    f"{source.location}: the tensor {ref.name!r} is stored twice, in {weights[ref.name].shard} and in "
                    f"{shard.name}; if these are two models, give the path of one"
                )
            weights[ref.name] = Weight(ref.name, (("weight", ref),), shard.name)
    return weights


def _read_small(source: Source, shards: Sequence[Shard], refs: Sequence[TensorRef]) -> Mapping[str, bytes]:
    """The bytes of small tensors, by name. From the Hub each is a request, so several are made at a time."""
    if large := [ref.name for ref in refs if ref.nbytes > MAX_SMALL_BYTES]:
        raise ValueError(f"{large[0]} is over {MAX_SMALL_BYTES:,} bytes")
    names = {shard.file.uri: shard.name for shard in shards}
    with ThreadPoolExecutor(_REQUESTS) as threads:
        contents = threads.map(lambda ref: source.read(names[ref.uri], ref.offset, ref.nbytes), refs)
        return {ref.name: content for ref, content in zip(refs, contents, strict=True)}


def _logical(
    stored: Mapping[str, Weight], tensors: StoredTensors, config: Mapping[str, Any]
) -> tuple[Mapping[str, Weight], tuple[str, ...]]:
    """The weights, with those of codecs instead of their parts; and why some cannot be read."""
    claims = [claim for codec in CODECS.values() for claim in codec.claims(tensors, config)]
    claimed = [claim for claim in claims if isinstance(claim, Weight)]
    if not claims:
        return stored, ()
    parts = {ref.extent: weight.name for weight in claimed for _, ref in weight.parts}
    twice = [name for name, count in Counter(weight.name for weight in claimed).items() if count > 1]
    plain = {name: weight for name, weight in stored.items() if weight.tensor.extent not in parts}
    problems = (
        *(claim for claim in claims if isinstance(claim, str)),
        *(f"{name} is stored in several quantised formats at once; expected is one" for name in twice),
    )
    return {**plain, **{weight.name: weight for weight in claimed}}, problems


def _check_index(source: Source, choice: Choice, weights: Mapping[str, Weight]) -> list[str]:
    """Notes on tensors that an index leaves out; `FormatError` for tensors that it names and that are not there."""
    weight_map = choice.weight_map
    wrong = [name for name, file in weight_map.items() if name not in weights or weights[name].shard != file]
    if wrong:
        raise FormatError(
            f"{source.location}: {choice.index_name} names {len(wrong)} tensors that are not in the file that it names,"
            f" for example {wrong[0]!r:.200} in {weight_map[wrong[0]]}"
        )
    left_out = [name for name in weights if name not in weight_map] if weight_map else []
    if not left_out:
        return []
    # transformers and vLLM load every tensor of the files that an index names; llama.cpp's converter refuses these.
    shown = ", ".join(f"{name!r:.200} in {weights[name].shard}" for name in left_out[:_SHOWN])
    return [
        f"{source.location}: {choice.index_name} leaves out {len(left_out)} tensors of the shards that it names: "
        f"{shown}{' …' if len(left_out) > _SHOWN else ''}. Programs that load the shards load them, so they are merged "
        "and are in the index of the output"
    ]
