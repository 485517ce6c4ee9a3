"""Opens untrusted local files so that none can block the reader or be read without end.

A FIFO blocks until somebody writes, a device may be endless, and a file may be larger than memory. All code that reads
a file by its path opens it here; small files (configs, records, journals) are read whole here.
"""

from __future__ import annotations

import errno
import os
import stat

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


def kind_of(mode: int) -> str:
    """The kind of a file with this ``st_mode``: ``"a link"``, ``"a FIFO"`` and so on."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


class NotRegularError(OSError):
    """A FIFO, a device, a socket or a directory is in the place of a file. ``mode`` is its ``st_mode``."""

    def __init__(self, path: str | os.PathLike[str], mode: int = 0) -> None:
        kind = _KINDS.get(stat.S_IFMT(mode), "a socket or a device")
        super().__init__(errno.EINVAL, f"is {kind}; expected a regular file", os.fspath(path))


class TooLargeError(OSError):
    """A file is larger than any file of its kind."""

    def __init__(self, path: str | os.PathLike[str], limit: int) -> None:
        super().__init__(errno.EFBIG, f"is larger than {limit:,} bytes", os.fspath(path))


def open_regular(
    path: str | os.PathLike[str], *, follow_link: bool = True, dir_fd: int | None = None
) -> tuple[int, os.stat_result]:
    """A read-only descriptor of a regular file, and its status.

    ``follow_link`` False refuses a path whose last part is a link (`OSError` with ``ELOOP``). Raises `OSError`, among
    them `NotRegularError`.
    """
    # Opening a device may have effects. If one replaces the file after this check, O_NONBLOCK prevents waiting; for a
    # regular file the flag has no effect.
    _check_kind(path, os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_link))
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_link else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise NotRegularError(path) from None
        raise
    try:
        status = os.fstat(fd)
        _check_kind(path, status)
        return fd, status
    except BaseException:
        os.close(fd)
        raise


def _check_kind(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):  # opening a link reports ELOOP
        raise NotRegularError(path, status.st_mode)


def read_small(
    path: str | os.PathLike[str], limit: int, *, follow_link: bool = True, dir_fd: int | None = None
) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises `OSError`, among them `NotRegularError` and `TooLargeError`. At most ``limit`` + 1 bytes are read, even if
    the file grows.
    """
    fd, _ = open_regular(path, follow_link=follow_link, dir_fd=dir_fd)
    with open(fd, "rb", buffering=0) as file:
        chunks, left = [], limit + 1
        while left and (chunk := file.read(min(left, 1 << 20))):
            chunks.append(chunk)
            left -= len(chunk)
    if not left:
        raise TooLargeError(path, limit)
    return b"".join(chunks)


def why_not_readable(path: str | os.PathLike[str]) -> str:
    """Why a file cannot be read, to follow its name in a message; empty if it can."""
    try:
        os.close(open_regular(path)[0])
    except NotRegularError as error:
        return str(error.strerror)
    except FileNotFoundError:
        return "is a link that leads nowhere" if os.path.islink(path) else "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""
