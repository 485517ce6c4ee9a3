"""The system's limits of this process (``ulimit``): memory, threads, open files, the size of a file.

Python and torch report an exceeded limit in many ways, and torch may end the process without a message. So its needs
are checked before it is imported, and errors are explained by the limit in force.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardmerge.errors import LimitError, ShardmergeError
from shardmerge.system.memory_use import status_bytes

_MB = 1_000_000
#: Address space and data for torch's import and its first product, without the files of its libraries. Measured with
#: torch 2.13 for the CPU; with less it ends the process without a message.
_SPACE, _DATA = 280 * _MB, 190 * _MB
#: Needs of the smallest plan.
_PROGRAM = {resource.RLIMIT_AS: 64 * _MB, resource.RLIMIT_DATA: 48 * _MB}
#: If less of a limit is left (a share, or bytes), any error is attributed to it: a half-imported module lacks names.
_SHARE_LEFT, _LEFT = 0.2, 32 * _MB
_MEMORY = re.compile(
    r"failed to map segment|cannot (allocate|map|create).*memory|can't allocate memory|not enough memory|bad_alloc"
    r"|cannot allocate|out of memory|unable to (mmap|allocate)",
    re.IGNORECASE,
)
_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable", re.IGNORECASE)
#: Limit of memory → its use in /proc, its name, and the command that sets it in KiB.
_OF_MEMORY = {
    resource.RLIMIT_AS: ("VmPeak", "address space", "ulimit -v"),
    resource.RLIMIT_DATA: ("VmData", "data", "ulimit -d"),
}


def check_room() -> None:
    """`LimitError` if the program itself does not fit into the limits of memory.

    With less, some libraries end the process or print confusing messages.
    """
    for kind, needed in _PROGRAM.items():
        limit = _limit(kind)
        if limit is not None and limit < needed:
            raise LimitError(f"{_said_of_memory(kind, limit)}, and to plan a merge takes {_shown(needed)}; raise it")


def check_room_for_torch(working_set: int = 0) -> None:
    """`LimitError` if torch and ``working_set`` bytes do not fit into the limits of memory."""
    needs = {resource.RLIMIT_AS: _SPACE + _library_bytes() + working_set, resource.RLIMIT_DATA: _DATA + working_set}
    for kind, needed in needs.items():
        limit, used = _limit(kind), status_bytes("VmSize" if kind == resource.RLIMIT_AS else "VmData")
        if limit is not None and used is not None and used + needed > limit:
            raise LimitError(
                f"{_said_of_memory(kind, limit)}, and with torch it needs about {_shown(used + needed)}; raise it"
            )


def explained(error: BaseException) -> str | None:
    """The limit that caused an error, for a person; None if it was none."""
    if isinstance(error, LimitError):
        return str(error)
    text, number = str(error), getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return _files()
    if number == errno.EFBIG:
        return _file_size()
    is_of_threads = number == errno.EAGAIN or _THREADS.search(text) is not None
    is_of_memory = isinstance(error, MemoryError) or number == errno.ENOMEM or _MEMORY.search(text) is not None
    if is_of_threads and not any(_is_near(kind) for kind in _OF_MEMORY):
        return _threads()
    if is_of_memory or is_of_threads or any(_is_near(kind) for kind in _OF_MEMORY):
        return _memory()
    return None


def explained_while_loading(error: BaseException) -> str | None:
    """`explained` for an error of an import: if memory is limited, a half-imported module may raise any."""
    is_limited = any(_limit(kind) is not None for kind in _OF_MEMORY)
    return explained(error) or (_memory() if is_limited else None)


@contextmanager
def within(state: str) -> Iterator[None]:
    """Turn errors in the block that a limit explains into a `LimitError` with the ``state`` of the output."""
    try:
        yield
    except LimitError as error:
        raise LimitError(f"{error}. {state}") from None
    except ShardmergeError:
        raise
    except Exception as error:
        if (why := explained(error)) is None:
            raise
        raise LimitError(f"{why}. {state}") from None


def hint(text: str) -> str:
    """An explanation to add to a message with the system's words for a limit; empty for any other."""
    said = {errno.EMFILE: _files, errno.EFBIG: _file_size, errno.ENOMEM: _memory}
    return next((f". {say()}" for number, say in said.items() if os.strerror(number) in text), "")


def cores() -> int:
    """Cores that this process may use; a container or taskset may limit them."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


# --- messages ---------------------------------------------------------------------------------------------------------


def _memory() -> str:
    limits = [(kind, limit) for kind in _OF_MEMORY if (limit := _limit(kind)) is not None]
    if not limits:
        return "memory ran out, though no limit (ulimit -v) is set: the machine has too little that is free"
    nearest = next(((kind, limit) for kind, limit in limits if _is_near(kind)), limits[0])
    return f"memory ran out: {_said_of_memory(*nearest)}; raise it, or give the process less to do"


def _said_of_memory(kind: int, limit: int) -> str:
    _, what, command = _OF_MEMORY[kind]
    return f"this process may have {_shown(limit)} of {what} ({command} {limit // 1024})"


def _threads() -> str:
    limit = _limit(resource.RLIMIT_NPROC)
    of = "no limit is set (ulimit -u)" if limit is None else f"this user may have {limit:,} (ulimit -u)"
    return f"no further thread or process could be started: {of}; raise it, or end others"


def _files() -> str:
    limit = _limit(resource.RLIMIT_NOFILE)
    of = "no limit is set" if limit is None else f"this process may have {limit:,}"
    return f"too many files are open: {of} (ulimit -n); raise it to 1024"


def _file_size() -> str:
    limit = _limit(resource.RLIMIT_FSIZE)
    if limit is None:
        return "the file system does not hold files of that size"
    return f"a file of this process may have {limit:,} bytes (ulimit -f {limit // 1024}); raise it"


def _shown(size: int) -> str:
    return f"{size / _MB:,.0f} MB"


# --- limits in force --------------------------------------------------------------------------------------------------


def _limit(kind: int) -> int | None:
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _is_near(kind: int) -> bool:
    limit, used = _limit(kind), status_bytes(_OF_MEMORY[kind][0])
    return limit is not None and used is not None and used > limit - max(_LEFT, _SHARE_LEFT * limit)


def _library_bytes() -> int:
    """Bytes of torch's libraries, which are mapped whole."""
    with suppress(ImportError, ValueError, OSError):
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None:
            libraries = Path(spec.origin).parent.joinpath("lib").glob("lib*.so*")
            return sum(path.stat().st_size for path in libraries)
    return 0
