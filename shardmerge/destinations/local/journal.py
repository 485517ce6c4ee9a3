"""The folder of an unfinished merge, ``OUTPUT/.shardmerge``: its journal, its finished shards and their receipts.

It holds the lock, ``journal.json`` (which merge this is, and how far its commit has come), ``stage/`` (shards, each
under its own name once it is durable) and ``receipts/`` (one for each shard, written after it). The folder is removed
when the output is complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.destinations.record import (
    FOLDER,
    JOURNAL,
    RECORD_NAME,
    damaged_record,
    files_of_merge,
    has_damaged_record,
    json_object,
    own_names,
)
from shardmerge.destinations.shard_writer import ShardWriter
from shardmerge.errors import OutputError, ResumeError
from shardmerge.spec.plans import Fingerprint, ShardPlan
from shardmerge.spec.receipts import Fidelity, Receipt
from shardmerge.system import durable
from shardmerge.system.directory import Directory, Entry

STAGE, RECEIPTS = "stage", "receipts"
#: The most bytes of a journal or a receipt.
_LARGEST = 64 << 20


def read_json(file: Entry) -> dict[str, Any] | None:
    """A journal or a receipt; None where none can be read."""
    try:
        return json_object(file.read_small(_LARGEST))
    except OSError:
        return None


def read_state(root: Directory) -> dict[str, Any]:
    """The content of an output's journal; empty where there is none."""
    return read_json(root / FOLDER / JOURNAL) or {}


def placed(state: dict[str, Any]) -> list[str]:
    """The files that a commit has put, or was about to put, into the output."""
    return own_names(state.get("places")) if state.get("committing") else []


def work_bytes(output: Path) -> int:
    """The bytes of an unfinished merge that are on the disk already, staged or in place."""
    try:
        with Directory(output) as root:
            stage = root / FOLDER / STAGE
            staged = stage.names() if stage.status() is not None else []
            return _sizes([*(stage / name for name in staged), *(root / name for name in placed(read_state(root)))])
    except OSError:  # nothing that could be resumed
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
    """The stage of one merge, which the ``digest`` of its fingerprint identifies.

    Other processes get a pickled copy. Each writes its own shards, and a receipt after each, so that no two processes
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
        """See `destination.Handle`. A finished shard has a receipt."""
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
        """The receipt of a shard, if it belongs to this merge. Whether the shard has those bytes is not checked."""
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


class Journal:
    """The journal of a locked output. It is read once, by `open`."""

    def __init__(self, folder: Entry) -> None:
        self._file = folder / JOURNAL
        self._root = folder.root
        self._state: dict[str, Any] = {}
        self._finished: tuple[object, str, list[str]] = (None, "", [])

    @property
    def is_committing(self) -> bool:
        """Whether finished shards may be in the output itself."""
        return bool(self._state.get("committing"))

    @property
    def digest(self) -> str:
        """The digest of the merge; empty where there is none."""
        return str(self._state.get("digest") or "")

    @property
    def placed(self) -> list[str]:
        """The files that the commit has put, or was about to put, into the output."""
        return placed(self._state)

    def open(self, digest: str, fingerprint: Fingerprint, overwrite: bool) -> bool:
        """Read the journal. Returns whether it belongs to this merge.

        `ResumeError` where the output holds other work and may not be overwritten; then nothing is changed.
        """
        output, state = self._root.path, read_json(self._file)
        self._state = state or {}
        if not self.is_committing and (damage := self._finished_merge()[0]):
            raise ResumeError(f"{output}: {damage}; nothing was changed")
        if state is None and not overwrite and (output / RECORD_NAME).exists():
            raise ResumeError(
                f"{output}: other work was finished here after this was planned; nothing was changed. Choose "
                "another output.path, or replace it with overwrite=True"
            )
        if state is not None and state.get("digest") != digest and not overwrite:
            raise ResumeError(
                f"{output}: holds unfinished work on something else; nothing was changed. "
                f"{_difference(state.get('fingerprint'), fingerprint)}. Run it with what it was begun with, choose "
                "another output.path, or start anew with overwrite=True"
            )
        return state is not None and state.get("digest") == digest

    def made(self) -> list[Path]:
        """The output and folders around it that were made for this merge, the innermost first."""
        found, known = [], self._state.get("made")
        places = [self._root.path, *self._root.path.parents]
        for path, before in zip(places, known if isinstance(known, list) else (), strict=False):
            if not before or before != _identity(path):
                break
            found.append(path)
        return found

    def begin(self, digest: str, fingerprint: Fingerprint, made: Sequence[Path]) -> None:
        """Write down that the output now belongs to this merge.

        Files that another merge's commit has put into the output or was about to remove stay until this merge commits:
        they may be a whole model.
        """
        stale = [*reversed(self.placed), *own_names(self._state.get("stale"))]
        merge = {"digest": digest, "fingerprint": fingerprint, "made": [_identity(path) for path in made]}
        self._write(merge, False, (), stale)

    def begin_commit(self, new_files: Sequence[str]) -> None:
        """Write down that finished shards may now be in the output itself, and remove the files of an older merge.

        ``new_files`` ends with the file that makes the output a model. The older merge stops being a model first: its
        index, or its only shard, is removed before its other files. Their removal is written down before the new files
        come, which may have the same names.
        """
        output, stale = self._root.path, own_names(self._state.get("stale"))
        if not self.is_committing:
            damage, finished = self._finished_merge()
            if damage:  # since this merge has begun
                raise OutputError(f"{output}: {damage}")
            stale = [*reversed(finished), *stale]
            self._write(self._state, True, new_files, stale)
        for name in stale:
            durable.remove(self._root / name)
        if stale:
            durable.fsync_directory(self._root.here)  # an earlier run may have been killed between removal and fsync
            self._write(self._state, True, new_files, ())

    def _finished_merge(self) -> tuple[str, list[str]]:
        """What is wrong with the record of a finished merge (empty if nothing), and that merge's files.

        The record is read again only if it has changed: reading that of a large model takes 100 MB.
        """
        output = self._root.path
        status = (self._root / RECORD_NAME).status()
        now = status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if now is None or now != self._finished[0]:
            damage = damaged_record(output) if has_damaged_record(output) else ""
            self._finished = now, damage, [] if damage else files_of_merge(output)
        return self._finished[1:]

    def remove(self) -> None:
        """Remove the journal: the output is complete."""
        durable.remove(self._file)

    def _write(
        self, merge: Mapping[str, Any], committing: bool, places: Collection[str], stale: Collection[str]
    ) -> None:
        state = {key: merge.get(key) for key in ("digest", "fingerprint", "made")}
        state |= {"committing": committing, "places": [*places], "stale": [*stale]}
        durable.write_file(self._file, [json.dumps(state).encode()])
        self._state = state


def _identity(path: Path) -> list[int]:
    """A directory's device and inode, which nobody who prepares an output elsewhere can know."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_dev, status.st_ino]


_PARTS: Mapping[str, str] = {
    "base": "the base",
    "adapters": "the adapter",
    "files": "files beside the weights",
    "config": "the config",
    "program": "the program",
    "work": "what the program makes of them",
}
#: The most differences of a part that are named.
_NAMED = 4


def _difference(before: Any, now: Fingerprint) -> str:
    """The differences between the unfinished merge and this one, by the names in their fingerprints."""
    if not isinstance(before, dict):
        return "What it was begun with is not known (another version of shardmerge?)"
    found: list[str] = []
    for part, what in _PARTS.items():
        if part == "work" and found:
            continue  # it follows from the others
        old, new = before.get(part), now.get(part)
        changes = list(_changes(old if isinstance(old, dict) else {}, new or {}))
        if changes:
            more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
            found.append(f"{what} ({', '.join(changes[:_NAMED])}{more})")
    return f"Different are: {'; '.join(found)}"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if name not in old:
            yield f"{name} is new"
        elif name not in new:
            yield f"{name} is gone"
        elif old[name] != new[name]:
            long = any(isinstance(value, str) and len(value) > 30 for value in (old[name], new[name]))
            yield name if long else f"{name} was {old[name]}, is {new[name]}"
