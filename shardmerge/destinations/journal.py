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
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from shardmerge.destinations.record import (
    RECORD_NAME,
    SEAL,
    believed_record,
    files_of_merge,
    has_damaged_record,
    is_whole,
    own_names,
    read_record,
    seal,
    sealed,
)
from shardmerge.destinations.work_folder import (
    FOLDER,
    HOLDER,
    JOURNAL,
    LOCK,
    RECEIPTS,
    STAGE,
    is_unfinished,
    model_bytes,
    place_problems,
    read_json,
    work_bytes,
    work_problems,
)
from shardmerge.errors import OutputError, ResumeError, SourceError
from shardmerge.sources.source import open_reader
from shardmerge.spec.plans import Fidelity, Fingerprint, Receipt, ShardPlan, digest_of
from shardmerge.spec.tensors import SourceFile
from shardmerge.system import checksums, durable
from shardmerge.system.directory import Directory
from shardmerge.system.regular_files import why_not_readable

__all__ = [
    "FOLDER",
    "RECORD_NAME",
    "SEAL",
    "Journal",
    "believed_record",
    "damaged_record",
    "has_damaged_record",
    "is_unfinished",
    "model_bytes",
    "place_problems",
    "read_record",
    "seal",
    "sealed",
    "work_bytes",
    "work_problems",
]

#: Bytes of what says who holds the lock.
_HOLDER_BYTES = 1000


class Journal:
    """The work on one output, locked while this object is entered."""

    def __init__(self, output: Path, overwrite: bool) -> None:
        self.output = output
        #: The output, held open while this object is entered: nothing is done in it by a path.
        self.root = Directory(output)
        self.stage = self.root / FOLDER / STAGE
        self.overwrite = overwrite
        #: What makes the merge this one and no other; see `begin`.
        self.digest = ""
        #: Shards of which the disk has not kept what was written.
        self.damaged: list[str] = []
        self._fingerprint: Fingerprint = {}
        #: What the journal says, as it was last read or written.
        self._state: dict[str, Any] = {}
        self._folder = self.root / FOLDER
        self._receipts = self._folder / RECEIPTS
        self._lock: FileLock | None = None
        #: A descriptor of the work folder, as long as the lock is held.
        self._locked_in = -1
        #: Of the output and the folders around it, those that this run has made, the innermost first; whether it has
        #: made the work folder; and which of the former were made for this merge by it or an earlier run.
        self._new: list[Path] = []
        self._is_new = False
        self._made: list[Path] = []

    # --- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> Journal:
        self._new = durable.make_directory(self.output)
        try:
            durable.open_directory(self.root)
            self._is_new = durable.make_folder(self._folder)
            self._acquire()
        except BaseException as error:
            if not isinstance(error, ResumeError):  # what is there is another's
                self._undo()
            self._unlock()
            self.root.close()
            raise
        try:
            self._say_who()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _acquire(self) -> None:
        lock = self._folder / LOCK
        try:
            # filelock opens it by a path, and empties it: it must be a file with no other name, in our own folder.
            if lock.ensure_file().st_nlink > 1:
                raise OutputError(f"{lock}: has another name, and to lock it could change that file; remove it")
            with self._folder.descriptor() as folder:
                self._locked_in = os.dup(folder)
            self._lock = FileLock(_path_of(self._locked_in, self._folder.path) / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResumeError(
                f"{self.output}: another shardmerge works on it ({self._holder()}); nothing was changed"
            ) from None
        except OSError as error:
            raise durable.output_error(self.output, "locking", error) from None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._locked_in >= 0:
            os.close(self._locked_in)
            self._locked_in = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.digest:
            self._undo()
        self._unlock()
        self.root.close()

    def _undo(self) -> None:
        """Nothing was begun: leave no trace, unless it was there before."""
        if self._is_new:
            with suppress(OSError):
                self._folder.remove_tree()
        durable.remove_empty(self._new)

    def _holder(self) -> str:
        try:
            return (self._folder / HOLDER).read_small(_HOLDER_BYTES).decode(errors="replace").strip()
        except OSError:
            return "process unknown"

    def begin(self, fingerprint: Fingerprint) -> None:
        """Take up what an earlier run of this very merge has done, or begin.

        `ResumeError` where the output holds other work and ``overwrite`` was not said; then nothing is changed.
        """
        digest = digest_of(fingerprint)
        state = read_json(self._folder / JOURNAL)
        self._state = state or {}
        if not self._state.get("committing") and has_damaged_record(self.output):
            raise ResumeError(f"{self.output}: {damaged_record(self.output)}; nothing was changed")
        if state is None and not self.overwrite and (self.output / RECORD_NAME).exists():
            raise ResumeError(
                f"{self.output}: other work was finished here after this was planned; nothing was changed. Choose "
                "another output.path, or replace it with overwrite=True"
            )
        if state is not None and state.get("digest") != digest and not self.overwrite:
            raise ResumeError(
                f"{self.output}: holds unfinished work on something else; nothing was changed. "
                f"{_difference(state.get('fingerprint'), fingerprint)}. Run it with what it was begun with, choose "
                "another output.path, or start anew with overwrite=True"
            )
        self.digest, self._fingerprint = digest, fingerprint
        self._made = _still_there(self.output, self._state.get("made")) or self._new
        if state is None or state.get("digest") != digest:
            for leftover in (self.stage, self._receipts):
                durable.remove_tree(leftover)
            self._write_state(stale=_stale_files(self._state))
        else:
            durable.fsync_directory(self._folder)  # an earlier run may have been killed before it came to that
        durable.make_folder(self.stage)
        durable.make_folder(self._receipts)

    def _say_who(self) -> None:
        holder = self._folder / HOLDER
        try:
            descriptor = holder.create()
            try:
                durable.write_all(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise durable.output_error(holder, "writing", error) from None

    def _write_state(
        self, *, committing: bool = False, places: Collection[str] = (), stale: Collection[str] = ()
    ) -> None:
        state = {
            "digest": self.digest,
            "fingerprint": self._fingerprint,
            "made": [_identity(path) for path in self._made],
            "committing": committing,
            "places": [*places],
            "stale": [*stale],
        }
        durable.write_file(self._folder / JOURNAL, [json.dumps(state).encode()])
        self._state = state

    # --- shards -------------------------------------------------------------------------------------------------------

    def finished(self, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
        """The shards that an earlier run has finished for this very merge, by their receipts and their files' sizes."""
        return [shard for shard in shards if self._receipt(shard) and self._file(shard)]

    def take_up(self, shard: ShardPlan, sha256: bool, advance: Callable[[int], None]) -> Receipt | None:
        """Read a finished shard; its receipt, if the file still holds what was written. ``advance`` is told bytes."""
        receipt, file = self._receipt(shard), self._file(shard)
        if receipt is None or file is None:
            return None
        try:
            reader = open_reader(file)
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
        value = read_json(self._receipts / f"{shard.name}.json") or {}
        mine = value.get("digest") == self.digest and value.get("bytes") == shard.nbytes
        return value if mine and isinstance(value.get("xxh3_128"), str) else None

    def _file(self, shard: ShardPlan) -> SourceFile | None:
        """Where a finished shard is, as it is now: a link that takes its place is not read."""
        places = [self.stage / shard.name]
        if self._state.get("committing"):
            places.append(self.root / shard.name)
        for place in places:
            if (status := place.file_status()) is not None and status.st_size == shard.nbytes:
                return SourceFile(str(place), shard.nbytes, status.st_mtime_ns, status.st_ino)
        return None

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
        stale = own_names(self._state.get("stale"))
        if not self._state.get("committing"):
            if has_damaged_record(self.output):  # since this merge has begun
                raise OutputError(f"{self.output}: {damaged_record(self.output)}")
            stale = [*reversed(files_of_merge(self.output)), *stale]
            self._write_state(committing=True, places=new_files, stale=stale)
        for name in stale:
            durable.remove(self.root / name)
        if stale:
            durable.fsync_directory(self.root.here)  # an earlier run may have removed one and been killed before it did
            self._write_state(committing=True, places=new_files)

    def finish(self) -> None:
        """The output is complete; nothing is left to take up."""
        # First what says otherwise, or a crash in between would have it all done again.
        durable.remove(self._folder / JOURNAL)
        durable.remove_tree(self._folder)
        durable.fsync_directory(self.root.here)

    def discard(self) -> None:
        """Remove all work on a merge that cannot succeed, and the directories that were made for it."""
        for name in reversed(own_names(self._state.get("places"))) if self._state.get("committing") else ():
            durable.remove(self.root / name)
        durable.remove_tree(self._folder)
        durable.remove_empty(self._made)

    def holds_model(self) -> bool:
        """Whether all files of a finished merge are in the output."""
        record = believed_record(self.output)
        return record is not None and is_whole(self.output, record)

    def standing(self) -> str:
        """Whether the output is a model at this moment, and which, as an error says it."""
        if not self.holds_model():
            return "The output is no model yet"
        record = believed_record(self.output) or {}
        if self._state.get("committing") and record.get("digest") == self.digest:
            return "All files of the new model are in place, but it is not certain that they are on the disk"
        return "The model that was there before is still whole"


def damaged_record(output: Path) -> str:
    """What is said where the record of a finished merge is not believed."""
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


def _identity(path: Path) -> list[int]:
    """Of a directory. Whoever prepares an output elsewhere cannot know those of the folders around it here."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_dev, status.st_ino]


def _still_there(output: Path, identities: Any) -> list[Path]:
    """Of the output and the folders around it, those that an earlier run says it made, by their identities."""
    found = []
    for path, known in zip([output, *output.parents], identities if isinstance(identities, list) else (), strict=False):
        if not known or known != _identity(path):
            break
        found.append(path)
    return found


def _path_of(folder: int, path: Path) -> Path:
    """A path to an open folder that stays the folder's, whatever is put into its place; else its own ``path``."""
    held = Path(f"/proc/self/fd/{folder}")
    return held if held.is_dir() else path


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
    places = own_names(state.get("places")) if state.get("committing") else []
    return [*reversed(places), *own_names(state.get("stale"))]
