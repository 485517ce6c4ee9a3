"""Disks that fail: steps on the disk that are counted, refused or the last ones, and what a power failure leaves.

`Steps` patches functions of `os`, which is how all of shardmerge writes. `PowerFailure` looks on while a merge writes,
keeps in mind what has been made durable and what has not, and gives back every directory that the merge could have left
had the power failed after any of its steps.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What changes a disk.
WRITES = ("open", "write", "pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir")
#: Files and, as None, directories by their paths below a root.
Tree = dict[str, bytes | None]


@contextmanager
def _wrapped(names: Sequence[str], wrap: Callable[[str, Any], Any]) -> Iterator[None]:
    """Within, functions of `os` are what ``wrap`` makes of them, by name."""
    originals = {name: getattr(os, name) for name in names}
    for name, original in originals.items():
        setattr(os, name, wrap(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


class Cut(BaseException):
    """Raised where a step was to be taken. No handler of errors catches it."""


@dataclass
class Steps:
    """Counts calls of functions of `os`; from the one number ``at`` on, ``times`` of them ``fail`` instead."""

    names: tuple[str, ...]
    at: int = -1
    fail: Callable[[], Any] = lambda: None
    times: int = 1
    taken: list[str] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[Steps]:
        with _wrapped(self.names, self._wrap):
            yield self

    def _wrap(self, name: str, original: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            if name != "open" or args[1] & os.O_CREAT:
                self.taken.append(name)
                if self.at <= len(self.taken) - 1 < self.at + self.times and self.at >= 0:
                    self.fail()
            return original(*args, **options)

        return step


def refuse(code: int) -> Callable[[], Any]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def cut() -> None:
    raise Cut


def die() -> None:
    """The end of this process, of which it hears nothing."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(act: Callable[[], object], seconds: float | None = None) -> int:
    """Run in a fork, which is safe where this process has no other thread; the exit status, negative for a signal.

    After ``seconds`` it is killed, if it has not ended.
    """
    child = os.fork()
    if child:
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # nobody else has its number: it has not been waited for
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        act()
        status = 0
    finally:
        os._exit(status)


@contextmanager
def few_bytes(count: Callable[[], int]) -> Iterator[None]:
    """A system that reads and writes only so many bytes at a time."""
    real = {name: getattr(os, name) for name in ("write", "pwrite", "preadv")}

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        read: int = real["preadv"](fd, [views[0][: count()]], offset)
        return read

    os.write = lambda fd, data: real["write"](fd, memoryview(data)[: count()])
    os.pwrite = lambda fd, data, offset: real["pwrite"](fd, memoryview(data)[: count()], offset)
    os.preadv = preadv  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


# --- trees ------------------------------------------------------------------------------------------------------------


def read_tree(root: Path) -> Tree:
    """All that lies below a directory."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def write_tree(root: Path, tree: Tree) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in sorted(tree):
        data = tree[name]
        if data is None:
            (root / name).mkdir(exist_ok=True)
        else:
            (root / name).write_bytes(data)


def key_of(tree: Tree) -> str:
    """The same for trees that differ only in who held the lock."""
    kept = sorted((name, data) for name, data in tree.items() if not name.endswith(("/lock", "/holder")))
    return hashlib.sha256(repr(kept).encode()).hexdigest()


# --- power failures ---------------------------------------------------------------------------------------------------


class _File:
    """``synced`` is None until the first fsync."""

    def __init__(self, data: bytes = b"", synced: bytes | None = None) -> None:
        self.now = bytearray(data)
        self.synced = synced


class _Folder:
    """``pending`` are the changes since the last fsync, in order: names that go or come, in one go."""

    def __init__(self) -> None:
        self.now: Entries = {}
        self.synced: Entries = {}
        self.pending: list[Change] = []

    def change(self, changed: Change) -> None:
        self.pending.append(changed)
        _apply(self.now, changed)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.now), []

    def after(self, count: int) -> Entries:
        entries = dict(self.synced)
        for changed in self.pending[:count]:
            _apply(entries, changed)
        return entries


Node = _File | _Folder
Entries = dict[str, Node]
Change = dict[str, _File | _Folder | None]


def _apply(entries: Entries, changed: Change) -> None:
    for name, value in changed.items():
        if value is None:
            entries.pop(name, None)
        else:
            entries[name] = value


def _load(path: Path) -> _Folder:
    folder = _Folder()
    for entry in path.iterdir():
        data = b"" if entry.is_dir() else entry.read_bytes()
        folder.now[entry.name] = _load(entry) if entry.is_dir() else _File(data, data)
    folder.sync()
    return folder


Names = Callable[[_Folder], int]
Data = Callable[[_File], bytes]


def _synced(file: _File) -> bytes:
    return file.synced or b""


def _zeros(file: _File) -> bytes:
    """The disk has heard of the size, and of what was not synced nothing else."""
    return bytes(file.now) if file.synced == bytes(file.now) else bytes(len(file.now))


def _written(file: _File) -> bytes:
    return bytes(file.now)


#: What may be left of what was not made durable: of the changes of names in a directory, and of the data in a file.
_LOSSES: tuple[tuple[Names, Data], ...] = (
    (lambda folder: 0, _synced),
    (lambda folder: 0, _written),
    (lambda folder: len(folder.pending), _synced),
    (lambda folder: len(folder.pending), _zeros),
    (lambda folder: len(folder.pending), _written),
)
#: Besides, of every directory and every file something else.
_CHANCES = 3


class PowerFailure:
    """Looks on from the time when all that lies below ``root`` is durable."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self._path = root
        self._root = _load(root)
        self._open: dict[int, Node] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.steps = 0
        #: Whether the power may fail.
        self.armed = True
        #: Every tree that may be left, with the first step after which it may.
        self.left: dict[str, tuple[str, Tree]] = {}

    @contextmanager
    def watching(self) -> Iterator[PowerFailure]:
        with _wrapped((*WRITES, "close"), self._wrap):
            yield self

    def _wrap(self, name: str, original: Any) -> Any:
        note: Callable[..., bool] = getattr(self, f"_note_{name}")

        def step(*args: Any, **options: Any) -> Any:
            with self._lock:
                # The disk itself need not hear of an fsync: that takes time.
                result = None if name == "fsync" else original(*args, **options)
                if note(result, *args, **options):
                    self.steps += 1
                    if self.armed:
                        self._fail(f"after step {self.steps}, {name}")
            return result

        return step

    def _fail(self, when: str) -> None:
        for number, (names, data) in enumerate(_LOSSES):
            self._leave(f"{when}, loss {number}", names, data)
        for chance in range(_CHANCES):
            self._leave(f"{when}, chance {chance}", *self._chance())

    def _chance(self) -> tuple[Names, Data]:
        def names(folder: _Folder) -> int:
            return self._random.randint(0, len(folder.pending))

        def data(file: _File) -> bytes:
            return self._random.choice((_synced, _zeros, _written))(file)

        return names, data

    def _leave(self, where: str, names: Names, data: Data) -> None:
        tree: Tree = {}

        def walk(folder: _Folder, prefix: str) -> None:
            for name, value in folder.after(names(folder)).items():
                if isinstance(value, _Folder):
                    tree[prefix + name] = None
                    walk(value, f"{prefix}{name}/")
                else:
                    tree[prefix + name] = data(value)

        walk(self._root, "")
        self.left.setdefault(key_of(tree), (where, tree))

    def _at(self, path: Any, dir_fd: int | None = None) -> tuple[_Folder, str] | None:
        """The folder that a path lies in and its name there; None if that is not on this disk."""
        if dir_fd is not None:
            opened = self._open.get(dir_fd)
            return (opened, os.fspath(path)) if isinstance(opened, _Folder) else None
        try:
            *folders, name = Path(os.fspath(path)).relative_to(self._path).parts
        except ValueError:
            return None
        found = self._root
        for folder in folders:
            inner = found.now.get(folder)
            if not isinstance(inner, _Folder):
                return None
            found = inner
        return found, name

    # What the steps do; True if it was something on this disk.

    def _note_open(
        self, descriptor: int, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> bool:
        if os.fspath(path) == os.fspath(self._path):
            self._open[descriptor] = self._root
            return False
        at = self._at(path, dir_fd)
        if at is None:
            return False
        folder, name = at
        node = folder.now.get(name)
        new = node is None
        if node is None:
            node = _File()
            folder.change({name: node})
        self._open[descriptor] = node
        if isinstance(node, _File) and flags & os.O_TRUNC:
            node.now.clear()
        return new or bool(flags & os.O_TRUNC)

    def _note_close(self, _: None, descriptor: int) -> bool:
        self._open.pop(descriptor, None)
        return False

    def _note_write(self, count: int, descriptor: int, data: Any) -> bool:
        file = self._open.get(descriptor)
        if not isinstance(file, _File):
            return False
        file.now += memoryview(data)[:count]  # nothing that writes so goes back in a file
        return True

    def _note_pwrite(self, count: int, descriptor: int, data: Any, offset: int) -> bool:
        file = self._open.get(descriptor)
        if not isinstance(file, _File):
            return False
        file.now.extend(bytes(max(0, offset - len(file.now))))
        file.now[offset : offset + count] = memoryview(data)[:count]
        return True

    def _note_fsync(self, _: None, descriptor: int) -> bool:
        node = self._open.get(descriptor)
        if isinstance(node, _File):
            node.synced = bytes(node.now)
        elif node is not None:
            node.sync()
        return node is not None

    def _note_replace(
        self, _: None, source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> bool:
        old, new = self._at(source, src_dir_fd), self._at(target, dst_dir_fd)
        if old is None or new is None:
            return False
        node = old[0].now[old[1]]
        if old[0] is new[0]:
            old[0].change({old[1]: None, new[1]: node})
        else:
            new[0].change({new[1]: node})
            old[0].change({old[1]: None})
        return True

    def _note_unlink(self, _: None, path: Any, *, dir_fd: int | None = None) -> bool:
        at = self._at(path, dir_fd)
        if at is not None:
            at[0].change({at[1]: None})
        return at is not None

    _note_rmdir = _note_unlink

    def _note_mkdir(self, _: None, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> bool:
        at = self._at(path, dir_fd)
        if at is not None:
            at[0].change({at[1]: _Folder()})
        return at is not None
