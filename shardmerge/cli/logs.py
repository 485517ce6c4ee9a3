"""``--log FILE`` and ``-v``: a record of what a command does, in a file or on stderr."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from shardmerge.cli import environment
from shardmerge.cli.printing import say
from shardmerge.errors import ConfigError, PlanError, ShardmergeError
from shardmerge.system.durable import write_all
from shardmerge.system.events import LOG, event
from shardmerge.system.installation import installed_version
from shardmerge.system.interrupt import INTERRUPTED
from shardmerge.system.terminal_text import shown, shown_json
from shardmerge.version import __version__

#: How every log begins. A file that begins otherwise is not written to.
_FIRST = b'{"time": "'
_META = "shardmerge.log"


class LogFile(logging.Handler):
    """Appends a line of JSON for every record, at once.

    Where the first line cannot be written, the file is refused; where a later one cannot, that is said once, and the
    work goes on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.is_new = not path.exists()
        self._fd: int | None = self._open()

    def _open(self) -> int:
        # Reading shows whose file it is; without O_NONBLOCK a FIFO would wait for a reader.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise self._refused(f"cannot be opened: {error.strerror}") from None
        try:
            self._check(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, fd: int) -> None:
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode):
            return
        if not stat.S_ISREG(status.st_mode):
            raise self._refused("is not a file")
        if status.st_size and os.pread(fd, len(_FIRST), 0) != _FIRST:
            raise self._refused("holds something else than a log of shardmerge; name a file that is new, or such a log")
        if status.st_size and os.pread(fd, 1, status.st_size - 1) != b"\n":
            write_all(fd, b"\n")  # whoever wrote there was stopped within a line

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(f"--log {self.path}: {why}; nothing was done")

    def emit(self, record: logging.LogRecord) -> None:
        if self._fd is None:
            return
        try:
            write_all(self._fd, _line(record))
        except OSError as error:
            self.close()
            if getattr(record, "event", "") == "begin":
                raise self._refused(f"cannot be written to: {error.strerror}") from None
            say(f"warning: --log {self.path}: {error.strerror}; the log ends here, the work goes on", err=True)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        super().close()


def _line(record: logging.LogRecord) -> bytes:
    when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
    value = {
        "time": when.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": getattr(record, "event", "message"),
        **getattr(record, "facts", {}),
        "text": record.getMessage(),
        "pid": record.process,
    }
    return f"{shown_json(json.dumps(value, default=str))}\n".encode()


class _Text(logging.Handler):
    """A line on stderr for every record but those whose text a command prints by itself."""

    _PRINTED = frozenset({"warning", "note", "end"})

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", "") in self._PRINTED:
            return
        line = shown(f"[{time.monotonic() - self._started:7.1f} s] {record.getMessage()}")
        if "tqdm" in sys.modules:  # a bar may be on the line
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
        else:
            click.echo(line, err=True)


def logged(command: Callable[..., None]) -> Callable[..., None]:
    """A command with ``--log`` and ``-v``; within it, what is done is recorded."""

    @click.option(
        "--log",
        "log_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        envvar=environment.LOG,
        show_envvar=True,
        help="Append what is done to FILE, as lines of JSON.",
    )
    @click.option(
        "-v",
        "--verbose",
        count=True,
        envvar=environment.VERBOSE,
        show_envvar=True,
        help="Say on stderr what is done, step by step; -vv also every tensor that is merged.",
    )
    @functools.wraps(command)
    def with_log(*arguments: Any, log_file: Path | None, verbose: int, **options: Any) -> None:
        with _recorded(click.get_current_context(), log_file, verbose):
            command(*arguments, **options)

    return with_log


@contextmanager
def _recorded(context: click.Context, log_file: Path | None, verbose: int) -> Iterator[None]:
    """Have records written from a line on the machine to one on how it ended."""
    handlers: list[logging.Handler] = [LogFile(log_file)] if log_file is not None else []
    context.meta[_META] = handlers[0] if handlers else None
    handlers += [_Text()] if verbose else []
    before = LOG.level
    for handler in handlers:
        LOG.addHandler(handler)
    if handlers:
        LOG.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    try:
        _begin(context.info_name or "")
        with _end():
            yield
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()
        LOG.setLevel(before)


def keep_log_out_of(output: str | Path) -> None:
    """`ConfigError` where the log would be a file of the output."""
    log: LogFile | None = click.get_current_context().meta.get(_META)
    if log is not None and Path(output).expanduser().resolve() in log.path.resolve().parents:
        log.close()
        if log.is_new:
            log.path.unlink(missing_ok=True)
        raise ConfigError(
            f"--log {log.path}: is in the output {output}, which holds nothing but the model; nothing was done"
        )


def _begin(command: str) -> None:
    cores = os.cpu_count() or 0
    event(
        "begin",
        f"shardmerge {__version__} {command}, Python {platform.python_version()}, {cores} cores",
        command=command,
        arguments=sys.argv[1:],
        folder=os.getcwd(),
        environment={name: os.environ[name] for name in environment.KNOWN if name in os.environ},
        shardmerge=__version__,
        python=platform.python_version(),
        torch=installed_version("torch"),
        platform=platform.platform(),
        host=platform.node(),
        cores=cores,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


@contextmanager
def _end() -> Iterator[None]:
    """Record how the block ended, and with which exit code."""
    started = time.monotonic()

    def ended(code: int, text: str, **facts: Any) -> None:
        level = logging.ERROR if code else logging.INFO
        event("end", text, level=level, exit_code=code, seconds=round(time.monotonic() - started, 3), **facts)

    try:
        yield
    except PlanError as error:
        ended(error.exit_code, str(error).partition("\n")[0], error="PlanError", problems=list(error.problems))
        raise
    except (ShardmergeError, click.ClickException) as error:
        ended(error.exit_code, str(error), error=type(error).__name__)
        raise
    except click.exceptions.Exit as error:
        ended(error.exit_code, "interrupted" if error.exit_code == INTERRUPTED else "not as it must be")
        raise
    except KeyboardInterrupt:
        ended(INTERRUPTED, "interrupted")
        raise
    except BaseException as error:
        ended(1, repr(error), error=type(error).__name__, traceback=traceback.format_exc())
        raise
    ended(0, "done")
