"""Check the files of an output: the recorded ones are unchanged, and no other file exists that a program would load.

Programs that load a model search its directory. transformers prefers a ``chat_template.jinja`` to the template in
tokenizer_config.json, also loads the adapter of an ``adapter_config.json``, and runs ``*.py`` files that a config
names; llama.cpp and Ollama load any ``.gguf`` or ``Modelfile``. New versions search for more names. So any file that
the merge did not write is an error, except for the kinds that only people and git read.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardmerge.destinations.record import RECORD_NAME, Record, is_work, left_behind
from shardmerge.errors import SourceError
from shardmerge.sources.local import LocalSource
from shardmerge.sources.source import open_reader, read_file
from shardmerge.spec.plans import AuxFile, MergePlan
from shardmerge.spec.tensors import SourceFile
from shardmerge.system import json_text
from shardmerge.system.checksums import Checksums
from shardmerge.system.regular_files import kind_of, open_regular, read_small, why_not_readable
from shardmerge.verification.findings import CHECKSUMS, STRUCTURE, Findings

_CHUNK = 1 << 20
#: Files that people edit after a merge, and that no program acts on.
_PROSE = (".md", ".rst", ".txt", "")
_PROSE_NAMES = ("readme", "license", "licence", "copying", "notice", "use_policy", "changelog", ".gitattributes")
#: Other files that no program loads, by their path in lower case: pictures of a model card, and the files of git,
#: huggingface_hub and desktops. llama.cpp's converter reads a README only to name its file.
_HARMLESS = re.compile(
    r"(.*/)?[^/]+\.(png|jpe?g|gif|svg|webp|pdf)|(.*/)?(\.git(ignore|modules|keep)?|citation\.cff|\.ds_store|thumbs\.db)"
    r"|(\.git|\.cache/huggingface)/.*",
    re.DOTALL,
)
#: The most files of an output that are examined; a merge makes a few thousand at most.
_MOST = 200_000
#: Names that a note lists.
_NAMED = 10


def find_weights(output: Path, name: str, size: int, findings: Findings) -> SourceFile | None:
    """Check that a recorded file of weights exists with the recorded ``size``; None where it cannot be read."""
    if reason := why_not_readable(output / name):
        findings.problem(STRUCTURE, f"{name} {reason}", file=name)
        return None
    file = LocalSource(str(output)).stat(name)
    findings.files += 1
    if file.size != size:
        text = f"{name} is {file.size} bytes long, {size} were recorded"
        findings.problem(STRUCTURE, text, file=name, found=float(file.size), expected=float(size))
    return file


def check_files(output: Path, record: Record, plan: MergePlan | None, findings: Findings) -> None:
    """Check that the files beside the shards exist, as recorded and as the merge writes them."""
    readable = _check_names(output, record, findings)
    changed = _check_recorded(output, record, readable, plan, findings)
    for aux in () if plan is None else plan.aux:
        if aux.name in readable - changed:
            _check_aux(output, aux, findings)


def _check_names(output: Path, record: Record, findings: Findings) -> set[str]:
    """The files beside the shards that can be read."""
    beside = {*record.files, *record.others, RECORD_NAME} - record.shards.keys()
    reasons = {name: why_not_readable(output / name) for name in sorted(beside)}
    for name, reason in reasons.items():
        if reason:
            findings.problem(STRUCTURE, f"{name} {reason}", file=name)
    readable = {name for name, reason in reasons.items() if not reason}
    findings.files += len(readable)
    return readable


def _check_recorded(
    output: Path, record: Record, readable: set[str], plan: MergePlan | None, findings: Findings
) -> set[str]:
    """Compare the recorded checksums of the files beside the shards. Returns the names of those that changed."""
    if not record.others and plan is None:
        findings.unverified.append("files beside the weights: their checksums were not recorded")
    recorded = sorted(readable & record.others.keys())
    changed = [name for name in recorded if not _as_recorded(output, record, name)]
    planned = {} if plan is None else {aux.name: aux for aux in plan.aux}
    for name in changed:
        if _is_prose(name):
            findings.notes.append(f"{name} was changed after the merge; no program acts on it")
            continue
        detail = _json_difference(output / name, planned[name]) if name in planned and name.endswith(".json") else ""
        findings.problem(CHECKSUMS, f"{name} was changed after the merge{detail}", file=name)
    findings.other_files += len(recorded)
    return set(changed)


def _as_recorded(output: Path, record: Record, name: str) -> bool:
    size, recorded = record.others[name]
    path = output / name
    return path.stat().st_size == size and file_checksums(path, size, "sha256" in recorded).items() >= recorded.items()


def _check_aux(output: Path, aux: AuxFile, findings: Findings) -> None:
    path = output / aux.name
    if _is_written(path, aux):
        return
    if _is_prose(aux.name):
        findings.notes.append(f"{aux.name} is not the one that {aux.source.uri} holds; no program acts on it")
        return
    detail = _json_difference(path, aux) if aux.name.endswith(".json") else ""
    findings.problem(STRUCTURE, f"{aux.name} is not what the merge writes{detail}", file=aux.name)


def _is_written(path: Path, aux: AuxFile) -> bool:
    if aux.content is None:
        return _same_bytes(path, aux.source)
    content = aux.content.encode()
    return path.stat().st_size == len(content) and read_small(path, len(content)) == content


def _is_prose(name: str) -> bool:
    path = Path(name.lower())
    return path.suffix == ".md" or (path.suffix in _PROSE and path.name.startswith(_PROSE_NAMES))


def _same_bytes(path: Path, source: SourceFile) -> bool:
    if path.stat().st_size != source.size:
        return False
    with open_reader(source) as reader, open(open_regular(path)[0], "rb", buffering=0) as file:
        for offset in range(0, source.size, _CHUNK):
            expected = bytearray(min(_CHUNK, source.size - offset))
            reader.read_into(offset, memoryview(expected))
            if file.read(len(expected)) != expected:
                return False
    return True


def _json_difference(path: Path, aux: AuxFile) -> str:
    """``": vocab_size is 5, expected 6"``; empty where the two are not small JSON objects."""
    if max(path.stat().st_size, aux.source.size) > _CHUNK:
        return ""
    try:
        found = json_text.read_object(path, _CHUNK)
        content = aux.content.encode() if aux.content is not None else read_file(aux.source, _CHUNK)
        wanted = json_text.parse_object(content)
        keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    except (OSError, json_text.JsonError):
        return ""
    said = [f"{key} is {_brief(found.get(key))}, expected {_brief(wanted.get(key))}" for key in keys[:3]]
    return f": {'; '.join(said)}" if said else ""


def _brief(value: Any) -> str:
    return f"{json.dumps(value)!s:.60}"


def check_added(output: Path, record: Record, findings: Findings) -> None:
    """Report every file of the output that is not in the record, unless it is of a kind that no program loads.

    Links are not followed: one that the merge did not make is such a file, whatever its target.
    """
    own = {os.path.normpath(name) for name in (*record.files, *record.shards, *record.others, RECORD_NAME)}
    harmless = []
    for number, (name, status) in enumerate(_entries(output, findings)):
        if number == _MOST:
            findings.problem(
                STRUCTURE, f"{output} holds more than {_MOST:,} files; those after the first are not named"
            )
            break
        if name in own:
            continue
        findings.added.append(name)
        if _is_harmless(name, status):
            harmless.append(name)
        else:
            what = name if stat.S_ISREG(status.st_mode) else f"{name} ({kind_of(status.st_mode)})"
            text = f"{what} is not a file of this merge, and what loads the model may act on it"
            findings.problem(STRUCTURE, text, file=name)
    if harmless:
        more = f", and {len(harmless) - _NAMED} more" if len(harmless) > _NAMED else ""
        names = ", ".join(harmless[:_NAMED])
        findings.notes.append(f"not files of this merge, and of kinds that no program loads: {names}{more}")
    if folder := left_behind(output):
        findings.notes.append(f"{folder}, the work folder of a merge, was left behind; it may be removed")


def _is_harmless(name: str, status: os.stat_result) -> bool:
    is_file = stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
    return is_file and (_is_prose(name) or _HARMLESS.fullmatch(name.lower()) is not None)


def _entries(output: Path, findings: Findings) -> Iterator[tuple[str, os.stat_result]]:
    """All files in a directory and its folders; a link to a folder counts as a file."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            found = sorted(os.scandir(output / folder), key=lambda entry: entry.name)
        except OSError as error:
            findings.unverified.append(f"{folder or output}: cannot be listed: {error.strerror or error}")
            continue
        for entry in found:
            name = folder + entry.name
            if not entry.is_dir(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False)
            elif not is_work(name):
                waiting.append(f"{name}/")


def file_checksums(path: Path, size: int, sha256: bool = False) -> dict[str, str]:
    """Checksums of a file, of which at most ``size`` + 1 bytes are read. `SourceError` if it cannot be read."""
    found, left = Checksums(sha256), size + 1
    try:
        with open(open_regular(path)[0], "rb", buffering=0) as file:
            while left and (data := file.read(min(left, _CHUNK))):
                found.update(data)
                left -= len(data)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    return found.hex()
