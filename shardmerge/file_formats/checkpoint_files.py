"""Headers, indexes and configs of a checkpoint, read: no tensor data, and nothing without a bound."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardmerge.errors import FormatError
from shardmerge.file_formats import recognise
from shardmerge.file_formats.safetensors_header import (
    MAX_TENSORS,
    DuplicateKeyError,
    Metadata,
    read_header,
    unique_keys,
)
from shardmerge.sources.source import Source
from shardmerge.spec.tensors import SourceFile, TensorRef
from shardmerge.system import json_size

#: Of an index, which has an entry for every tensor; the largest of well-known models has 27 MB.
MAX_INDEX_BYTES = 60_000_000
#: Of a config.json or an adapter_config.json; a million token numbers fit.
MAX_JSON_BYTES = 10_000_000
#: Objects and lists inside each other. Real ones have five; what walks through them may call itself for each.
MAX_DEPTH = 100
INDEX_SUFFIX = ".safetensors.index.json"
#: With a variant (``fp16``) transformers and diffusers write it before the last ending.
_INDEX = re.compile(r"(?P<stem>[^/]+)\.safetensors\.index(\.(?P<variant>[\w-]+))?\.json")
#: A stem of theirs with a variant: ``model.fp16``.
_VARIANT = re.compile(r"(?P<stem>model|diffusion_pytorch_model)\.(?P<variant>[\w-]+)")


def is_index(name: str) -> bool:
    """Whether a file of a checkpoint's own folder is an index of shards, by its name."""
    return _INDEX.fullmatch(name) is not None


def stem_of_index(name: str) -> str:
    """``model`` of ``model.safetensors.index.json``; ``model.fp16`` of ``model.safetensors.index.fp16.json``."""
    match = _INDEX.fullmatch(name)
    assert match is not None, name
    return f"{match['stem']}.{match['variant']}" if match["variant"] else match["stem"]


def index_of_stem(stem: str) -> str:
    """The name of the index of shards ``stem-00001-of-….safetensors``, as the libraries look for it."""
    if match := _VARIANT.fullmatch(stem):
        return f"{match['stem']}.safetensors.index.{match['variant']}.json"
    return stem + INDEX_SUFFIX


@dataclass(frozen=True, slots=True)
class Shard:
    """A stored file: its metadata and its tensors, in the order of their data."""

    name: str
    file: SourceFile
    metadata: Metadata
    tensors: tuple[TensorRef, ...]


def read_shard(source: Source, name: str, most: int = MAX_TENSORS) -> Shard:
    """The header of one safetensors file, which may name ``most`` tensors."""
    file = source.stat(name)
    metadata, tensors, data_start = read_header(partial(source.read, name), file.size, file.uri, most)
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
    value = read_json_value(source, name, limit, constant)
    if not isinstance(value, dict):
        raise FormatError(f"{source.location}: {name} holds no JSON object")
    return value


def read_json_value(
    source: Source, name: str, limit: int = MAX_JSON_BYTES, constant: Callable[[str], Any] | None = None
) -> Any:
    """The JSON of a file of a source, whatever it is; ``constant`` is as `read_json` takes it. Raises `FormatError`."""
    where = f"{source.location}: {name}"
    text = source.read(name, 0, limit + 1)
    if len(text) > limit:
        raise FormatError(f"{where} is over {limit:,} bytes long; expected less")
    if large := json_size.too_large(text):
        raise FormatError(f"{where} {large}; expected fewer entries")
    try:
        value = json.loads(text, object_pairs_hook=_without_contradiction, parse_constant=constant)
        if _depth(value) > MAX_DEPTH:
            raise FormatError(f"{where} has over {MAX_DEPTH} objects and lists inside each other; expected less")
        if b"\\u" in text:  # half a surrogate pair, which cannot be stored again
            json.dumps(value, ensure_ascii=False).encode()
    except DuplicateKeyError as error:
        raise FormatError(f"{where} has the key {error} twice, and not with the same value; remove one") from None
    except (ValueError, RecursionError) as error:
        if known := recognise.what_is(text[: recognise.HEAD_BYTES]):
            raise FormatError(f"{where}: {known}") from None
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
