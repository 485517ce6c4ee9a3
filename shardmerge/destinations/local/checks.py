"""Checks of an output directory before anything is written to it.

Its content is untrusted. A merge makes folders and regular files, so anything else is refused by name, and so is a link
in place of a folder in which a file would be written or removed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from shardmerge.destinations.contents import files_of
from shardmerge.destinations.local.journal import RECEIPTS, STAGE, model_bytes, read_state, work_bytes
from shardmerge.destinations.record import (
    FOLDER,
    RECORD_NAME,
    believed_record,
    damaged_record,
    files_of_merge,
    has_damaged_record,
    is_unfinished,
    own_names,
)
from shardmerge.spec.plans import MergePlan
from shardmerge.spec.tensors import SourceFile
from shardmerge.spec.words import words_for
from shardmerge.system.directory import Directory, Entry, LinkError
from shardmerge.system.durable import TEMPORARY_SUFFIX
from shardmerge.system.regular_files import kind_of

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def all_problems(output: Path, plan: MergePlan, overwrite: bool) -> list[str]:
    """Every reason why a plan's files cannot be written to ``output``."""
    if problems := _attempt(output, lambda: _check_place(output, plan, overwrite)):
        return problems
    names = [name for name in files_of(plan) if name != RECORD_NAME]
    links = _attempt(output, lambda: _check_links(output, names))
    return [*links, *_attempt(output, lambda: check_space(output, plan.bytes_written))]


def problems_alone(output: Path, overwrite: bool) -> list[str]:
    """Every reason why nothing can be written to ``output``, whatever base and adapters are."""
    return _attempt(output, lambda: _check_itself(output, overwrite))


def _attempt(output: Path, check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except (OSError, RuntimeError, ValueError) as error:  # too long, below a file, no permission, a zero byte
        return [f"output.path {output} cannot be used: {_reason(error)}"]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _check_place(output: Path, plan: MergePlan, overwrite: bool) -> list[str]:
    problems = _overlap(output, "base", plan.base.location)
    problems = problems or _linked_into(output, "base", plan.base.files)
    for adapter in plan.adapters:
        found = _overlap(output, "adapter", adapter.location)
        problems += found or _linked_into(output, "adapter", adapter.files)
    return problems or _check_itself(output, overwrite)


def _check_itself(output: Path, overwrite: bool) -> list[str]:
    if output.is_symlink() and not output.exists():
        return [f"output.path {output} is a link that leads nowhere"]
    if output.exists() and not output.is_dir():
        return [f"output.path {output} is a file; it must be a directory"]
    return _not_empty(output, overwrite)


def _overlap(output: Path, what: str, location: str) -> list[str]:
    """A problem where a source, a directory or a file, is in the output or the output in it."""
    if not os.path.isabs(location):  # it is on another machine
        return []
    is_directory = os.path.isdir(location)
    target, root = output.resolve(), Path(location if is_directory else os.path.dirname(location)).resolve()
    if target == root:
        return [f"output.path {output} is the directory of the {what}; the {what} is never written to"]
    if is_directory and root in target.parents:
        return [f"output.path {output} is inside the {what} {root}; choose a place beside it"]
    if target in root.parents and _entries(target):
        return [f"output.path {output} holds the {what} {root}; choose a place beside it"]
    return []


def _linked_into(output: Path, what: str, files: Sequence[SourceFile]) -> list[str]:
    """A problem where weights of a source are links into the output, which would be replaced while they are read."""
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
    if not overwrite:
        what = f"is not empty ({', '.join(entries[:3])}, …)"
        if record is not None:
            adapters = record.values.get("adapters")
            noun = words_for(adapters if isinstance(adapters, list) else [None]).noun
            what = f"already holds a finished {noun}"
        return [f"output.path {output} {what}; choose another path, or replace it with overwrite=True"]
    weights = [entry for entry in entries if entry.endswith(_WEIGHT_SUFFIXES)]
    if weights and record is None:
        return [
            f"output.path {output} holds weights that shardmerge did not write ({', '.join(weights[:3])}); "
            "overwrite=True does not touch them: remove them yourself, or choose another path"
        ]
    return []


def _check_links(output: Path, names: Collection[str]) -> list[str]:
    """Problems with links, FIFOs and folders where a merge would write, remove or look for a file."""
    try:
        with Directory(output) as root:
            mine = [
                f"output.path {output}: {entry} is {what}, which no merge puts there; it is neither followed nor "
                f"removed. Remove it yourself, or all of {FOLDER} (an unfinished merge then begins anew), or choose "
                "another path"
                for entry, what in _odd(root / FOLDER)
            ]
            return mine or [
                f"output.path {output}: {problem}, where the merge would write or remove a file; it is not followed. "
                "Remove it yourself, or choose another path"
                for problem in _place_problems(root, names)
            ]
    except FileNotFoundError:
        return []


def _odd(folder: Entry) -> Iterator[tuple[Entry, str]]:
    """Entries of the work folder that no merge makes: links, FIFOs, devices, folders in the place of files."""
    status = folder.status()
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        yield folder, kind_of(status.st_mode)
        return
    for name in folder.names():
        inner = folder / name
        if folder.name == FOLDER and name in (STAGE, RECEIPTS):
            yield from _odd(inner)
        elif (status := inner.status()) is not None and not stat.S_ISREG(status.st_mode):
            yield inner, kind_of(status.st_mode)
        elif status is not None and status.st_nlink > 1:
            yield inner, "a hard link: the same file has another name"


def _place_problems(root: Directory, names: Collection[str]) -> list[str]:
    """Why files of these names, or those that journal and record name, cannot be written or removed.

    A folder in their path may be a link or a file, and a folder may be in their place.
    """
    state: dict[str, Any] = read_state(root)
    own = [*own_names(state.get("places")), *own_names(state.get("stale")), *files_of_merge(root.path)]
    made = [f"{name}{ending}" for name in (*names, RECORD_NAME) for ending in ("", TEMPORARY_SUFFIX)]
    return [*dict.fromkeys(text for name in (*made, *own) if (text := _place_problem(root / name)))]


def _place_problem(file: Entry) -> str:
    try:
        status = file.status()
    except LinkError as error:
        return f"{error.filename} is a link"
    except NotADirectoryError:
        return f"{file.parent} is not a folder"
    return f"{file} is a directory" if status is not None and stat.S_ISDIR(status.st_mode) else ""


def check_space(output: Path, needed: int) -> list[str]:
    """A problem where ``needed`` bytes, less those that an earlier run wrote, do not fit on the file system."""
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
        # It is not removed automatically: until the new model is complete, the old one may be the only one.
        problem += (
            f". The model that is there takes {old:,} and is kept until the new one is complete; if you can do without "
            f"it, remove {output} yourself, and there is enough space"
        )
    return [problem]
