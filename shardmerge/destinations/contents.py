"""The files of a finished output at any destination: their order, and the bytes of those beside the shards.

The index, or the only shard, makes an output a model, and so comes last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shardmerge.destinations.record import RECORD_NAME, written
from shardmerge.sources.source import open_reader
from shardmerge.spec.plans import AuxFile, MergePlan
from shardmerge.system.checksums import Checksums

_COPY_BYTES = 1 << 20


def files_of(plan: MergePlan) -> list[str]:
    """Every file of the finished output; the last is the one that makes it a model."""
    aux, shards = [aux.name for aux in plan.aux], [shard.name for shard in plan.shards]
    if plan.index_name is None:
        return [*aux, RECORD_NAME, *shards]
    return [*aux, *shards, RECORD_NAME, plan.index_name]


def aux_chunks(aux: AuxFile, checksums: Checksums) -> Iterator[bytes]:
    """The bytes of a file beside the shards; each chunk is added to ``checksums``."""
    if aux.content is not None:
        content = aux.content.encode()
        checksums.update(content)
        yield content
        return
    with open_reader(aux.source) as reader:
        for offset in range(0, aux.source.size, _COPY_BYTES):
            chunk = bytearray(min(_COPY_BYTES, aux.source.size - offset))
            reader.read_into(offset, memoryview(chunk))
            checksums.update(memoryview(chunk))
            yield bytes(chunk)
        reader.check()


def index_of(plan: MergePlan) -> bytes:
    """The index. ``total_size`` is the bytes of all tensors, without headers, as transformers counts it."""
    metadata = {**dict(plan.index_metadata), "total_size": sum(shard.data_bytes for shard in plan.shards)}
    names = sorted((name, shard.name) for shard in plan.shards for name, _ in shard.outputs())
    # The text of json.dumps with an indent, without the 20 MB that it takes for 67,000 names.
    lines = (f"    {_text(tensor)}: {_text(shard)}" for tensor, shard in names)
    head = json.dumps({"metadata": metadata}, indent=2, ensure_ascii=False).removesuffix("\n}")
    weight_map = "{\n" + ",\n".join(lines) + "\n  }" if names else "{}"
    return f'{head},\n  "weight_map": {weight_map}\n}}\n'.encode()


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def record_of(record: Mapping[str, Any], others: Mapping[str, Any]) -> Iterator[bytes]:
    """The record's file. ``others`` holds the `entry` of each file beside the shards, the index included."""
    return written({**record, "other_files": others})


def entry(nbytes: int, checksums: Checksums) -> dict[str, Any]:
    """The record's entry for a file."""
    return {"bytes": nbytes, **checksums.hex()}


def entry_of(content: bytes, sha256: bool) -> dict[str, Any]:
    """The record's entry for a file with this content."""
    checksums = Checksums(sha256)
    checksums.update(content)
    return entry(len(content), checksums)
