"""What a piece of work is called: a merge where there are adapters, else an export."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """The words for one kind of work, as messages, progress and reports have them."""

    noun: str
    doing: str
    done: str


MERGE = Words("merge", "merging", "merged")
EXPORT = Words("export", "exporting", "exported")


def words_for(adapters: Sized) -> Words:
    """By a config's, a plan's or a record's adapters."""
    return MERGE if len(adapters) else EXPORT
