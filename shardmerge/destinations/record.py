"""``shardmerge.json``, the record of a finished merge: written with a checksum of itself, read with suspicion."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardmerge.system import checksums
from shardmerge.system.regular_files import read_small

RECORD_NAME = "shardmerge.json"
#: The record's key for its own checksum.
SEAL = "record_checksum"
#: Bytes of a record at most. That of a model of 70,000 merged tensors has 21 MB.
_LARGEST = 128 << 20


def read_record(output: Path) -> dict[str, Any] | None:
    """The record of the finished merge in a directory, whether or not its seal holds; None where none can be read."""
    try:
        return json_object(read_small(output / RECORD_NAME, _LARGEST))
    except OSError:
        return None


def json_object(data: bytes) -> dict[str, Any] | None:
    """What JSON says; None where it is damaged or says something other than an object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own checksum as its last key, which tells whether it was changed or damaged since."""
    return {**record, SEAL: seal(record)}


def seal(record: Mapping[str, Any]) -> str:
    """The xxh3_128 of all of a record but its seal, as JSON in ASCII with sorted keys and without spaces."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    found = checksums.Checksums()
    found.update(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    return found.hex()["xxh3_128"]


def believed_record(output: Path) -> dict[str, Any] | None:
    """The record where it can be read and its seal holds. Records of older versions have none, and are believed."""
    record = read_record(output)
    return None if record is None or (SEAL in record and record[SEAL] != seal(record)) else record


def has_damaged_record(output: Path) -> bool:
    """Whether there is a record that is not believed, so that nothing says which files the merge wrote."""
    return os.path.lexists(output / RECORD_NAME) and believed_record(output) is None


def own_names(value: Any) -> list[str]:
    """The names in a record or a journal that lie inside the output, whatever the file says."""
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    return [name for name in names if _is_within(name)]


def _is_within(name: str) -> bool:
    return bool(name.strip("/.")) and not name.startswith("/") and "\0" not in name and ".." not in name.split("/")


def files_of_merge(output: Path) -> list[str]:
    """Every file that the finished merge in a directory wrote; none where its record is not believed."""
    return own_names((believed_record(output) or {}).get("files"))


def is_whole(output: Path, record: Mapping[str, Any]) -> bool:
    """Whether every file that a record names is there, of the size that it names. Contents are not read."""
    sizes: dict[str, Any] = dict.fromkeys(own_names(record.get("files")))
    for key in ("shards", "other_files"):
        entries = record.get(key)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            sizes[name] = entry.get("bytes") if isinstance(entry, dict) else entry
    return bool(sizes) and all(_has_size(output / name, size) for name, size in sizes.items())


def _has_size(path: Path, size: Any) -> bool:
    try:
        return path.is_file() and (size is None or path.stat().st_size == size)
    except (OSError, ValueError):
        return False
