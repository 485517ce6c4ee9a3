"""What the record of a merge and the header of a GGUF file say: for a description, not as a proof."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from shardmerge.destinations.record import RECORD_NAME, SEAL, find_record, is_unfinished
from shardmerge.errors import FormatError
from shardmerge.gguf.glance import glance
from shardmerge.reporting.verified import last_time
from shardmerge.sources.source import Source

_GGUF = ".gguf"
_NOT_REMEMBERED = "not by this user on this machine; `shardmerge verify` does it"


def gguf_file(source: Source) -> str | None:
    """The GGUF file that a source is, or that is all of its weights. `FormatError` where there are several."""
    top = [name for name in source.names() if "/" not in name]
    found = [name for name in top if name.endswith(_GGUF)]
    if not found or any(name.endswith(".safetensors") for name in top):
        return None
    if len(found) > 1:
        raise FormatError(f"{source.location}: holds several GGUF files, give one: {', '.join(found[:5])}")
    return found[0]


def describe_gguf(source: Source, name: str) -> dict[str, Any]:
    """What the header of a GGUF file says."""
    size = source.stat(name).size
    where = source.location if source.location.endswith(name) else f"{source.location}/{name}"
    seen = glance(partial(source.read, name), size, where)
    architecture = seen.text("general.architecture")
    counts, sizes = seen.tensors, seen.nbytes
    return {
        "kind": "GGUF file",
        "location": where,
        "revision": source.revision,
        "name": seen.text("general.name"),
        "contents": seen.text("general.type"),
        "architecture": architecture,
        "version": seen.version,
        "tensors": sum(counts.values()),
        "layers": seen.values.get(f"{architecture}.block_count"),
        "context": seen.values.get(f"{architecture}.context_length"),
        "hidden_size": seen.values.get(f"{architecture}.embedding_length"),
        "quantization": max(sizes, key=lambda kind: sizes[kind], default=None),
        "bytes": size,
        "dtypes": {kind: {"tensors": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)},
    }


def refuse_unfinished(source: Source) -> None:
    """`FormatError` where a merge into the directory was not finished, and no model is there yet."""
    folder = source.directory().local_path
    if folder is not None and not source.names() and is_unfinished(folder):
        raise FormatError(
            f"{source.location}: holds a merge that was not finished; finish it by running the same command again"
        )


def made_of(source: Source) -> dict[str, Any]:
    """What the record of an output says; empty where there is none."""
    folder = source.directory().local_path
    if folder is None or (record := find_record(folder)) is None:
        return {}
    adapters = record.values.get("adapters")
    found: dict[str, Any] = {
        "merged_by": f"shardmerge {record.values.get('shardmerge', 'of an unknown version')}",
        "base": _place(record.values.get("base")),
        "adapters": [_place(info) for info in adapters] if isinstance(adapters, list) else [],
        "updated_weights": len(targets) if isinstance(targets := record.values.get("targets"), Mapping) else None,
        "verified": last_time(folder, record.seal) or _NOT_REMEMBERED,
    }
    if not record.is_believed:
        found["problems"] = [f"{RECORD_NAME} was changed after the merge: it no longer has its {SEAL}"]
    return found


def _place(info: Any) -> str:
    known = info if isinstance(info, Mapping) else {}
    location, revision, weight = known.get("location"), known.get("revision"), known.get("weight", 1)
    times = f" (weight {weight})" if weight != 1 else ""
    return f"{location or 'unknown'}{f'@{revision}' if revision else ''}{times}"
