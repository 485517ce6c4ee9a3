"""What an unfinished merge leaves on the disk, so that it can be taken up, and so that nobody takes it for a model.

``OUTPUT/.shardmerge/`` holds the lock, ``journal.json`` (whose merge this is), ``stage/`` (shards, each under its own
name once it is durable) and ``receipts/`` (one a shard, written after the shard). The folder goes when the output is
complete.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from shardmerge import durable
from shardmerge.errors import OutputError, ResumeError
from shardmerge.spec import Receipt, ShardPlan, jsonable

FOLDER = ".shardmerge"
RECORD_NAME = "shardmerge.json"
_JOURNAL = "journal.json"
_HOLDER = "holder"


def is_unfinished(output: Path) -> bool:
    """Whether the directory holds a merge of ours that was not finished."""
    return (output / FOLDER / _JOURNAL).is_file()


def read_record(output: Path) -> dict[str, Any] | None:
    """The record of the finished merge in a directory, or None."""
    return _read_json(output / RECORD_NAME)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Journal:
    """The work on one output, locked while this object is entered."""

    def __init__(self, output: Path, digest: str, overwrite: bool) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.stage = self.folder / "stage"
        self.digest = digest
        self.overwrite = overwrite
        self._receipts = self.folder / "receipts"
        self._lock = FileLock(self.folder / "lock")
        self._created = not output.exists()

    # --- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> Journal:
        durable.make_directory(self.folder)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResumeError(
                f"{self.output}: another shardmerge works on it ({self._holder()}); nothing was changed"
            ) from None
        except OSError as error:
            raise durable.output_error(self.output, "locking", error) from None
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _holder(self) -> str:
        try:
            return (self.folder / _HOLDER).read_text().strip()
        except OSError:
            return "process unknown"

    def _begin(self) -> None:
        self._say_who()
        state = _read_json(self.folder / _JOURNAL)
        if state is None and not self.overwrite and read_record(self.output) is not None:
            raise ResumeError(
                f"{self.output}: a merge was finished here after this one was planned; nothing was changed. Choose "
                "another output.path, or replace it with --overwrite"
            )
        if state is not None and state.get("digest") != self.digest and not self.overwrite:
            raise ResumeError(
                f"{self.output}: holds an unfinished merge of another base, adapter or config; nothing was "
                "changed. Run it with what it was begun with, choose another output.path, or start anew with "
                "--overwrite"
            )
        if state is None or state.get("digest") != self.digest:
            for leftover in (self.stage, self._receipts):
                _remove_tree(leftover)
            self._write_state(stale=_stale_files(state or {}))
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
        state = {"digest": self.digest, "committing": committing, "places": [*places], "stale": [*stale]}
        durable.write_file(self.folder / _JOURNAL, [json.dumps(state).encode()])

    # --- shards -------------------------------------------------------------------------------------------------------

    def receipt(self, shard: ShardPlan) -> Receipt | None:
        """The receipt of a shard that an earlier run finished for this very plan, if its file is still there."""
        value = _read_json(self._receipts / f"{shard.name}.json")
        if value is None or value.get("digest") != self.digest or value.get("nbytes") != shard.nbytes:
            return None
        places = [self.stage / shard.name]
        if (_read_json(self.folder / _JOURNAL) or {}).get("committing"):
            places.append(self.output / shard.name)
        if not any(place.is_file() and place.stat().st_size == shard.nbytes for place in places):
            return None
        return Receipt(shard.name, self.digest, shard.nbytes, tuple(value.get("active_adapters", ())))

    def record(self, receipt: Receipt) -> None:
        """Say, durably, that a shard is finished."""
        durable.write_file(self._receipts / f"{receipt.shard}.json", [json.dumps(jsonable(receipt)).encode()])

    # --- the end ------------------------------------------------------------------------------------------------------

    def begin_commit(self, new_files: Sequence[str]) -> None:
        """From here on finished shards may be in the output itself. ``new_files`` ends with what makes it a model.

        A merge that is being replaced stops being a model first: its index, or its only shard, is removed before its
        other files. That they were removed is written down before the new files come, which may have the same names.
        """
        state = _read_json(self.folder / _JOURNAL) or {}
        stale = _own_names(state.get("stale"))
        if not state.get("committing"):
            stale = [*reversed(_own_names((read_record(self.output) or {}).get("files"))), *stale]
            self._write_state(committing=True, places=new_files, stale=stale)
        for name in stale:
            durable.remove(self.output / name)
        if stale:
            self._write_state(committing=True, places=new_files)

    def finish(self) -> None:
        """The output is complete; nothing is left to take up."""
        _remove_tree(self.folder)
        durable.fsync_directory(self.output)

    def discard(self) -> None:
        """Remove all work on a merge that cannot succeed, and the directory if it was made for it."""
        _remove_tree(self.folder)
        if self._created and not any(self.output.iterdir()):
            self.output.rmdir()


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
