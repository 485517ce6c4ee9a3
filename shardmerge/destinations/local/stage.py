"""What an unfinished merge has in ``OUTPUT/.shardmerge``.

The lock, ``journal.json`` (whose merge this is), ``stage/`` (shards, each under its own name once it is durable) and
``receipts/`` (one a shard, written after the shard). The folder is removed when the output is complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.destinations.record import FOLDER, JOURNAL, files_of_merge, json_object, own_names
from shardmerge.destinations.shard_writer import ShardWriter
from shardmerge.spec.plans import ShardPlan
from shardmerge.spec.receipts import Fidelity, Receipt
from shardmerge.system import durable
from shardmerge.system.directory import Directory, Entry

STAGE, RECEIPTS = "stage", "receipts"
#: Bytes of a journal or a receipt at most.
_LARGEST = 64 << 20


def read_json(file: Entry) -> dict[str, Any] | None:
    """A journal or a receipt; None where none can be read."""
    try:
        return json_object(file.read_small(_LARGEST))
    except OSError:
        return None


def read_state(root: Directory) -> dict[str, Any]:
    """What the journal in an open output says; empty where there is none."""
    return read_json(root / FOLDER / JOURNAL) or {}


def placed(state: dict[str, Any]) -> list[str]:
    """The files that a commit has put, or was about to put, into the output."""
    return own_names(state.get("places")) if state.get("committing") else []


def work_bytes(output: Path) -> int:
    """The bytes that an unfinished merge already has on the disk, of shards and of what it has put into place."""
    try:
        with Directory(output) as root:
            stage = root / FOLDER / STAGE
            staged = stage.names() if stage.status() is not None else []
            return _sizes([*(stage / name for name in staged), *(root / name for name in placed(read_state(root)))])
    except OSError:  # none that could be resumed
        return 0


def model_bytes(output: Path) -> int:
    """The bytes of the finished merge in a directory; 0 where there is none."""
    try:
        with Directory(output) as root:
            return _sizes(root / name for name in files_of_merge(output))
    except OSError:
        return 0


def _sizes(files: Iterable[Entry]) -> int:
    return sum(status.st_size for file in files if (status := file.file_status()) is not None)


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
