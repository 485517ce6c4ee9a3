"""What can be known about the output directory before anything is written to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from shardmerge.destinations.journal import damaged_record
from shardmerge.destinations.record import believed_record, has_damaged_record
from shardmerge.destinations.work_folder import (
    FOLDER,
    is_unfinished,
    model_bytes,
    place_problems,
    work_bytes,
    work_problems,
)
from shardmerge.errors import PlanError
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.sources.local import LocalSource
from shardmerge.sources.source import Source
from shardmerge.spec.tensors import SourceFile
from shardmerge.spec.words import words_for

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def absolute(path: str) -> Path:
    """``output.path`` with ``~`` expanded. `PlanError` where nobody has that home."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise PlanError([f"output.path {path} cannot be used: {error}"]) from None


def output_problems(
    output: Path,
    checkpoint: Checkpoint,
    adapters: list[AdapterFile],
    names: Collection[str],
    needed: int,
    overwrite: bool,
) -> list[str]:
    """Everything that forbids to write files of these ``names``, and of ``needed`` bytes, to ``output``."""
    if problems := _attempt(output, lambda: _check_place(output, checkpoint, adapters, overwrite)):
        return problems
    links = _attempt(output, lambda: _check_links(output, names))
    return [*links, *_attempt(output, lambda: check_space(output, needed))]


def _attempt(output: Path, check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except (OSError, RuntimeError, ValueError) as error:  # too long, below a file, not to be looked at, a zero byte
        return [f"output.path {output} cannot be used: {_reason(error)}"]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _check_links(output: Path, names: Collection[str]) -> list[str]:
    """A link, FIFO or folder where a merge would write or remove a file or look for one: somebody has put it there."""
    mine = [
        f"output.path {output}: {problem}, which no merge puts there; it is neither followed nor removed. Remove it "
        f"yourself, or all of {FOLDER} (an unfinished merge then begins anew), or choose another path"
        for problem in work_problems(output)
    ]
    return mine or [
        f"output.path {output}: {problem}, where the merge would write or remove a file; it is not followed. Remove it "
        "yourself, or choose another path"
        for problem in place_problems(output, names)
    ]


def check_alone(output: Path, overwrite: bool) -> list[str]:
    """What forbids writing to ``output`` whatever base and adapters are."""
    try:
        return _check_itself(output, overwrite)
    except (OSError, RuntimeError, ValueError) as error:
        return [f"output.path {output} cannot be used: {error}"]


def _check_place(output: Path, checkpoint: Checkpoint, adapters: list[AdapterFile], overwrite: bool) -> list[str]:
    problems = _overlap(output, "base", checkpoint.source)
    problems = problems or _linked_into(output, "base", [shard.file for shard in checkpoint.shards])
    for adapter in adapters:
        found = _overlap(output, "adapter", adapter.source)
        problems += found or _linked_into(output, "adapter", adapter.all_files)
    return problems or _check_itself(output, overwrite)


def _check_itself(output: Path, overwrite: bool) -> list[str]:
    if output.is_symlink() and not output.exists():
        return [f"output.path {output} is a link that leads nowhere"]
    if output.exists() and not output.is_dir():
        return [f"output.path {output} is a file; it must be a directory"]
    return _not_empty(output, overwrite)


def _overlap(output: Path, what: str, source: Source) -> list[str]:
    if not isinstance(source, LocalSource):
        return []
    target, root = output.resolve(), Path(source.root).resolve()
    if target == root:
        return [f"output.path {output} is the directory of the {what}; the {what} is never written to"]
    if source.only is None and root in target.parents:
        return [f"output.path {output} lies inside the {what} {root}; choose a place beside it"]
    if target in root.parents and _entries(target):
        return [f"output.path {output} holds the {what} {root}; choose a place beside it"]
    return []


def _linked_into(output: Path, what: str, files: Iterable[SourceFile]) -> list[str]:
    """Weights may be links to anywhere, so to the output as well, which would be replaced while they are read."""
    target = output.resolve()
    found = [file.uri for file in files if os.path.islink(file.uri) and target in Path(file.uri).resolve().parents]
    if not found:
        return []
    return [
        f"output.path {output} holds what {len(found)} files of the {what} are links to, for example {found[0]}; the "
        f"{what} is never written to. Choose another path"
    ]


def _entries(output: Path) -> list[str]:
    try:
        return sorted(entry for entry in os.listdir(output) if entry != FOLDER)
    except FileNotFoundError:
        return []


def _not_empty(output: Path, overwrite: bool) -> list[str]:
    entries = _entries(output)
    if not entries:
        return []
    is_resumed = is_unfinished(output)
    if has_damaged_record(output) and (overwrite or is_resumed):
        return [f"output.path {output}: {damaged_record(output)}"]
    if is_resumed:
        return []
    record = believed_record(output)
    finished = record is not None
    if not overwrite:
        what = (
            f"already holds a finished {_noun(record)}" if finished else f"is not empty ({', '.join(entries[:3])}, …)"
        )
        return [f"output.path {output} {what}; choose another path, or replace it with overwrite=True"]
    weights = [entry for entry in entries if entry.endswith(_WEIGHT_SUFFIXES)]
    if weights and not finished:
        return [
            f"output.path {output} holds weights that shardmerge did not write ({', '.join(weights[:3])}); "
            "overwrite=True does not touch them: remove them yourself, or choose another path"
        ]
    return []


def _noun(record: Mapping[str, Any] | None) -> str:
    adapters = (record or {}).get("adapters")
    return words_for(adapters if isinstance(adapters, list) else [None]).noun


def check_space(output: Path, needed: int) -> list[str]:
    """Whether ``needed`` bytes fit on the output's file system, work of an earlier run already counted."""
    place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        return [f"output.path {output}: {place} cannot be written to"]
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    missing = needed - work_bytes(output) - free
    if missing <= 0:
        return []
    problem = (
        f"output.path {output}: too little disk: shardmerge writes {needed:,} bytes, {free:,} are free on that file "
        f"system; {missing:,} are missing"
    )
    old = model_bytes(output)
    if missing <= old:
        # Never of its own accord: until the new model is complete, the old one may be the only one there is.
        problem += (
            f". The model that is there takes {old:,} and is kept until the new one is complete; if you can do without "
            f"it, remove {output} yourself, and there is room"
        )
    return [problem]
