"""Reads the headers, indexes and configs of a checkpoint: no tensor data, and nothing without a bound."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from shardmerge.errors import FormatError
from shardmerge.file_formats import recognise
from shardmerge.file_formats.safetensors_header import MAX_TENSORS, Metadata, read_header
from shardmerge.sources.source import Source
from shardmerge.spec.tensors import SourceFile, TensorRef
from shardmerge.system import json_text

T = TypeVar("T")

#: Of an index, which has an entry for every tensor; the largest of well-known models has 27 MB.
MAX_INDEX_BYTES = 60_000_000
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


def read_json(source: Source, names: Collection[str], name: str) -> dict[str, Any]:
    """A JSON object of a source; empty if there is no such file. `FormatError` if it is something else."""
    return read_json_value(source, name, json_text.parse_object) if name in names else {}


def read_json_value(
    source: Source, name: str, parse: Callable[[bytes, int], T] = json_text.parse, limit: int = json_text.MAX_BYTES
) -> T:
    """What ``parse`` makes of a JSON file of ``limit`` bytes at most. Raises `FormatError`."""
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
    index = read_json_value(source, name, parse, MAX_INDEX_BYTES)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(f'{where}: expected {{"metadata": {{…}}, "weight_map": {{tensor: file}}}}')
    known: set[str] = set()  # few files hold all tensors
    for tensor, file in weight_map.items():
        if isinstance(file, str) and file in known:
            continue
        if not isinstance(file, str) or not file.isprintable() or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise FormatError(
                f"{where}: it puts {tensor!r:.200} into {file!r:.200}, which is not the name of a .safetensors file in "
                "this directory"
            )
        known.add(file)
    return metadata, weight_map
