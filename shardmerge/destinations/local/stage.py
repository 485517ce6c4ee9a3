"""Where the finished shards of a merge wait until all are done, each with its receipt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardmerge.destinations.local.layout import RECEIPTS, STAGE, read_json
from shardmerge.destinations.shard_writer import ShardWriter
from shardmerge.destinations.unfinished import FOLDER
from shardmerge.spec.plans import Fidelity, Receipt, ShardPlan
from shardmerge.system import durable
from shardmerge.system.directory import Directory, Entry


@dataclass(frozen=True)
class Stage:
    """The stage of one merge, known by the ``digest`` of its fingerprint.

    Pickled, it goes to other processes: each writes its own shards, and after each of them its receipt, so that no two
    write the same file.
    """

    root: Directory
    digest: str
    sha256: bool

    @property
    def shards(self) -> Entry:
        return self.root / FOLDER / STAGE

    @property
    def receipts(self) -> Entry:
        return self.root / FOLDER / RECEIPTS

    @contextmanager
    def writer(self, shard: ShardPlan) -> Iterator[ShardWriter]:
        """See `destination.Handle`. What is finished has a receipt."""
        with (
            durable.held(self.root),
            ShardWriter(self.shards / shard.name, shard, self.sha256, self._write_receipt) as writer,
        ):
            yield writer

    def _write_receipt(self, receipt: Receipt) -> None:
        value = {"digest": self.digest, **receipt.entry(), "active_adapters": [*receipt.active_adapters]}
        value["fidelity"] = {name: dataclasses.astuple(sums) for name, sums in receipt.fidelity.items()}
        durable.write_file(self.receipts / f"{receipt.shard}.json", [json.dumps(value).encode()])

    def receipt(self, shard: ShardPlan) -> Receipt | None:
        """The receipt of a shard, if it is of this very merge; what it says of the shard's bytes is yet to be seen."""
        value: dict[str, Any] = read_json(self.receipts / f"{shard.name}.json") or {}
        if value.get("digest") != self.digest or value.get("bytes") != shard.nbytes:
            return None
        try:
            fidelity = {name: Fidelity(*sums) for name, sums in value.get("fidelity", {}).items()}
            active = tuple(value.get("active_adapters", ()))
        except (TypeError, AttributeError):
            return None
        checksum = value.get("xxh3_128")
        known = isinstance(checksum, str)
        return Receipt(shard.name, shard.nbytes, {"xxh3_128": str(checksum)}, active, fidelity) if known else None
