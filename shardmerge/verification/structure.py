"""The output as a checkpoint: its headers and index, and config.json compared with the stored tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardmerge.destinations.record import RECORD_NAME, Record
from shardmerge.errors import FormatError
from shardmerge.file_formats import safetensors_header
from shardmerge.file_formats.checkpoint_files import MAX_INDEX_BYTES, is_index
from shardmerge.file_formats.model_config import sections, vocabulary_size
from shardmerge.key_mapping.names import Names
from shardmerge.sources.local import LocalSource
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import MergePlan, ShardPlan
from shardmerge.spec.tensors import DTYPE_NAMES, FLOAT_DTYPES, SourceFile, TensorInfo
from shardmerge.system import json_text
from shardmerge.system.regular_files import why_not_readable
from shardmerge.verification.files import find_weights
from shardmerge.verification.findings import STRUCTURE, Findings

#: Names of input embeddings and output heads, whose rows are the vocabulary.
_VOCABULARY = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "lm_head", "embed_out"})


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of the output as found: where its data begins, and its tensors in the order of their data."""

    name: str
    file: SourceFile
    data_start: int
    metadata: safetensors_header.Metadata
    tensors: Mapping[str, TensorInfo]


def read_shards(output: Path, record: Record, findings: Findings) -> list[Stored]:
    """Check the sizes and headers of the recorded shards. A shard that is malformed is listed without tensors."""
    source, found = LocalSource(str(output)), []
    for name, (size, _) in record.shards.items():
        file = find_weights(output, name, size, findings)
        if file is None:
            continue
        try:
            metadata, tensors, start = safetensors_header.read_header(partial(source.read, name), file.size, name)
        except FormatError as error:
            findings.problem(STRUCTURE, str(error), file=name)
            found.append(Stored(name, file, 0, (), {}))
            continue
        found.append(Stored(name, file, start, metadata, tensors))
    findings.tensors += sum(len(shard.tensors) for shard in found)
    return found


def check_structure(
    output: Path,
    record: Record,
    shards: list[Stored],
    plan: MergePlan | None,
    called: Mapping[str, str],
    findings: Findings,
) -> None:
    """Compare headers, index and plan with each other; problems go to ``findings``.

    ``called`` maps weights to the stored names of their values, where those differ.
    """
    _check_tensors(shards, findings)
    _check_index(output, record, shards, findings)
    there = {name for shard in shards for name in shard.tensors}
    for target in record.targets:
        if not there.intersection((target, called.get(target, target))):
            findings.problem(STRUCTURE, f"{target}, which was merged, is missing", tensor=target)
    if plan is not None:
        _check_headers(shards, plan, findings)


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
    if why_not_readable(output / name):
        return  # that is reported already
    try:
        index = json_text.read_object(output / name, MAX_INDEX_BYTES)
        weight_map, total = index["weight_map"], index["metadata"]["total_size"]
        listed = dict(weight_map.items())
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        findings.problem(STRUCTURE, f"{name} is not an index: {type(error).__name__}: {error}", file=name)
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
    if difference := next(tensor_differences(shard.tensors, dict(plan.outputs())), ""):
        return difference
    if dict(shard.metadata) != dict(plan.metadata):
        return f"its metadata is {dict(shard.metadata)}, expected {dict(plan.metadata)}"
    if shard.data_start != plan.header_bytes:
        return f"its header is {shard.data_start} bytes long, expected {plan.header_bytes}"
    return ""


def tensor_differences(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo]) -> Iterator[str]:
    """The differences between the tensors of a header and the planned ones, by name."""
    for name in sorted({*found, *wanted}):
        here, there = found.get(name), wanted.get(name)
        if here is None or there is None:
            yield f"{name} is {'missing' if here is None else 'not expected there'}"
        elif here != there:
            yield f"{name} is {_described(here)}, expected {_described(there)}"


def _described(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)} at {info.data_offsets[0]}"


# --- a second opinion on a header, from the format's own library ------------------------------------------------------


def ask_library(path: Path, name: str, tensors: Mapping[str, TensorInfo], findings: Findings) -> None:
    """Report to ``findings`` where the safetensors library reads other tensors than ``tensors`` from a shard.

    The library maps the file, and touches only the pages of the header. Its versions before 0.7 take time that grows
    with the square of the number of tensors.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            difference = _read_otherwise(file, tensors)
    except safetensors.SafetensorError as error:
        if "unknown variant" in str(error):  # a dtype of a later version of the format
            text = f"{name}: safetensors {safetensors.__version__} cannot give a second opinion on it: {error!s:.200}"
            findings.notes.append(Warned(text))
            return
        difference = f"refuses it: {error!s:.200}"
    except (OSError, MemoryError) as error:  # a limit of the address space, for example
        findings.notes.append(Warned(f"{name}: the safetensors library cannot open it: {error!s:.200}"))
        return
    if difference:
        findings.problem(STRUCTURE, f"{name}: the safetensors library {difference}", file=name)


def _read_otherwise(file: Any, tensors: Mapping[str, TensorInfo]) -> str:
    """What the library reads differently; empty where it agrees."""
    if odd := set(file.keys()) ^ tensors.keys():
        one = min(odd)
        return f"{'does not find' if one in tensors else 'finds'} the tensor {one}"
    for name, info in tensors.items():
        part = file.get_slice(name)
        dtype, shape = part.get_dtype(), tuple(part.get_shape())
        if (dtype, shape) != (info.dtype, info.shape):
            return f"reads {name} as {dtype} {list(shape)}, expected {info.dtype} {list(info.shape)}"
    return ""


# --- config.json against the tensors ----------------------------------------------------------------------------------


def check_config(
    output: Path, shards: Iterable[Stored], base: Mapping[str, str] | None, merged_dtype: bool, findings: Findings
) -> None:
    """Report contradictions between config.json and the tensors.

    ``base`` are those of the base itself, by kind; None where the base is not available. With ``merged_dtype`` the
    merge was given a dtype, so config.json must name it.
    """
    try:
        config = json_text.read_object(output / "config.json")
    except (OSError, json_text.JsonError):
        if not why_not_readable(output / "config.json"):
            findings.problem(STRUCTURE, "config.json is not a JSON object", file="config.json")
        return
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    for key, text in contradictions(config, tensors):
        if base is not None and key in base:
            findings.notes.append(f"{text}; so it is in the base")
        elif key == "dtype" and base is None and not merged_dtype:
            findings.notes.append(text)  # many bases have the same contradiction, which does no harm
        else:
            findings.problem(STRUCTURE, text, file="config.json")


def contradictions(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """(kind, text) where ``dtype``, ``vocab_size`` or ``tie_word_embeddings`` contradicts the tensors."""
    yield from _dtype(config, tensors)
    size = vocabulary_size(config)
    for name, info in tensors.items():
        of_vocabulary = name.removesuffix(".weight").rpartition(".")[2] in _VOCABULARY and len(info.shape) == 2
        if size is not None and of_vocabulary and info.shape[0] != size:
            yield "vocab_size", f"config.json says vocab_size {size}, but {name} has {info.shape[0]} rows"
            break
    yield from _ties(config, tensors)


def _dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype in FLOAT_DTYPES:
            sizes[info.dtype] += info.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    values = (section.get(key) for section in sections(config) for key in ("dtype", "torch_dtype"))
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
            yield "tie_word_embeddings", f"config.json says that {head} is not tied to {embedding}, but it is missing"
        elif head in tied and head in tensors and tensors[head].shape != tensors[embedding].shape:
            yield "tie_word_embeddings", f"config.json says that {head} is {embedding}, but it is of another shape"
