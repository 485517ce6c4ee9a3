"""Errors for want of memory, threads or files say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shardmerge.errors import (
    LimitError,
    ShardmergeError,
)
from shardmerge.system import limits

if TYPE_CHECKING:
    pass


@contextmanager
def within_limits(state: str) -> Iterator[None]:
    """What goes wrong within for want of memory, threads or files is a `LimitError` that says so, and the ``state``."""
    try:
        yield
    except ShardmergeError as error:
        if isinstance(error, LimitError):
            raise LimitError(f"{error}. {state}") from None
        raise
    except Exception as error:
        if (why := limits.explained(error)) is None:
            raise
        raise LimitError(f"{why}. {state}") from None
