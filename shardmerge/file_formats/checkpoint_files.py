"""Reads the headers, indexes and configs of a checkpoint. Every read is bounded, and no tensor data is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardmerge.errors import FormatError
from shardmerge.file_formats import recognise
from shardmerge.file_formats.safetensors_header import MAX_TENSORS, Metadata, read_header
from shardmerge.sources.source import Source
from shardmerge.spec.tensors import SourceFile, TensorRef
from shardmerge.system import json_text

#: An index has an entry for every tensor; the largest of well-known models has 27 MB.
MAX_INDEX_BYTES = 60_000_000
#: transformers and diffusers write a variant (``fp16``) before the last ending.
_INDEX = re.compile(r"(?P<stem>[^/]+)\.safetensors\.index(\.(?P<variant>[\w-]+))?\.json")
#: A stem with a variant: ``model.fp16``.
_VARIANT = re.compile(r"(?P<stem>model|diffusion_pytorch_model)\.(?P<variant>[\w-]+)")


def is_index(name: str) -> bool:
    """Whether a name without folders is that of an index of shards."""
    return _INDEX.fullmatch(name) is not None


def stem_of_index(name: str) -> str:
    """``model`` of ``model.safetensors.index.json``; ``model.fp16`` of ``model.safetensors.index.fp16.json``."""
    match = _INDEX.fullmatch(name)
    assert match is not None, name
    return f"{match['stem']}.{match['variant']}" if match["variant"] else match["stem"]


def index_of_stem(stem: str) -> str:
    """The name under which libraries look for the index of shards ``stem-00001-of-….safetensors``."""
    if match := _VARIANT.fullmatch(stem):
        return f"{match['stem']}.safetensors.index.{match['variant']}.json"
    return f"{stem}.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """A stored file: its metadata and its tensors, in the order of their data."""

    name: str
    file: SourceFile
    metadata: Metadata
    tensors: tuple[TensorRef, ...]


def read_shard(source: Source, name: str, most: int = MAX_TENSORS) -> Shard:
    """The header of one safetensors file of at most ``most`` tensors. Raises `FormatError` or `SourceError`."""
    file = source.stat(name)
    metadata, tensors, data_start = read_header(partial(source.read, name), file.size, file.uri, most)
    refs = []
    for tensor, info in tensors.items():
        start, stop = info.data_offsets
        refs.append(TensorRef(tensor, file.uri, info.dtype, info.shape, data_start + start, stop - start))
    return Shard(name, file, metadata, tuple(refs))


def read_json(
    source: Source,
    name: str,
    limit: int = json_text.MAX_BYTES,
    parse: Callable[[bytes, int], Any] = json_text.parse_object,
) -> Any:
    """The object in a JSON file of at most ``limit`` bytes. Raises `FormatError` or `SourceError`.

    ``parse`` is a function of `json_text` with other rules.
    """
    text = source.read(name, 0, limit + 1)
    try:
        return parse(text, limit)
    except json_text.JsonError as error:
        known = recognise.what_is(text[: recognise.HEAD_BYTES]) if isinstance(error, json_text.NotJsonError) else None
        problem = f": {known}" if known else f" {error}"
        raise FormatError(f"{source.location}: {name}{problem}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def read_index(source: Source, name: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The metadata of an index, and tensor → file. Raises `FormatError`."""
    where = f"{source.location}: {name}"
    parse = partial(json_text.parse_object, constant=_no_constant)
    index = read_json(source, name, MAX_INDEX_BYTES, parse)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(f'{where}: expected {{"metadata": {{…}}, "weight_map": {{tensor: file}}}}')
    checked: set[str] = set()  # there are far fewer files than tensors
    for tensor, file in weight_map.items():
        if isinstance(file, str) and file in checked:
            continue
        if not isinstance(file, str) or not file.isprintable() or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise FormatError(
                f"{where}: it maps {tensor!r:.200} to {file!r:.200}, which is not the name of a .safetensors file in "
                "this directory"
            )
        checked.add(file)
    return metadata, weight_map
