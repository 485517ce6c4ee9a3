"""Whose work is this? The fingerprint of a merge, with the bytes of its adapters in it.

A plan has read headers only, and so knows an adapter by size and time. Whether an unfinished output may be resumed is
asked by a merge alone, and so answered there: an adapter that was fetched again, or copied, has other times but may be
the same; one that was trained anew may have the same size. The base is too large to be read for that, and is known by
its headers, sizes and times.
"""

from __future__ import annotations

import hashlib

from shardmerge.sources.source import is_pinned, open_reader
from shardmerge.spec.plans import AuxFile, Fingerprint, MergePlan
from shardmerge.spec.tensors import SourceFile
from shardmerge.system import checksums

#: Bytes of a file that is read twice, once to know it and once to copy it. The largest tokenizer has a third of it.
_MOST_READ = 100_000_000


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
        # Of files that are no part of the output, but of which a part of it was made, the plan knows the contents.
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
