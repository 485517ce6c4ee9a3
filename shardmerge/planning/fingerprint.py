"""The fingerprints of a plan and of a merge, which identify what an output's bytes depend on.

A plan reads headers only, so its fingerprint identifies an adapter by size and time. A merge, which decides whether an
unfinished output may be resumed, includes the adapters' bytes: a copied adapter has another time and the same bytes, a
retrained one may have the same size. The base is too large to be read for that. Its headers, sizes and times identify
it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.checkpoint_files import Shard
from shardmerge.sources.source import is_pinned, open_reader
from shardmerge.spec.plans import AuxFile, Fingerprint, MergePlan, digest_of, digest_of_list, jsonable
from shardmerge.spec.tensors import Orientation, SourceFile
from shardmerge.spec.updates import Update
from shardmerge.system import checksums
from shardmerge.version import __version__

#: Raised when the same plan comes to mean other bytes, so that unfinished work of an older version is not mixed in.
_DIGEST_VERSION = 5
#: Bytes of a file that is read twice, once to know it and once to copy it. The largest tokenizer has a third of it.
_MOST_READ = 100_000_000


def fingerprint_of(plan: MergePlan, checkpoint: Checkpoint, made_of: Mapping[str, str]) -> Fingerprint:
    """Everything that the output's bytes depend on: the sources, as far as headers show them, and the computation.

    ``made_of`` are checksums of files whose contents the plan has put into the output's headers. Where the output goes
    and what memory may be taken are not part of it.
    """

    def stamp(file: SourceFile) -> list[Any]:
        return [file.uri, file.size, file.mtime_ns]

    updates = (
        [
            *[tensor.source.name, update.adapter, update.family, update.module, update.scaling, update.rank],
            *[update.orientation is Orientation.TRANSPOSED, region.rows, region.start, region.stored_start],
            *[region.expert, region.orientation is Orientation.TRANSPOSED, region.shuffle, _settings_of(update)],
        ]
        for tensor, update in plan.updates()
        for region in [update.region]
    )
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
        "work": {"updates": digest_of_list(updates), "output": digest_of(output)},
    }


def _settings_of(update: Update) -> list[Any] | None:
    """The method's settings of an update, with what they are called."""
    return None if update.settings is None else [type(update.settings).__name__, jsonable(update.settings)]


def _header(shard: Shard) -> list[Any]:
    return [shard.metadata, [[ref.name, ref.dtype, ref.shape, ref.offset] for ref in shard.tensors]]


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The config's settings that affect the output's bytes, by dotted path."""
    for number, adapter in enumerate(config["adapters"]):
        yield from ((f"adapters.{number}.{key}", value) for key, value in adapter.items() if key != "path")
    yield from ((f"output.{key}", value) for key, value in config["output"].items() if key not in ("path", "sha256"))
    yield from ((f"compute.{key}", value) for key, value in config["compute"].items() if key in ("device", "dtype"))
    yield from ((key, value) for key, value in config.items() if key not in ("base", "adapters", "output", "compute"))


def with_contents(plan: MergePlan, torch_version: str) -> Fingerprint:
    """The plan's fingerprint, in which files that are read whole are known by what is in them.

    Raises `SourceError` where one cannot be read or is no longer what the plan saw.
    """
    adapters = {
        f"{number}/{file.uri.rpartition('/')[2]}": _content(file)
        for number, info in enumerate(plan.adapters)
        for file in info.files
    }
    return {
        **plan.fingerprint,
        "adapters": adapters,
        # Of files that are not part of the output, but of which a part of it was made, the plan knows the contents.
        # Weights among the files that are copied are as large as the base's, and known as it is.
        "files": {
            **plan.fingerprint["files"],
            **{aux.name: _aux_content(aux) for aux in plan.aux if aux.source.size <= _MOST_READ},
        },
        # Another torch may round a product differently, and then the shards were not those of one run.
        "program": {**plan.fingerprint["program"], "torch": torch_version},
    }


def _content(file: SourceFile) -> str:
    if is_pinned(file):
        return file.uri
    with open_reader(file) as reader:
        found = checksums.of_file(reader, file.size)
        reader.check()
    return found["xxh3_128"]


def _aux_content(aux: AuxFile) -> str:
    return _content(aux.source) if aux.content is None else hashlib.sha256(aux.content.encode()).hexdigest()
