"""The record of a finished merge, ``shardmerge.json``: its reader and its writer, and the marks of an unfinished merge.

A record ends with a checksum of itself. Anybody may have written the one in a directory, so it is untrusted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.errors import FormatError, SourceError
from shardmerge.spec.notices import Warned
from shardmerge.spec.packed import PackedMapping
from shardmerge.system import checksums
from shardmerge.system.regular_files import read_small, why_not_readable

RECORD_NAME = "shardmerge.json"
#: The folder in an output that holds an unfinished merge, and the file in it that identifies the merge.
FOLDER, JOURNAL = ".shardmerge", "journal.json"
#: The record's key for its own checksum.
SEAL = "record_checksum"
#: The most bytes of a record. With 70,000 merged tensors it has 21 MB.
_LARGEST = 128 << 20

#: A file's bytes, and its checksums by kind.
FileEntry = tuple[int, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read. Every file name in it is inside the output."""

    values: Mapping[str, Any]
    shards: Mapping[str, FileEntry]
    #: The files beside the shards; older records have none.
    others: Mapping[str, FileEntry]
    files: tuple[str, ...]

    @property
    def targets(self) -> Mapping[str, Any]:
        """Updates by the weight's name."""
        found = self.values.get("targets")
        return found if isinstance(found, Mapping) else {}

    @property
    def seal(self) -> str | None:
        """The record's own checksum; None in records of older versions."""
        value = self.values.get(SEAL)
        return None if value is None else str(value)

    @property
    def is_believed(self) -> bool:
        """Whether its checksum is right. Records of older versions have none, and are believed."""
        return SEAL not in self.values or self.values[SEAL] == seal(self.values)

    @property
    def version(self) -> str:
        return str(self.values.get("shardmerge"))

    @property
    def notes(self) -> list[str]:
        """Remarks on the record itself for a report."""
        if SEAL in self.values:
            return []
        why = "as an older version wrote it: there is no way to see whether it was changed"
        return [Warned(f"{RECORD_NAME} has no {SEAL}, {why}")]

    @property
    def format(self) -> str:
        """The output's layout. Records of older versions name none: those wrote checkpoints."""
        config = self.values.get("config")
        section = config.get("output") if isinstance(config, dict) else None
        found = section.get("format") if isinstance(section, dict) else None
        return found if isinstance(found, str) else "safetensors"

    def is_whole(self, output: Path) -> bool:
        """Whether every file that it names exists with the size that it names. Contents are not read."""
        entries = {**self.shards, **self.others}
        sizes = {name: entries[name][0] if name in entries else None for name in (*self.files, *entries)}
        return bool(sizes) and all(_has_size(output / name, size) for name, size in sizes.items())


# --- unfinished merges ------------------------------------------------------------------------------------------------


def is_unfinished(output: Path) -> bool:
    """Whether the directory holds a merge that was not finished."""
    return os.path.lexists(output / FOLDER / JOURNAL)


def left_behind(output: Path) -> str | None:
    """The name of a work folder beside a finished model, which may be removed; None where there is none."""
    folder = output / FOLDER
    return FOLDER if folder.is_dir() and not folder.is_symlink() else None


def is_work(name: str) -> bool:
    """Whether a folder of this name in an output is an unfinished merge, and not a part of the model."""
    return name == FOLDER


# --- reading ----------------------------------------------------------------------------------------------------------


def find_record(output: Path) -> Record | None:
    """The record in a directory, whether or not it is believed; None where none can be read."""
    try:
        values = json_object(read_small(output / RECORD_NAME, _LARGEST))
    except OSError:
        return None
    if values is None:
        return None
    shards, others = _entries(values.get("shards")), _entries(values.get("other_files"))
    return Record(values, shards, others, tuple(own_names(values.get("files"))))


def believed_record(output: Path) -> Record | None:
    """The record in a directory; None where none can be read, or it was changed after the merge."""
    record = find_record(output)
    return record if record is not None and record.is_believed else None


def open_record(output: Path) -> Record:
    """The record of a finished merge, with its targets packed: those of a large model take 50 MB as objects.

    `SourceError` if there is no such directory. `FormatError` if it holds no record, or one that was changed after the
    merge: then nothing states what was merged, and what the output must be.
    """
    if not output.is_dir():
        raise SourceError(f"{output}: no such directory")
    if is_unfinished(output):
        raise FormatError(f"{output}: the merge was not finished; run it again first")
    record = find_record(output)
    if record is None:
        reason = why_not_readable(output / RECORD_NAME) or "is not JSON of ours"
        raise FormatError(
            f"{output}: there is no {RECORD_NAME} that can be read, so nothing says what was merged ({reason})"
        )
    if not record.is_believed:
        raise FormatError(
            f"{output}: {RECORD_NAME} was changed or damaged after the merge: it no longer has its {SEAL}, so nothing "
            "says what was merged. Put back the record as it was written, or merge again"
        )
    files = record.values.get("files")
    if not record.shards or not isinstance(files, list) or not isinstance(record.values.get("targets"), Mapping):
        raise FormatError(f"{output}: {RECORD_NAME} is damaged: it must have shards, files and targets")
    others = record.values.get("other_files")
    named = [*record.values["shards"], *(others if isinstance(others, dict) else ()), *files]
    if wrong := [name for name in named if not isinstance(name, str) or not is_within(name)]:
        raise FormatError(f"{output}: {RECORD_NAME} names {str(wrong[0])!r:.80}, which is not a file of this directory")
    return dataclasses.replace(record, values={**record.values, "targets": PackedMapping(record.targets)})


def has_damaged_record(output: Path) -> bool:
    """Whether there is a record that is not believed: then nothing states which files the merge wrote."""
    return os.path.lexists(output / RECORD_NAME) and believed_record(output) is None


def damaged_record(output: Path) -> str:
    """The message for a finished merge whose record is not believed."""
    try:
        others = sorted(entry for entry in os.listdir(output) if entry not in (FOLDER, RECORD_NAME))
    except OSError:
        others = []
    why = why_not_readable(output / RECORD_NAME) or "was changed or damaged after the merge"
    files = f" ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})" if others else ""
    return (
        f"{RECORD_NAME} {why}, so nothing says which files that merge wrote, and none of them{files} is removed or "
        "replaced; put back the record as it was written, remove the directory yourself, or choose another output.path"
    )


def files_of_merge(output: Path) -> list[str]:
    """Every file that the finished merge in a directory wrote; none where its record is not believed."""
    record = believed_record(output)
    return list(record.files) if record else []


def _entries(value: Any) -> dict[str, FileEntry]:
    """Files by name. Older records have only the bytes of shards, and no other files."""
    found: dict[str, FileEntry] = {}
    for name, entry in value.items() if isinstance(value, dict) else ():
        entry = entry if isinstance(entry, dict) else {"bytes": entry}
        size = entry.get("bytes")
        if type(size) is int and is_within(name):
            found[name] = size, {kind: str(entry[kind]) for kind in ("xxh3_128", "sha256") if kind in entry}
    return found


def _has_size(path: Path, size: int | None) -> bool:
    try:
        return path.is_file() and (size is None or path.stat().st_size == size)
    except (OSError, ValueError):
        return False


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in ``data``; None where there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_within(name: str) -> bool:
    """Whether a name in a record or a journal stays inside the output."""
    return bool(name.strip("/.")) and not name.startswith("/") and "\0" not in name and ".." not in name.split("/")


def own_names(value: Any) -> list[str]:
    """The names in an untrusted list that stay inside the output."""
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    return [name for name in names if is_within(name)]


# --- writing ----------------------------------------------------------------------------------------------------------


class Section:
    """A part of a record with an entry for every tensor, made again whenever it is written.

    The entries of 67,000 tensors would take 60 MB as objects, and another 60 as text.
    """

    def __init__(self, entries: Callable[[], Iterable[tuple[str, Any]]]) -> None:
        """``entries`` yields names, each once, and JSON values."""
        self._entries = entries

    def lines(self) -> Iterator[str]:
        """Each entry as JSON, in the order of the names."""
        texts = [(name, _compact(value)) for name, value in self._entries()]
        texts.sort()
        return (f"{_compact(name)}:{text}" for name, text in texts)


def written(record: Mapping[str, Any]) -> Iterator[bytes]:
    """The bytes of a record's file; its last key is its own checksum.

    A value is JSON, a `Section`, or a function that returns JSON, which is called after all other values are written.
    """
    values = dict(record)
    now = {key: value for key, value in values.items() if not callable(value)}
    yield b"{"
    for key, value in now.items():
        yield from _member(key, value)
    for key in values.keys() - now.keys():
        values[key] = record[key]()
        yield from _member(key, values[key])
    last = json.dumps({SEAL: seal(values)}, indent=2)
    yield last.removeprefix("{").encode() + b"\n"


def _member(key: str, value: Any) -> Iterator[bytes]:
    """A key and its value, and a comma."""
    if isinstance(value, Section):
        yield f"\n  {_compact(key)}: {{".encode()
        separator = ""
        for lines in batched(value.lines()):
            yield (separator + ",".join(f"\n    {line}" for line in lines)).encode()
            separator = ","
        yield b"\n  },"
    else:
        text = json.dumps({key: value}, indent=2, ensure_ascii=False)
        yield text.removeprefix("{").removesuffix("\n}").encode() + b","


def seal(record: Mapping[str, Any]) -> str:
    """The xxh3_128 of a record without its seal, as JSON in ASCII with sorted keys and without spaces."""
    found, separator = checksums.Checksums(), "{"
    for key in sorted(record.keys() - {SEAL}):
        value = record[key]
        found.update(f"{separator}{_compact(key)}:".encode())
        if isinstance(value, Mapping):  # perhaps with an entry for every tensor
            value = Section(value.items)
        if isinstance(value, Section):
            inner = "{"
            for lines in batched(value.lines()):
                found.update((inner + ",".join(lines)).encode())
                inner = ","
            found.update(b"}" if inner == "," else b"{}")
        else:
            found.update(_compact(value).encode())
        separator = ","
    found.update(b"}" if separator == "," else b"{}")
    return found.hex()["xxh3_128"]


def batched(items: Iterator[str]) -> Iterator[list[str]]:
    """Items in lists of a thousand, which makes the cost of each call small."""
    return iter(lambda: list(itertools.islice(items, 1000)), [])


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
