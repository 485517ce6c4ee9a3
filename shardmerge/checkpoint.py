"""Index and headers of a base → weights, as `TensorRef`s. No tensor data is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardmerge.errors import FormatError
from shardmerge.header import MAX_HEADER_BYTES, DuplicateKeyError, Metadata, read_header, unique_keys
from shardmerge.sources import Source, directory_of
from shardmerge.spec import CheckpointInfo, SourceFile, TensorRef, Weight

INDEX_SUFFIX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
#: Weights in the top folder that are no part of the model itself.
_NOT_THE_MODEL = re.compile(r"(adapter_model|consolidated|optimizer)\b.*\.safetensors")
#: Of an index: as long as all headers that the format allows one file.
MAX_INDEX_BYTES = MAX_HEADER_BYTES
#: Of a config.json or an adapter_config.json; a million token numbers fit.
MAX_JSON_BYTES = 10_000_000
#: Objects and lists inside each other. Real ones have five; what walks through them may call itself for each.
MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Shard:
    """A stored file: its metadata and its tensors, in the order of their data."""

    name: str
    file: SourceFile
    metadata: Metadata
    tensors: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model as it is stored."""

    source: Source
    shards: tuple[Shard, ...]
    weights: Mapping[str, Weight]
    index_name: str | None
    index_metadata: Mapping[str, Any]
    #: config.json, or an empty dictionary where there is none.
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def ties_embeddings(self) -> bool:
        """Whether transformers makes the output head share the input embedding when it loads this model."""
        inner = self.config.get("text_config")
        inner_value = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
        return bool(self.config.get("tie_word_embeddings", inner_value))

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
    directory = directory_of(source)
    names = source.names()
    if names and directory is not source and names[0].endswith(INDEX_SUFFIX):
        raise FormatError(f"{source.location}: an index alone is no model; give the directory {directory.location}")
    index_name = _find_index(source, names)
    weight_map: Mapping[str, str] = {}
    index_metadata: Mapping[str, Any] = {}
    if index_name:
        index_metadata, weight_map = read_index(source, index_name)
        files = sorted(set(weight_map.values()))
        if missing := sorted(set(files).difference(names)):
            raise FormatError(
                f"{source.location}: {index_name} names {len(missing)} shards that are not there: "
                f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; the download is incomplete"
                + (f". {source.note}" if source.note else "")
            )
    else:
        files = _files_without_index(source, names)
    shards = tuple(read_shard(source, name) for name in files)
    weights = _weights(source, shards)
    _check_index(source, index_name, weight_map, weights)
    return Checkpoint(
        source, shards, weights, index_name, index_metadata, read_json(directory, directory.names(), "config.json")
    )


def read_shard(source: Source, name: str) -> Shard:
    """The header of one safetensors file."""
    file = source.stat(name)
    metadata, tensors, data_start = read_header(partial(source.read, name), file.size, file.uri)
    refs = tuple(
        TensorRef(tensor, file.uri, info.dtype, info.shape, data_start + info.data_offsets[0], info.nbytes)
        for tensor, info in tensors.items()
    )
    return Shard(name, file, metadata, refs)


def read_json(
    source: Source,
    names: list[str],
    name: str,
    limit: int = MAX_JSON_BYTES,
    constant: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """A JSON object of a source; empty if there is no such file. `FormatError` if it is something else.

    ``NaN`` and ``Infinity`` are no JSON, but Python writes them, and real configs have them. ``constant`` makes of them
    what they shall be, or a `ValueError`.
    """
    if name not in names:
        return {}
    where = f"{source.location}: {name}"
    text = source.read(name, 0, limit + 1)
    if len(text) > limit:
        raise FormatError(f"{where} is over {limit:,} bytes long; expected less")
    try:
        value = json.loads(text, object_pairs_hook=_without_contradiction, parse_constant=constant)
        if not isinstance(value, dict):
            raise FormatError(f"{where} holds no JSON object")
        if _depth(value) > MAX_DEPTH:
            raise FormatError(f"{where} has over {MAX_DEPTH} objects and lists inside each other; expected less")
        if b"\\u" in text:  # half a surrogate pair, which cannot be stored again
            json.dumps(value, ensure_ascii=False).encode()
    except DuplicateKeyError as error:
        raise FormatError(f"{where} has the key {error} twice, and not with the same value; remove one") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from None
    return value


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What ``json.loads`` makes of an object, which may say the same twice."""
    result = dict(pairs)
    return result if all(result[key] == value for key, value in pairs) else unique_keys(pairs)


def _depth(value: Any) -> int:
    """How many objects and lists lie inside each other, `MAX_DEPTH` + 1 at most."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = (item for one in level for item in (one.values() if isinstance(one, dict) else one))
        level = [item for item in inner if isinstance(item, (dict, list))]
    return depth


def _find_index(source: Source, names: list[str]) -> str | None:
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX) and "/" not in name]
    if len(indexes) <= 1:
        return indexes[0] if indexes else None
    if (usual := "model" + INDEX_SUFFIX) in indexes:
        return usual
    raise FormatError(f"{source.location}: several indexes and no model{INDEX_SUFFIX}: {', '.join(indexes)}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def read_index(source: Source, name: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The metadata of an index, and tensor → file. Raises `FormatError`."""
    where = f"{source.location}: {name}"
    index = read_json(source, [name], name, MAX_INDEX_BYTES, _no_constant)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(f'{where}: expected {{"metadata": {{…}}, "weight_map": {{tensor: file}}}}')
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.isprintable() or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise FormatError(
                f"{where}: it puts {tensor!r:.200} into {file!r:.200}, which is no name of a .safetensors file in this "
                "directory"
            )
    return metadata, weight_map


def _files_without_index(source: Source, names: list[str]) -> list[str]:
    files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if "model.safetensors" in files:
        return ["model.safetensors"]
    if strange := [name for name in files if not name.isprintable()]:
        raise FormatError(f"{source.location}: the file name {strange[0]!r} has characters that cannot be shown")
    if len(files) > 1:
        files = [name for name in files if not _NOT_THE_MODEL.fullmatch(name)]
    if not files:
        what = (
            "it holds pickled weights; convert them to safetensors first"
            if _pickles(names)
            else "nothing to merge into"
        )
        raise FormatError(f"{source.location}: no .safetensors file: {what}")
    numbered = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    for stem, count in sorted({(match["stem"], int(match["count"])) for match in numbered}):
        have = {int(match["number"]) for match in numbered if match["stem"] == stem and int(match["count"]) == count}
        if missing := sorted(set(range(1, count + 1)) - have):
            raise FormatError(f"{source.location}: of the {count} shards of {stem}, these are missing: {missing}")
    return files


def _pickles(names: list[str]) -> bool:
    return any(name.endswith((".bin", ".pt", ".pth")) for name in names)


def _weights(source: Source, shards: tuple[Shard, ...]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for shard in shards:
        for ref in shard.tensors:
            if ref.name in weights:
                raise FormatError(
                    f"{source.location}: the tensor {ref.name!r} is stored twice, in {weights[ref.name].shard} and in "
                    f"{shard.name}"
                )
            weights[ref.name] = Weight(ref.name, (("weight", ref),), shard.name)
    return weights


def _check_index(
    source: Source, index_name: str | None, weight_map: Mapping[str, str], weights: Mapping[str, Weight]
) -> None:
    wrong = [name for name, file in weight_map.items() if name not in weights or weights[name].shard != file]
    if wrong:
        raise FormatError(
            f"{source.location}: {index_name} names {len(wrong)} tensors that are not in the file it gives for them, "
            f"for example {wrong[0]!r:.200} in {weight_map[wrong[0]]}"
        )
