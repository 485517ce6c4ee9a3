"""The output as a checkpoint: its files, headers and index, and what config.json says against what is stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardmerge import header
from shardmerge.checkpoint import is_index
from shardmerge.errors import FormatError, SourceError
from shardmerge.journal import RECORD_NAME
from shardmerge.names import Names
from shardmerge.planning.tokenizer import is_tokenizer
from shardmerge.planning.vocabulary import vocabulary_size
from shardmerge.sources import LocalSource, open_reader
from shardmerge.spec import DTYPE_NAMES, FLOAT_DTYPES, AuxFile, MergePlan, ShardPlan, SourceFile, TensorInfo
from shardmerge.verification.findings import CHECKSUMS, STRUCTURE, Findings
from shardmerge.verification.reading import file_checksums
from shardmerge.verification.record import Record

_CHUNK = 1 << 20
#: What input embeddings and output heads of language models are called; of others, rows count something else.
_VOCABULARY = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "lm_head", "embed_out"})
#: Files that people write anew after a merge, and that no program acts on.
_PROSE = (".md", ".txt", "")
_PROSE_NAMES = ("readme", "license", "licence", "notice", "use_policy", ".gitattributes")


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of the output as it is found: where its data begins, and its tensors in the order of their data."""

    name: str
    file: SourceFile
    data_start: int
    metadata: header.Metadata
    tensors: Mapping[str, TensorInfo]


def read_shards(output: Path, record: Record, findings: Findings) -> list[Stored]:
    """Sizes and headers of the recorded shards; those that are there are in the list, sound or not."""
    source, found = LocalSource(str(output)), []
    for name, (size, _) in record.shards.items():
        try:
            file = source.stat(name)
        except SourceError as error:
            findings.problem(STRUCTURE, f"{name} is missing: {error}", file=name)
            continue
        if file.size != size:
            findings.problem(
                STRUCTURE,
                f"{name} is {file.size} bytes long, {size} were recorded",
                file=name,
                found=float(file.size),
                expected=float(size),
            )
        try:
            metadata, tensors, start = header.read_header(partial(source.read, name), file.size, name)
        except FormatError as error:
            findings.problem(STRUCTURE, str(error), file=name)
            found.append(Stored(name, file, 0, (), {}))
            continue
        found.append(Stored(name, file, start, metadata, tensors))
    findings.files += len(found)
    findings.tensors += sum(len(shard.tensors) for shard in found)
    return found


def check_structure(
    output: Path, record: Record, shards: list[Stored], plan: MergePlan | None, findings: Findings
) -> None:
    """Everything but the data of tensors: problems go to ``findings``."""
    check_files(output, record, plan, findings)
    _check_tensors(shards, findings)
    _check_index(output, record, shards, findings)
    there = {name for shard in shards for name in shard.tensors}
    for target in record.targets:
        if target not in there:
            findings.problem(STRUCTURE, f"{target}, which was merged, is not there", tensor=target)
    if plan is not None:
        _check_headers(shards, plan, findings)


def check_files(output: Path, record: Record, plan: MergePlan | None, findings: Findings) -> None:
    """Whether the files beside the shards are there, and are what was recorded, and what the merge writes."""
    _check_names(output, record, findings)
    changed = _check_recorded(output, record, plan, findings)
    for aux in () if plan is None else plan.aux:
        if aux.name not in changed:
            _check_aux(output, aux, findings)


def _check_names(output: Path, record: Record, findings: Findings) -> None:
    own = {*record.files, *record.shards, RECORD_NAME}
    for name in record.files:
        if name not in record.shards and not (output / name).is_file():
            findings.problem(STRUCTURE, f"{name} is missing", file=name)
    findings.files += sum((output / name).is_file() for name in own - record.shards.keys())
    for path in sorted(output.iterdir()):
        # Such a file may be loaded in place of the merge's, or beside it; or it makes transformers look for an adapter.
        is_loaded = path.name.endswith(".safetensors") or is_index(path.name) or path.name == "adapter_config.json"
        if is_loaded and path.name not in own:
            findings.problem(STRUCTURE, f"{path.name} is no file of this merge", file=path.name)
        elif is_tokenizer(path.name) and path.name not in own:
            findings.notes.append(
                f"{path.name} is no file of this merge, and may win over its tokenizer or chat template"
            )


def _check_tensors(shards: Iterable[Stored], findings: Findings) -> None:
    places: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in places:
                text = f"{name} is stored twice, in {places[name]} and in {shard.name}"
                findings.problem(STRUCTURE, text, file=shard.name, tensor=name)
            places[name] = shard.name


def _check_index(output: Path, record: Record, shards: list[Stored], findings: Findings) -> None:
    # The last file is what makes an output a model; files that were copied may have an index of their own.
    name = record.files[-1] if record.files else ""
    if not is_index(name):
        if len(record.shards) > 1:
            findings.problem(STRUCTURE, f"{RECORD_NAME} has several shards, but no index")
        return
    if not (output / name).is_file():
        return  # that is told already
    try:
        index = json.loads((output / name).read_bytes())
        weight_map, total = index["weight_map"], index["metadata"]["total_size"]
        listed = dict(weight_map.items())
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        findings.problem(STRUCTURE, f"{name} is no index: {type(error).__name__}: {error}", file=name)
        return
    there = {tensor: shard.name for shard in shards for tensor in shard.tensors}
    for tensor in sorted({*listed, *there}):
        if listed.get(tensor) != there.get(tensor):
            text = f"{name} puts {tensor} into {listed.get(tensor)}, but it is in {there.get(tensor)}"
            findings.problem(STRUCTURE, text, file=name, tensor=tensor)
    data = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    if total != data:
        findings.problem(STRUCTURE, f"{name} says total_size {total}, but the tensors take {data} bytes", file=name)


def _check_headers(shards: Iterable[Stored], plan: MergePlan, findings: Findings) -> None:
    planned = {shard.name: shard for shard in plan.shards}
    for shard in shards:
        wanted = planned.get(shard.name)
        if wanted is None or not shard.data_start:
            continue
        if difference := _header_difference(shard, wanted):
            findings.problem(STRUCTURE, f"{shard.name}: {difference}", file=shard.name)


def _header_difference(shard: Stored, plan: ShardPlan) -> str:
    expected = {tensor.source.name: tensor.out for tensor in plan.tensors}
    for name in sorted({*expected, *shard.tensors}):
        found, wanted = shard.tensors.get(name), expected.get(name)
        if found is None or wanted is None:
            return f"{name} is {'missing' if found is None else 'not expected there'}"
        if found != wanted:
            return f"{name} is {_told(found)}, expected {_told(wanted)}"
    if dict(shard.metadata) != dict(plan.metadata):
        return f"its metadata is {dict(shard.metadata)}, expected {dict(plan.metadata)}"
    if shard.data_start != plan.header_bytes:
        return f"its header is {shard.data_start} bytes long, expected {plan.header_bytes}"
    return ""


def _told(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)} at {info.data_offsets[0]}"


# --- files beside the weights -----------------------------------------------------------------------------------------


def _check_recorded(output: Path, record: Record, plan: MergePlan | None, findings: Findings) -> set[str]:
    """Checksums of the files beside the shards, where they were recorded; those that have changed since."""
    if not record.others and plan is None:
        findings.unverified.append("files beside the weights: their checksums were not recorded")
    changed = {name for name in record.others if (output / name).is_file() and not _as_recorded(output, record, name)}
    planned = {} if plan is None else {aux.name: aux for aux in plan.aux}
    for name in sorted(changed):
        if _is_prose(name):
            findings.notes.append(f"{name} was changed after the merge; no program acts on it")
            continue
        detail = _json_difference(output / name, planned[name]) if name in planned and name.endswith(".json") else ""
        findings.problem(CHECKSUMS, f"{name} was changed after the merge{detail}", file=name)
    findings.other_files += sum((output / name).is_file() for name in record.others)
    return changed


def _as_recorded(output: Path, record: Record, name: str) -> bool:
    size, recorded = record.others[name]
    path = output / name
    return path.stat().st_size == size and file_checksums(path, "sha256" in recorded).items() >= recorded.items()


def _check_aux(output: Path, aux: AuxFile, findings: Findings) -> None:
    path = output / aux.name
    if not path.is_file():
        return  # that is told already
    if aux.content is not None:
        same = path.stat().st_size < 1 << 30 and path.read_bytes() == aux.content.encode()
    else:
        same = _same_bytes(path, aux.source)
    if same:
        return
    if _is_prose(aux.name):
        findings.notes.append(f"{aux.name} is not the one that {aux.source.uri} holds; no program acts on it")
        return
    detail = _json_difference(path, aux) if aux.name.endswith(".json") else ""
    findings.problem(STRUCTURE, f"{aux.name} is not what the merge writes{detail}", file=aux.name)


def _is_prose(name: str) -> bool:
    path = Path(name.lower())
    return path.suffix == ".md" or (path.suffix in _PROSE and path.name.startswith(_PROSE_NAMES))


def _same_bytes(path: Path, source: SourceFile) -> bool:
    if path.stat().st_size != source.size:
        return False
    reader = open_reader(source)
    try:
        with open(path, "rb", buffering=0) as file:
            for offset in range(0, source.size, _CHUNK):
                expected = bytearray(min(_CHUNK, source.size - offset))
                reader.read_into(offset, memoryview(expected))
                if file.read(len(expected)) != expected:
                    return False
    finally:
        reader.close()
    return True


def _json_difference(path: Path, aux: AuxFile) -> str:
    """``": vocab_size is 5, expected 6"``, where both are JSON objects of some size."""
    if max(path.stat().st_size, aux.source.size) > _CHUNK:
        return ""
    try:
        found = json.loads(path.read_bytes())
        wanted = json.loads(aux.content if aux.content is not None else _read(aux.source))
        keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ""
    told = [f"{key} is {_brief(found.get(key))}, expected {_brief(wanted.get(key))}" for key in keys[:3]]
    return f": {'; '.join(told)}" if told else ""


def _read(source: SourceFile) -> bytes:
    reader = open_reader(source)
    try:
        data = bytearray(source.size)
        reader.read_into(0, memoryview(data))
    finally:
        reader.close()
    return bytes(data)


def _brief(value: Any) -> str:
    return f"{json.dumps(value)!s:.60}"


# --- config.json against what is stored -------------------------------------------------------------------------------


def check_config(
    output: Path, shards: Iterable[Stored], base: Mapping[str, str] | None, merged_dtype: bool, findings: Findings
) -> None:
    """What config.json says and the tensors do not; ``base`` is what is so of the base already, None if it is gone.

    ``merged_dtype``: the merge was told a dtype, so that config.json must name it.
    """
    config = read_config(output)
    if config is None:
        if (output / "config.json").is_file():
            findings.problem(STRUCTURE, "config.json is no JSON object", file="config.json")
        return
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    for key, text in contradictions(config, tensors):
        if base is not None and key in base:
            findings.notes.append(f"{text}; so it is in the base")
        elif key == "dtype" and base is None and not merged_dtype:
            findings.notes.append(text)  # many bases say so themselves, and it does no harm
        else:
            findings.problem(STRUCTURE, text, file="config.json")


def read_config(folder: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def contradictions(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """(what, text): ``dtype``, ``vocab_size`` or ``tie_word_embeddings`` against the tensors."""
    yield from _dtype(config, tensors)
    size = vocabulary_size(config)
    for name, info in tensors.items():
        of_vocabulary = name.removesuffix(".weight").rpartition(".")[2] in _VOCABULARY and len(info.shape) == 2
        if size is not None and of_vocabulary and info.shape[0] != size:
            yield "vocab_size", f"config.json says vocab_size {size}, but {name} has {info.shape[0]} rows"
            break
    yield from _ties(config, tensors)


def _dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    sizes: dict[str, int] = {}
    for info in tensors.values():
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    inner = config.get("text_config")
    sections = (config, inner if isinstance(inner, dict) else {})
    values = (section.get(key) for section in sections for key in ("dtype", "torch_dtype"))
    said = [value for value in values if isinstance(value, str)]
    if most and said and said[0].removeprefix("torch.") != DTYPE_NAMES[most]:
        yield "dtype", f"config.json says {said[0]}, but most of the weights are {DTYPE_NAMES[most]}"


def _ties(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    shapes = {name: info.shape for name, info in tensors.items()}
    names = Names(config, shapes)
    if not names.knows_ties:
        return
    tied = names.tied
    inner = config.get("text_config")
    if_tied = {**config, "tie_word_embeddings": True}
    if isinstance(inner, dict):
        if_tied["text_config"] = {**inner, "tie_word_embeddings": True}
    for head, embedding in Names(if_tied, shapes).tied.items():
        if head not in tied and head not in tensors:
            yield "tie_word_embeddings", f"config.json says that {head} is not tied to {embedding}, but it is not there"
        elif head in tied and head in tensors and tensors[head].shape != tensors[embedding].shape:
            yield "tie_word_embeddings", f"config.json says that {head} is {embedding}, but it is of another shape"
