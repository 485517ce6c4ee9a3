"""``OUTPUT/.shardmerge``, looked at before a merge begins. Nothing is written.

Whoever prepared a directory may have put anything there. A merge makes folders and regular files, so anything else is
refused by name, and so is a folder of the output that is a link where a file would be written or removed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from shardmerge.destinations.record import RECORD_NAME, files_of_merge, json_object, own_names
from shardmerge.system.directory import Directory, Entry, LinkError
from shardmerge.system.durable import TEMPORARY_SUFFIX

FOLDER = ".shardmerge"
JOURNAL, HOLDER, LOCK, STAGE, RECEIPTS = "journal.json", "holder", "lock", "stage", "receipts"
#: Bytes of a journal or a receipt at most.
_LARGEST = 64 << 20


def is_unfinished(output: Path) -> bool:
    """Whether the directory holds a merge of ours that was not finished."""
    return os.path.lexists(output / FOLDER / JOURNAL)


def read_json(file: Entry) -> dict[str, Any] | None:
    """A journal or a receipt; None where none can be read."""
    try:
        return json_object(file.read_small(_LARGEST))
    except OSError:
        return None


def read_state(root: Directory) -> dict[str, Any]:
    """What the journal in an open output says; empty where there is none."""
    return read_json(root / FOLDER / JOURNAL) or {}


def work_bytes(output: Path) -> int:
    """What an unfinished merge already has on the disk of its shards, those among them that it has put into place."""
    try:
        with Directory(output) as root:
            state, stage = read_state(root), root / FOLDER / STAGE
            places = own_names(state.get("places")) if state.get("committing") else []
            staged = stage.names() if stage.status() is not None else []
            return _sizes([*(stage / name for name in staged), *(root / name for name in places)])
    except OSError:  # none that could be taken up
        return 0


def model_bytes(output: Path) -> int:
    """What the finished merge in a directory takes; 0 where there is none."""
    try:
        with Directory(output) as root:
            return _sizes([root / name for name in files_of_merge(output)])
    except OSError:
        return 0


def _sizes(files: Collection[Entry]) -> int:
    return sum(status.st_size for file in files if (status := file.file_status()) is not None)


# --- what must not be there -------------------------------------------------------------------------------------------


def work_problems(output: Path) -> list[str]:
    """What in the work folder no merge has put there: links, FIFOs, devices, folders in the place of files."""
    try:
        with Directory(output) as root:
            return [f"{entry} is {what}" for entry, what in _odd(root / FOLDER)]
    except FileNotFoundError:
        return []


def _odd(folder: Entry) -> Iterator[tuple[Entry, str]]:
    status = folder.status()
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        yield folder, kind(status)
        return
    for name in folder.names():
        inner = folder / name
        if folder.name == FOLDER and name in (STAGE, RECEIPTS):
            yield from _odd(inner)
        elif (status := inner.status()) is not None and not stat.S_ISREG(status.st_mode):
            yield inner, kind(status)
        elif status is not None and status.st_nlink > 1:
            yield inner, "a hard link: the same file has another name"


def place_problems(output: Path, names: Collection[str]) -> list[str]:
    """Why files of these names cannot be written or removed in an output.

    A folder on the way to one may be a link or a file, and a folder may be in its place. The names in the journal and
    the record that are there are looked at, too.
    """
    try:
        with Directory(output) as root:
            state = read_state(root)
            own = [*own_names(state.get("places")), *own_names(state.get("stale")), *files_of_merge(output)]
            made = [f"{name}{ending}" for name in (*names, RECORD_NAME) for ending in ("", TEMPORARY_SUFFIX)]
            found = (_place_problem(root / name) for name in (*made, *own))
            return [*dict.fromkeys(text for text in found if text)]
    except FileNotFoundError:
        return []


def _place_problem(file: Entry) -> str:
    try:
        status = file.status()
    except LinkError as error:
        return f"{error.filename} is a link"
    except NotADirectoryError:
        return f"{file.parent} is not a folder"
    return f"{file} is a directory" if status is not None and stat.S_ISDIR(status.st_mode) else ""


def kind(status: os.stat_result) -> str:
    """``"a link"``, ``"a FIFO"``, ``"a directory"`` and so on."""
    kinds = {stat.S_IFLNK: "link", stat.S_IFIFO: "FIFO", stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket"}
    kinds |= {stat.S_IFREG: "file", stat.S_IFBLK: "device", stat.S_IFCHR: "device"}
    return f"a {kinds.get(stat.S_IFMT(status.st_mode), 'special file')}"
