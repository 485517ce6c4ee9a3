"""A local directory as a destination.

An unfinished merge is in a folder of its own inside it (`journal`), so that nobody takes it for a model. Finished
shards of an earlier run are read once and compared with their checksums, since a disk may lose writes in a crash.
Reading a shard takes a fraction of the time of making it again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from shardmerge.destinations import contents
from shardmerge.destinations.local.checks import all_problems, problems_alone
from shardmerge.destinations.local.journal import Journal, Stage
from shardmerge.destinations.record import FOLDER, RECORD_NAME, believed_record
from shardmerge.errors import OutputError, PlanError, ResumeError, SourceError
from shardmerge.sources.source import open_reader
from shardmerge.spec.plans import AuxFile, Fingerprint, MergePlan, ShardPlan, digest_of
from shardmerge.spec.receipts import Receipt
from shardmerge.spec.tensors import SourceFile
from shardmerge.system import checksums, durable
from shardmerge.system.checksums import Checksums
from shardmerge.system.directory import Directory, Entry

LOCK, HOLDER = "lock", "holder"
#: The most bytes of the file that names the holder of the lock.
_HOLDER_BYTES = 1000


class LocalDirectory:
    """See `destination.Destination`. Within its block the directory is held open, and not accessed by its path."""

    def __init__(self, location: str, overwrite: bool) -> None:
        """`PlanError` where ``~`` names no home directory."""
        try:
            self.path = Path(location).expanduser().absolute()
        except RuntimeError as error:
            raise PlanError([f"output.path {location} cannot be used: {error}"]) from None
        self.overwrite = overwrite
        self._root = Directory(self.path)
        self._folder = self._root / FOLDER
        self._lock = _Lock(self._folder)
        self._journal = Journal(self._folder)
        self._plan: MergePlan | None = None
        self._stage: Stage | None = None
        #: The output and folders around it that this run made, the innermost first; whether it made the work folder;
        #: and those of the former that were made for this merge by this or an earlier run.
        self._new: list[Path] = []
        self._is_new = False
        self._made: list[Path] = []
        self._is_complete = False

    @property
    def location(self) -> str:
        return str(self.path)

    def problems(self, plan: MergePlan | None = None) -> list[str]:
        return all_problems(self.path, plan, self.overwrite) if plan else problems_alone(self.path, self.overwrite)

    # --- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> LocalDirectory:
        self._new = durable.make_directory(self.path)
        try:
            durable.open_directory(self._root)
            self._is_new = durable.make_folder(self._folder)
            self._lock.acquire()
        except BaseException as error:
            self._leave(undo=not isinstance(error, ResumeError))  # another process works there
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._leave(undo=self._stage is None)

    def _leave(self, undo: bool) -> None:
        """With ``undo`` remove everything that this run made."""
        if undo:
            if self._is_new:
                with suppress(OSError):
                    self._folder.remove_tree()
            durable.remove_empty(self._new)
        self._lock.release()
        self._root.close()

    # --- shards -------------------------------------------------------------------------------------------------------

    def begin(self, plan: MergePlan, fingerprint: Fingerprint) -> dict[str, Receipt]:
        digest = digest_of(fingerprint)
        is_resumed = self._journal.open(digest, fingerprint, self.overwrite)
        self._plan, self._stage = plan, Stage(self._root, digest, plan.sha256)
        stage = self._stage
        self._made = self._journal.made() or self._new
        if is_resumed:
            durable.fsync_directory(self._folder)  # an earlier run may have been killed before its fsync
        else:
            for leftover in (stage.shards, stage.receipts):
                durable.remove_tree(leftover)
            self._journal.begin(digest, fingerprint, self._made)
        durable.make_folder(stage.shards)
        durable.make_folder(stage.receipts)
        receipts = (stage.receipt(shard) for shard in plan.shards)
        return {receipt.shard: receipt for receipt in receipts if receipt and self._file(receipt)}

    def check(self, receipt: Receipt, advance: Callable[[int], None]) -> Receipt | None:
        file = self._file(receipt)
        if file is None:
            return None
        try:
            with open_reader(file) as reader:
                found = checksums.of_file(reader, receipt.nbytes, self.handle.sha256, advance)
        except SourceError:
            return None
        if found["xxh3_128"] != receipt.checksums["xxh3_128"]:
            return None
        return Receipt(receipt.shard, receipt.nbytes, found, receipt.active_adapters, receipt.fidelity)

    def _file(self, receipt: Receipt) -> SourceFile | None:
        """The file of a finished shard; a link in its place is not followed."""
        places = [self.handle.shards / receipt.shard]
        if self._journal.is_committing:
            places.append(self._root / receipt.shard)
        for place in places:
            if (status := place.file_status()) is not None and status.st_size == receipt.nbytes:
                return SourceFile(str(place), receipt.nbytes, status.st_mtime_ns, status.st_ino)
        return None

    @property
    def handle(self) -> Stage:
        assert self._stage is not None, "the merge is not begun"
        return self._stage

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self, record: Mapping[str, Any]) -> None:
        assert self._plan is not None, "the merge is not begun"
        self._journal.begin_commit(contents.files_of(self._plan))
        Commit(self._plan, self.handle.shards, self._root).run(record)
        self._is_complete = True
        self._clean_up()

    def _clean_up(self) -> None:
        # The journal first: after a crash in between, it would have the whole merge run again.
        self._journal.remove()
        durable.remove_tree(self._folder)
        durable.fsync_directory(self._root.here)

    def abort(self) -> None:
        """Also remove the directories that were made for the merge."""
        for name in reversed(self._journal.placed):
            durable.remove(self._root / name)
        durable.remove_tree(self._folder)
        durable.remove_empty(self._made)

    @property
    def is_resumable(self) -> bool:
        return self._stage is not None and not self._is_complete

    @property
    def holds_model(self) -> bool:
        record = believed_record(self.path)
        return record is not None and record.is_whole(self.path)

    def standing(self) -> str:
        if self._is_complete:
            return f"The model in {self.path} is complete; only its work folder is left"
        record = believed_record(self.path)
        if record is None or not record.is_whole(self.path):
            return "The output is not a model yet"
        if self._journal.is_committing and record.values.get("digest") == self._journal.digest:
            return "All files of the new model are in place, but it is not certain that they are on the disk"
        return "The model that was there before is still whole"


# --- the commit -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Commit:
    """Moves shards from the ``stage`` into the ``output`` and writes the files beside them.

    No crash leaves what looks like a model but is none: until the last step ``from_pretrained`` finds no weights. Run
    again after a crash, it continues where it stopped.
    """

    plan: MergePlan
    stage: Entry
    output: Directory

    def run(self, record: Mapping[str, Any]) -> None:
        """The index, or the only shard, makes the output a model: it comes last."""
        plan = self.plan
        *first, last = plan.shards
        for shard in first:
            self._place(shard)
        others = {aux.name: self._copy(aux) for aux in plan.aux}
        if plan.index_name is None:
            self._write(RECORD_NAME, contents.record_of(record, others))
            self._place(last)
        else:
            self._place(last)
            index = contents.index_of(plan)
            others[plan.index_name] = contents.entry_of(index, plan.sha256)
            self._write(RECORD_NAME, contents.record_of(record, others))
            self._write(plan.index_name, [index])

    def _place(self, shard: ShardPlan) -> None:
        staged, place = self.stage / shard.name, self.output / shard.name
        if staged.file_status() is not None:
            durable.rename(staged, place)
            return
        # An earlier run moved it, and was perhaps killed before this fsync.
        durable.fsync_directory(self.output.here)
        if (status := place.file_status()) is None or status.st_size != shard.nbytes:
            raise OutputError(f"{staged}: was finished, and is no longer there")

    def _copy(self, aux: AuxFile) -> dict[str, Any]:
        """Write a file beside the shards. Returns its entry in the record."""
        target, checksums = self.output / aux.name, Checksums(self.plan.sha256)
        durable.make_folder(target.parent)
        durable.write_file(target, contents.aux_chunks(aux, checksums))
        return contents.entry(aux.nbytes, checksums)

    def _write(self, name: str, content: Iterable[bytes]) -> None:
        durable.write_file(self.output / name, content)


# --- the lock ---------------------------------------------------------------------------------------------------------


class _Lock:
    """Held by the process that drives a merge, from `acquire` to `release` or to the end of the process."""

    def __init__(self, folder: Entry) -> None:
        self._folder = folder
        self._lock: FileLock | None = None
        #: A descriptor of the folder while the lock is held.
        self._locked_in = -1

    def acquire(self) -> None:
        """`ResumeError` where another process holds it."""
        output, lock = self._folder.root.path, self._folder / LOCK
        with durable.reported(output, "locking"):
            # filelock opens it by path and truncates it: it must be a file in our own folder with no other name.
            if lock.ensure_file().st_nlink > 1:
                raise OutputError(f"{lock}: has another name, and to lock it could change that file; remove it")
            with self._folder.descriptor() as folder:
                self._locked_in = os.dup(folder)
            self._lock = FileLock(_path_of(self._locked_in, self._folder.path) / LOCK)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise ResumeError(
                    f"{output}: another shardmerge works on it ({self._holder()}); nothing was changed"
                ) from None
        self._name_holder()

    def _name_holder(self) -> None:
        """Write down which process holds the lock, for the message of one that cannot get it."""
        holder = self._folder / HOLDER
        with durable.reported(holder, "writing"):
            descriptor = holder.create()
            try:
                durable.write_all(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            finally:
                os.close(descriptor)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._locked_in >= 0:
            os.close(self._locked_in)
            self._locked_in = -1

    def _holder(self) -> str:
        try:
            return (self._folder / HOLDER).read_small(_HOLDER_BYTES).decode(errors="replace").strip()
        except OSError:
            return "process unknown"


def _path_of(folder: int, path: Path) -> Path:
    """A path that leads to an open folder even if another takes its place; where there is none, its ``path``."""
    held = Path(f"/proc/self/fd/{folder}")
    return held if held.is_dir() else path
