"""An output directory, held open, and its entries. No link in it leads outside.

A directory may contain links, and another process may replace a folder by a link between a check and its use. So paths
are not used: every step names one entry of an open directory, and a link on the way is an error. Files are created
anew, never overwritten, so other hard links to a file keep its bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shardmerge.system.regular_files import open_regular, read_small

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: Depth of the folders that `Entry.remove_tree` empties. Ours are two deep.
_DEEPEST = 16


class LinkError(OSError):
    """A link is in the place of a folder or a file of ours."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.ELOOP, f"{path.name} is a link, and none is followed there", os.fspath(path))


class Directory:
    """A directory by its descriptor, whatever its path leads to by now. The path itself may lead through links."""

    def __init__(self, path: Path, inode: int | None = None) -> None:
        """``inode``: that of the only directory that `open` accepts, if it is known."""
        self.path = path
        self._inode = inode
        self._fd = -1

    def __reduce__(self) -> tuple[type[Directory], tuple[Path, int | None]]:
        # Another process gets it closed, and must open the same directory.
        return Directory, (self.path, self._inode)

    @property
    def fd(self) -> int:
        return self._fd

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    @property
    def here(self) -> Entry:
        """The directory as an entry."""
        return Entry(self, ())

    def __truediv__(self, name: str) -> Entry:
        return self.here / name

    def open(self) -> Directory:
        """Open it. `OSError` if it is missing, or is not the directory that was opened before."""
        self._fd = os.open(self.path, _OPEN_DIRECTORY)
        inode = os.fstat(self._fd).st_ino
        if self._inode not in (None, inode):
            self.close()
            raise OSError(errno.ESTALE, "another directory has taken its place", os.fspath(self.path))
        self._inode = inode
        return self

    def close(self) -> None:
        """Close it. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Directory:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder in an open `Directory`, by name. All methods raise `OSError`.

    A link on the way to it is a `LinkError`. If it is a link itself, it can only be removed or replaced.
    """

    root: Directory
    parts: tuple[str, ...]

    def __truediv__(self, name: str) -> Entry:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts or ".." in parts or name.startswith("/") or "\0" in name:
            raise ValueError(f"{name!r} is not a name within a directory")
        return Entry(self.root, (*self.parts, *parts))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        """For messages, and for reading files that nobody is expected to change."""
        return self.root.path.joinpath(*self.parts)

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def parent(self) -> Entry:
        return Entry(self.root, self.parts[:-1])

    def with_ending(self, ending: str) -> Entry:
        """``model.safetensors`` with ``.tmp`` → ``model.safetensors.tmp``."""
        return Entry(self.root, (*self.parts[:-1], self.name + ending))

    # --- looking ------------------------------------------------------------------------------------------------------

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """A descriptor of this folder."""
        fd = self.root.fd
        try:
            for number, part in enumerate(self.parts, 1):
                inner = _open_folder(part, fd, self.root.path.joinpath(*self.parts[:number]))
                outer, fd = fd, inner
                if outer != self.root.fd:
                    os.close(outer)
            yield fd
        finally:
            if fd != self.root.fd:
                os.close(fd)

    def status(self) -> os.stat_result | None:
        """Its own status, not a link's target's; None if it, or a folder on the way, does not exist."""
        try:
            with self.parent.descriptor() as folder:
                return os.stat(self.name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def file_status(self) -> os.stat_result | None:
        """`status` if it is a regular file, else None."""
        with suppress(OSError):
            status = self.status()
            return status if status is not None and stat.S_ISREG(status.st_mode) else None
        return None

    def names(self) -> list[str]:
        """The names in this folder, sorted."""
        with self.descriptor() as fd:
            return sorted(os.listdir(fd))

    def read_small(self, limit: int) -> bytes:
        """The content of a regular file of at most ``limit`` bytes; see `regular_files.read_small`."""
        with self.parent.descriptor() as folder:
            return read_small(self.name, limit, follow_link=False, dir_fd=folder)

    # --- changing -----------------------------------------------------------------------------------------------------

    def create(self) -> int:
        """A descriptor for reading and writing of a new, empty file, which replaces any other. umask applies."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self.parent.descriptor() as folder:
            try:
                return os.open(self.name, flags, 0o666, dir_fd=folder)
            except FileExistsError:
                os.unlink(self.name, dir_fd=folder)
            return os.open(self.name, flags, 0o666, dir_fd=folder)

    def ensure_file(self) -> os.stat_result:
        """The status of a regular file, which is created if it does not exist."""
        with self.parent.descriptor() as folder:
            with suppress(FileExistsError):
                os.close(os.open(self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder))
            fd, status = open_regular(self.name, follow_link=False, dir_fd=folder)
            os.close(fd)
            return status

    def replace(self, target: Entry) -> None:
        """Rename it to ``target``, which is replaced."""
        with self.parent.descriptor() as source, target.parent.descriptor() as folder:
            os.replace(self.name, target.name, src_dir_fd=source, dst_dir_fd=folder)

    def unlink(self) -> None:
        with self.parent.descriptor() as folder:
            os.unlink(self.name, dir_fd=folder)

    def mkdir(self) -> None:
        with self.parent.descriptor() as folder:
            os.mkdir(self.name, dir_fd=folder)

    def rmdir(self) -> None:
        with self.parent.descriptor() as folder:
            os.rmdir(self.name, dir_fd=folder)

    def remove_tree(self) -> None:
        """Remove a folder and everything in it. Links are removed, not followed."""
        with self.parent.descriptor() as folder:
            _remove_tree(self.name, folder, self.path, _DEEPEST)


def _open_folder(name: str, folder: int, path: Path) -> int:
    try:
        return os.open(name, _OPEN_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        # For a link, Linux reports ENOTDIR, other systems ELOOP.
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and _is_link(name, folder):
            raise LinkError(path) from None
        raise


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _remove_tree(name: str, folder: int, path: Path, deepest: int) -> None:
    if not deepest:
        raise OSError(errno.ENOTEMPTY, "its folders are too deep", os.fspath(path))
    fd = _open_folder(name, folder, path)
    try:
        for inner in sorted(os.listdir(fd)):
            if stat.S_ISDIR(os.stat(inner, dir_fd=fd, follow_symlinks=False).st_mode):
                _remove_tree(inner, fd, path / inner, deepest - 1)
            else:
                os.unlink(inner, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=folder)
