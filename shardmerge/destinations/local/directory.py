"""A directory of this machine as a destination.

What is unfinished is in a folder of its own in it (`stage`), so that nobody takes it for a model. What is resumed is
read once and compared with its checksum: after a crash, a disk may not have what it said it had. Reading a shard takes
a fraction of the time of making it again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from shardmerge.destinations.contents import files_of
from shardmerge.destinations.local.checks import all_problems, problems_alone
from shardmerge.destinations.local.commit import Commit
from shardmerge.destinations.local.journal import Journal
from shardmerge.destinations.local.stage import Stage
from shardmerge.destinations.record import FOLDER, believed_record
from shardmerge.errors import OutputError, PlanError, ResumeError, SourceError
from shardmerge.sources.source import open_reader
from shardmerge.spec.plans import Fingerprint, MergePlan, digest_of
from shardmerge.spec.receipts import Receipt
from shardmerge.spec.tensors import SourceFile
from shardmerge.system import checksums, durable
from shardmerge.system.directory import Directory, Entry

LOCK, HOLDER = "lock", "holder"
#: Bytes of the file that names who holds the lock.
_HOLDER_BYTES = 1000


class LocalDirectory:
    """See `destination.Destination`. The directory is held open while this is entered: nothing is done by its path."""

    def __init__(self, location: str, overwrite: bool) -> None:
        """`PlanError` where ``~`` is the home of nobody."""
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
        #: Of the output and the folders around it, those that this run has made, the innermost first; whether it has
        #: made the work folder; and which of the former were made for this merge by it or an earlier run.
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
            self._leave(undo=not isinstance(error, ResumeError))  # what is there is another's
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(undo=self._stage is None)

    def _leave(self, undo: bool) -> None:
        """Where nothing was begun, ``undo`` leaves no trace, unless it was there before."""
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
            durable.fsync_directory(self._folder)  # an earlier run may have been killed before it came to that
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
        """Where a finished shard is, as it is now: a link that takes its place is not read."""
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
        self._journal.begin_commit(files_of(self._plan))
        Commit(self._plan, self.handle.shards, self._root).run(record)
        self._is_complete = True
        self._clean_up()

    def _clean_up(self) -> None:
        # First what says that the merge is unfinished, or a crash in between would have it all done again.
        self._journal.remove()
        durable.remove_tree(self._folder)
        durable.fsync_directory(self._root.here)

    def abort(self) -> None:
        """Remove also the directories that were made for the merge."""
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


# --- the lock ---------------------------------------------------------------------------------------------------------


class _Lock:
    """Held by the process that drives a merge, from `acquire` to `release`, and given back when that process ends."""

    def __init__(self, folder: Entry) -> None:
        self._folder = folder
        self._lock: FileLock | None = None
        #: A descriptor of the folder, as long as the lock is held.
        self._locked_in = -1

    def acquire(self) -> None:
        """`ResumeError` where another process holds it."""
        output, lock = self._folder.root.path, self._folder / LOCK
        with durable.reported(output, "locking"):
            # filelock opens it by a path, and empties it: it must be a file with no other name, in our own folder.
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
        """Write down which process holds the lock, for the message of one that cannot have it."""
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
    """A path to an open folder that stays the folder's, whatever is put into its place; else its own ``path``."""
    held = Path(f"/proc/self/fd/{folder}")
    return held if held.is_dir() else path
