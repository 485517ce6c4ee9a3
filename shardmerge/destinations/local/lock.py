"""The lock of an output: one merge at a time works on it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from shardmerge.destinations.local.layout import HOLDER, LOCK
from shardmerge.errors import OutputError, ResumeError
from shardmerge.system import durable
from shardmerge.system.directory import Entry

#: Bytes of the file that names who holds the lock.
_HOLDER_BYTES = 1000


class Lock:
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

    def name_holder(self) -> None:
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
