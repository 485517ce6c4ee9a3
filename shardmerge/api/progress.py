"""The progress of a merge or a verification."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a merge. ``done`` and ``total`` are bytes of the shards' data as written.

    ``doing`` is ``"exporting"`` without an adapter, and ``"verifying"`` in a verification. Before a merge is resumed it
    is ``"checking"``, and bytes are those of the files of finished shards.
    """

    done: int
    total: int
    shard: str
    shard_number: int
    shards: int
    doing: str = "merging"
