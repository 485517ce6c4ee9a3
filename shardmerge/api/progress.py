"""How far a merge or a verification is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a merge is. Bytes are those of the shards' data as written.

    ``doing`` is ``"exporting"`` where there is no adapter, and ``"verifying"`` in a verification. Before a merge is
    resumed, it is ``"checking"``, and bytes are those of the files of finished shards.
    """

    done: int
    total: int
    shard: str
    shard_number: int
    shards: int
    doing: str = "merging"
