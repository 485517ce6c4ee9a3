"""Whether a directory holds a merge that was not finished. Asked by whatever is given a directory as a model."""

from __future__ import annotations

import os
from pathlib import Path

#: The folder in an output that holds an unfinished merge, and the file in it that says whose merge it is.
FOLDER, JOURNAL = ".shardmerge", "journal.json"


def is_unfinished(output: Path) -> bool:
    """Whether the directory holds a merge of ours that was not finished."""
    return os.path.lexists(output / FOLDER / JOURNAL)


def left_behind(output: Path) -> str | None:
    """The name of a work folder beside a finished model, which may be removed; None where there is none."""
    folder = output / FOLDER
    return FOLDER if folder.is_dir() and not folder.is_symlink() else None


def is_work(name: str) -> bool:
    """Whether a folder of this name in an output is an unfinished merge, and not a part of the model."""
    return name == FOLDER
