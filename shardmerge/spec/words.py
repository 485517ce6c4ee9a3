"""What the work is called: a merge where there are adapters, else an export."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """The words for one kind of work in messages, progress and reports."""

    noun: str
    doing: str
    done: str


MERGE = Words("merge", "merging", "merged")
EXPORT = Words("export", "exporting", "exported")


def words_for(adapters: Sized) -> Words:
    """The words for a config, plan or record with these adapters."""
    return MERGE if len(adapters) else EXPORT
