"""``journal.json``: whose merge an unfinished output is, and how far its commit has come."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardmerge.destinations.local.stage import placed, read_json
from shardmerge.destinations.record import (
    JOURNAL,
    RECORD_NAME,
    damaged_record,
    files_of_merge,
    has_damaged_record,
    own_names,
)
from shardmerge.errors import OutputError, ResumeError
from shardmerge.spec.plans import Fingerprint
from shardmerge.system import durable
from shardmerge.system.directory import Entry


class Journal:
    """The journal of an output that is locked. It is read once, and from then on what it says is known."""

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
        """Of the merge that this is; empty where it is none."""
        return str(self._state.get("digest") or "")

    @property
    def placed(self) -> list[str]:
        """The files that the commit has put, or was about to put, into the output."""
        return placed(self._state)

    def open(self, digest: str, fingerprint: Fingerprint, overwrite: bool) -> bool:
        """Read the journal; whether it is of this very merge.

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
        """Of the output and the folders around it, those that were made for this merge, the innermost first."""
        found, known = [], self._state.get("made")
        places = [self._root.path, *self._root.path.parents]
        for path, before in zip(places, known if isinstance(known, list) else (), strict=False):
            if not before or before != _identity(path):
                break
            found.append(path)
        return found

    def begin(self, digest: str, fingerprint: Fingerprint, made: Sequence[Path]) -> None:
        """Write down that the output is now of this merge.

        The files that another merge's commit has put into the output or was about to remove stay until this merge
        commits: they may be all of a model that is still good.
        """
        stale = [*reversed(self.placed), *own_names(self._state.get("stale"))]
        merge = {"digest": digest, "fingerprint": fingerprint, "made": [_identity(path) for path in made]}
        self._write(merge, False, (), stale)

    def begin_commit(self, new_files: Sequence[str]) -> None:
        """From here on finished shards may be in the output itself. ``new_files`` ends with what makes it a model.

        A merge that is being replaced stops being a model first: its index, or its only shard, is removed before its
        other files. That they were removed is written down before the new files come, which may have the same names.
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
        """What is wrong with the record of a finished merge that is there (empty if nothing), and the merge's files.

        The record is read again only if it is another: that of a large model takes 100 MB while it is read.
        """
        output = self._root.path
        status = (self._root / RECORD_NAME).status()
        now = status and (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if now is None or now != self._finished[0]:
            damage = damaged_record(output) if has_damaged_record(output) else ""
            self._finished = now, damage, [] if damage else files_of_merge(output)
        return self._finished[1:]

    def remove(self) -> None:
        """The output is complete; nothing is left to resume."""
        durable.remove(self._file)

    def _write(
        self, merge: Mapping[str, Any], committing: bool, places: Collection[str], stale: Collection[str]
    ) -> None:
        state = {key: merge.get(key) for key in ("digest", "fingerprint", "made")}
        state |= {"committing": committing, "places": [*places], "stale": [*stale]}
        durable.write_file(self._file, [json.dumps(state).encode()])
        self._state = state


def _identity(path: Path) -> list[int]:
    """Of a directory. Whoever prepares an output elsewhere cannot know those of the folders around it here."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_dev, status.st_ino]


# --- in what two merges differ ----------------------------------------------------------------------------------------

_PARTS: Mapping[str, str] = {
    "base": "the base",
    "adapters": "the adapter",
    "files": "files beside the weights",
    "config": "the config",
    "program": "the program",
    "work": "what the program makes of them",
}
#: Differences of a part that are named.
_NAMED = 4


def _difference(before: Any, now: Fingerprint) -> str:
    """In what the unfinished merge differs from this one, by the names in their fingerprints."""
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
