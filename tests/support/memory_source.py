"""A source in memory, written against the protocols alone: a proof that nothing needs files of this machine.

A location is ``memory:`` and a word. Every `put` is a new version of a file.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from shardmerge.errors import ChangedError, MissingError, SourceError
from shardmerge.sources.source import Reader, Source
from shardmerge.spec.tensors import SourceFile

SCHEME = "memory:"
IS_PINNED = False
_versions = count(1)
_files: dict[str, dict[str, tuple[bytes, int]]] = {}


def put(location: str, name: str, content: bytes) -> None:
    """Store a file, as a new version of it where there is one."""
    _files.setdefault(location, {})[name] = content, next(_versions)


def put_folder(location: str, folder: Path) -> str:
    """Store what a folder holds; its location."""
    for path in folder.rglob("*"):
        if path.is_file():
            put(location, path.relative_to(folder).as_posix(), path.read_bytes())
    return location


@dataclass(frozen=True)
class MemorySource:
    location: str
    local_path: Path | None = None
    revision: str | None = None
    note: str | None = None

    def directory(self) -> Source:
        return self

    def names(self) -> list[str]:
        return sorted(name for name in _files[self.location] if not f"/{name}".count("/."))

    def leads_out(self, name: str) -> bool:
        return False

    def stat(self, name: str) -> SourceFile:
        content, version = self._found(name)
        return SourceFile(f"{self.location}/{name}", len(content), mtime_ns=version)

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self._found(name)[0][offset : offset + size]

    def fetch(self, name: str) -> Path:
        content, _ = self._found(name)
        path = Path(tempfile.mkdtemp()) / Path(name).name
        path.write_bytes(content)
        return path

    def _found(self, name: str) -> tuple[bytes, int]:
        if name not in _files[self.location]:
            raise SourceError(f"{self.location}/{name}: there is no such file")
        return _files[self.location][name]


class MemoryReader(Reader):
    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._place = file.uri.partition("/")[::2]
        self.check()
        self._content = _files[self._place[0]][self._place[1]][0]

    def read_into(self, offset: int, view: memoryview) -> None:
        found = self._content[offset : offset + len(view)]
        if len(found) < len(view):
            raise SourceError(f"{self._file.uri}: ends at byte {len(self._content)}")
        view[:] = found

    def check(self) -> None:
        content, version = _files.get(self._place[0], {}).get(self._place[1], (b"", 0))
        if not version:
            raise SourceError(f"{self._file.uri}: there is no such file")
        if len(content) != self._file.size or self._file.mtime_ns not in (0, version):
            raise ChangedError(f"{self._file.uri}: changed since the plan was made")


def open_source(location: str) -> MemorySource:
    if location not in _files:
        raise MissingError(f"{location}: no such place")
    return MemorySource(location)


def open_reader(file: SourceFile) -> MemoryReader:
    return MemoryReader(file)
