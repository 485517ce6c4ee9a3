"""What an unfinished merge leaves on the disk, so that it can be taken up, and so that nobody takes it for a model.

``OUTPUT/.shardmerge/`` holds the lock, ``journal.json`` (whose merge this is), ``stage/`` (shards, each under its own
name once it is durable) and ``receipts/`` (one a shard, written after the shard). The folder goes when the output is
complete.

What is taken up is read once and compared with its checksum: after a crash, a disk may not have what it said it had.
Reading a shard takes a fraction of the time of making it again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from shardmerge import checksums, durable
from shardmerge.errors import OutputError, ResumeError, SourceError
from shardmerge.sources import open_reader
from shardmerge.spec import Fidelity, Fingerprint, Receipt, ShardPlan, SourceFile, digest_of

FOLDER = ".shardmerge"
RECORD_NAME = "shardmerge.json"
#: The record's key for its own checksum.
SEAL = "record_checksum"
_JOURNAL = "journal.json"
_HOLDER = "holder"


def is_unfinished(output: Path) -> bool:
    """Whether the directory holds a merge of ours that was not finished."""
    return (output / FOLDER / _JOURNAL).is_file()


def read_record(output: Path) -> dict[str, Any] | None:
    """The record of the finished merge in a directory, or None."""
    return _read_json(output / RECORD_NAME)


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own checksum as its last key, which tells whether it was changed or damaged since."""
    return {**record, SEAL: seal(record)}


def seal(record: Mapping[str, Any]) -> str:
    """The xxh3_128 of all of a record but its seal, as JSON in ASCII with sorted keys and without spaces."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    found = checksums.Checksums()
    found.update(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    return found.hex()["xxh3_128"]


def work_bytes(output: Path) -> int:
    """What an unfinished merge already has on the disk of its shards, those among them that it has put into place."""
    folder = output / FOLDER
    state = _read_json(folder / _JOURNAL) or {}
    places = _own_names(state.get("places")) if state.get("committing") else []
    stage = folder / "stage"
    files = [*(stage.iterdir() if stage.is_dir() else ()), *(output / name for name in places)]
    return sum(file.stat().st_size for file in files if file.is_file())


def model_bytes(output: Path) -> int:
    """What the finished merge in a directory takes; 0 where there is none."""
    files = [output / name for name in _own_names((read_record(output) or {}).get("files"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Journal:
    """The work on one output, locked while this object is entered."""

    def __init__(self, output: Path, overwrite: bool) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.stage = self.folder / "stage"
        self.overwrite = overwrite
        #: What makes the merge this one and no other; see `begin`.
        self.digest = ""
        #: Shards of which the disk has not kept what was written.
        self.damaged: list[str] = []
        self._fingerprint: Fingerprint = {}
        #: What the journal says, as it was last read or written.
        self._state: dict[str, Any] = {}
        self._receipts = self.folder / "receipts"
        self._lock = FileLock(self.folder / "lock")
        #: Directories that this run has made, the innermost first; and how many of the output and the folders around it
        #: were made for this merge by it or an earlier run.
        self._new: list[Path] = []
        self._made = 0

    # --- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> Journal:
        self._new = durable.make_directory(self.folder)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResumeError(
                f"{self.output}: another shardmerge works on it ({self._holder()}); nothing was changed"
            ) from None
        except OSError as error:
            self._undo()
            raise durable.output_error(self.output, "locking", error) from None
        try:
            self._say_who()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.digest:
            self._undo()
        self._lock.release()

    def _undo(self) -> None:
        """Nothing was begun: leave no trace, unless it was there before."""
        if self.folder in self._new:
            shutil.rmtree(self.folder, ignore_errors=True)
            durable.remove_empty(self._new[1:])

    def _holder(self) -> str:
        try:
            return (self.folder / _HOLDER).read_text().strip()
        except OSError:
            return "process unknown"

    def begin(self, fingerprint: Fingerprint) -> None:
        """Take up what an earlier run of this very merge has done, or begin.

        `ResumeError` where the output holds other work and ``overwrite`` was not said; then nothing is changed.
        """
        digest = digest_of(fingerprint)
        state = _read_json(self.folder / _JOURNAL)
        self._state = state or {}
        if state is None and not self.overwrite and read_record(self.output) is not None:
            raise ResumeError(
                f"{self.output}: other work was finished here after this was planned; nothing was changed. Choose "
                "another output.path, or replace it with --overwrite"
            )
        if state is not None and state.get("digest") != digest and not self.overwrite:
            raise ResumeError(
                f"{self.output}: holds unfinished work on something else; nothing was changed. "
                f"{_difference(state.get('fingerprint'), fingerprint)}. Run it with what it was begun with, choose "
                "another output.path, or start anew with --overwrite"
            )
        self.digest, self._fingerprint = digest, fingerprint
        known = self._state.get("made")
        self._made = known if isinstance(known, int) else len([path for path in self._new if path != self.folder])
        if state is None or state.get("digest") != digest:
            for leftover in (self.stage, self._receipts):
                _remove_tree(leftover)
            self._write_state(stale=_stale_files(self._state))
        else:
            durable.fsync_directory(self.folder)  # an earlier run may have been killed before it came to that
        durable.make_directory(self.stage)
        durable.make_directory(self._receipts)

    def _say_who(self) -> None:
        holder = self.folder / _HOLDER
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        except OSError as error:
            raise durable.output_error(holder, "writing", error) from None

    def _write_state(
        self, *, committing: bool = False, places: Collection[str] = (), stale: Collection[str] = ()
    ) -> None:
        state = {
            "digest": self.digest,
            "fingerprint": self._fingerprint,
            "made": self._made,
            "committing": committing,
            "places": [*places],
            "stale": [*stale],
        }
        durable.write_file(self.folder / _JOURNAL, [json.dumps(state).encode()])
        self._state = state

    # --- shards -------------------------------------------------------------------------------------------------------

    def finished(self, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
        """The shards that an earlier run has finished for this very merge, by their receipts and their files' sizes."""
        return [shard for shard in shards if self._receipt(shard) and self._file(shard)]

    def take_up(self, shard: ShardPlan, sha256: bool, advance: Callable[[int], None]) -> Receipt | None:
        """Read a finished shard; its receipt, if the file still holds what was written. ``advance`` is told bytes."""
        receipt, path = self._receipt(shard), self._file(shard)
        if receipt is None or path is None:
            return None
        try:
            reader = open_reader(SourceFile(str(path), shard.nbytes))
            try:
                found = checksums.of_file(reader, shard.nbytes, sha256, advance)
            finally:
                reader.close()
        except SourceError:
            found = {}
        if found.get("xxh3_128") != receipt["xxh3_128"]:
            self.damaged.append(shard.name)
            return None
        fidelity = {name: Fidelity(*sums) for name, sums in receipt.get("fidelity", {}).items()}
        return Receipt(shard.name, shard.nbytes, found, tuple(receipt.get("active_adapters", ())), fidelity)

    def _receipt(self, shard: ShardPlan) -> dict[str, Any] | None:
        value = _read_json(self._receipts / f"{shard.name}.json") or {}
        mine = value.get("digest") == self.digest and value.get("bytes") == shard.nbytes
        return value if mine and isinstance(value.get("xxh3_128"), str) else None

    def _file(self, shard: ShardPlan) -> Path | None:
        places = [self.stage / shard.name]
        if self._state.get("committing"):
            places.append(self.output / shard.name)
        return next((place for place in places if place.is_file() and place.stat().st_size == shard.nbytes), None)

    def record(self, receipt: Receipt) -> None:
        """Say, durably, that a shard is finished."""
        value = {"digest": self.digest, **receipt.entry(), "active_adapters": [*receipt.active_adapters]}
        value["fidelity"] = {name: dataclasses.astuple(sums) for name, sums in receipt.fidelity.items()}
        durable.write_file(self._receipts / f"{receipt.shard}.json", [json.dumps(value).encode()])

    # --- the end ------------------------------------------------------------------------------------------------------

    def begin_commit(self, new_files: Sequence[str]) -> None:
        """From here on finished shards may be in the output itself. ``new_files`` ends with what makes it a model.

        A merge that is being replaced stops being a model first: its index, or its only shard, is removed before its
        other files. That they were removed is written down before the new files come, which may have the same names.
        """
        stale = _own_names(self._state.get("stale"))
        if not self._state.get("committing"):
            stale = [*reversed(_own_names((read_record(self.output) or {}).get("files"))), *stale]
            self._write_state(committing=True, places=new_files, stale=stale)
        for name in stale:
            durable.remove(self.output / name)
        if stale:
            durable.fsync_directory(self.output)  # an earlier run may have removed one and been killed before it did
            self._write_state(committing=True, places=new_files)

    def finish(self) -> None:
        """The output is complete; nothing is left to take up."""
        # First what says otherwise, or a crash in between would have it all done again.
        durable.remove(self.folder / _JOURNAL)
        _remove_tree(self.folder)
        durable.fsync_directory(self.output)

    def discard(self) -> None:
        """Remove all work on a merge that cannot succeed, and the directories that were made for it."""
        for name in reversed(_own_names(self._state.get("places"))) if self._state.get("committing") else ():
            durable.remove(self.output / name)
        _remove_tree(self.folder)
        durable.remove_empty([self.output, *self.output.parents][: self._made])


_PARTS: Mapping[str, str] = {
    "base": "the base",
    "adapters": "the adapter",
    "files": "files beside the weights",
    "config": "the config",
    "program": "the program",
    "work": "what the program makes of them",
}
_TOLD = 4


def _difference(before: Any, now: Fingerprint) -> str:
    """In what the unfinished merge differs from this one, by the names in their fingerprints."""
    if not isinstance(before, dict):
        return "What it was begun with is not known (another version of shardmerge?)"
    told: list[str] = []
    for part, what in _PARTS.items():
        if part == "work" and told:
            continue  # it follows from the others
        old, new = before.get(part), now.get(part)
        changes = list(_changes(old if isinstance(old, dict) else {}, new or {}))
        if changes:
            more = f", and {len(changes) - _TOLD} more" if len(changes) > _TOLD else ""
            told.append(f"{what} ({', '.join(changes[:_TOLD])}{more})")
    return f"Different are: {'; '.join(told)}"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if name not in old:
            yield f"{name} is new"
        elif name not in new:
            yield f"{name} is gone"
        elif old[name] != new[name]:
            long = any(isinstance(value, str) and len(value) > 30 for value in (old[name], new[name]))
            yield name if long else f"{name} was {old[name]}, is {new[name]}"


def _stale_files(state: dict[str, Any]) -> list[str]:
    """Files that another merge's commit has put into the output or was about to remove, in the order of removal.

    They stay until this merge commits: they may be all of a model that is still good.
    """
    places = _own_names(state.get("places")) if state.get("committing") else []
    return [*reversed(places), *_own_names(state.get("stale"))]


def _own_names(value: Any) -> list[str]:
    """The names in a record that lie inside the output, whatever the file says."""
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    return [name for name in names if name and not name.startswith("/") and ".." not in name.split("/")]


def _remove_tree(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {error.strerror or error}") from None
