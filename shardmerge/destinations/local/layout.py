"""What an unfinished merge has in ``OUTPUT/.shardmerge``.

The lock, ``journal.json`` (whose merge this is), ``stage/`` (shards, each under its own name once it is durable) and
``receipts/`` (one a shard, written after the shard). The folder is removed when the output is complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardmerge.destinations.record import files_of_merge
from shardmerge.destinations.unfinished import FOLDER, JOURNAL
from shardmerge.destinations.untrusted import json_object, own_names
from shardmerge.system.directory import Directory, Entry

HOLDER, LOCK, STAGE, RECEIPTS = "holder", "lock", "stage", "receipts"
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


def identity(path: Path) -> list[int]:
    """Of a directory. Whoever prepares an output elsewhere cannot know those of the folders around it here."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_dev, status.st_ino]
