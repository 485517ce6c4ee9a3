"""Chooses the files of the model among a directory's files of weights.

transformers prefers ``model.safetensors`` to an index; diffusers and vLLM prefer the index. If that makes a difference,
the directory is refused. Sources: transformers 5.23 ``modeling_utils._get_resolved_checkpoint_files``; diffusers
``ModelMixin.from_pretrained``; vLLM ``filter_duplicate_safetensors_files``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmerge.errors import FormatError, OtherKindError
from shardmerge.file_formats import recognise
from shardmerge.file_formats.checkpoint_files import Shard, is_index, read_index, read_shard, stem_of_index
from shardmerge.file_formats.recognise import listed
from shardmerge.sources.source import Source
from shardmerge.spec.notices import Warned
from shardmerge.spec.tensors import TensorRef

SUFFIX = ".safetensors"
#: transformers' and diffusers' names of a model in one file.
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
#: Weights that are not the model, and their indexes: an adapter, an optimizer's state, the model in its maker's format.
_NOT_THE_MODEL = re.compile(r"(adapter_model|consolidated|optimizer)\b.*\.safetensors(\.index.*\.json)?")
#: Bytes that are compared at a time.
_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """The files of the model, and its index if it has one."""

    files: tuple[str, ...]
    index_name: str | None = None
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    weight_map: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose(source: Source, names: Sequence[str], named: Any = None) -> Choice:
    """The model among a source's files. ``named`` is ``transformers_weights`` of config.json, or None.

    Raises `FormatError` if there is no model, an incomplete one, or more than one.
    """
    top = [name for name in names if "/" not in name]
    stored = [name for name in top if name.endswith(SUFFIX) or is_index(name)]
    if named is not None:
        return _named(source, top, named)
    # Other weights count only if there is nothing else.
    proper = [name for name in stored if not _NOT_THE_MODEL.fullmatch(name)] or stored
    files = [name for name in proper if name.endswith(SUFFIX)]
    index = _index_among([name for name in proper if is_index(name)], files, source)
    if index is not None and not _is_of_another(source, index, files):
        return _of_index(source, top, index)
    _refuse_other_than_model(source, names, files)
    return _without_index(source, files)


def _named(source: Source, top: Sequence[str], named: Any) -> Choice:
    """transformers loads the file that config.json names, and ignores all others."""
    if named not in top or not (named.endswith(SUFFIX) or is_index(named)):
        raise FormatError(
            f"{source.location}: transformers_weights in config.json is {named!r:.200}; expected a .safetensors file "
            "of this directory, or an index"
        )
    choice = _of_index(source, [], named, top) if is_index(named) else Choice((named,))
    others = [name for name in top if name.endswith(SUFFIX) and name not in choice.files]
    if not others:
        return choice
    note = f"{source.location}: config.json names {named} as the model's weights, so other files are not read: "
    return Choice(choice.files, choice.index_name, choice.index_metadata, choice.weight_map, (note + listed(others),))


def _index_among(indexes: Sequence[str], files: Sequence[str], source: Source) -> str | None:
    """The index of the model. That of a variant (fp16) counts only if there is no other."""
    plain = [name for name in indexes if stem_of_index(name) == name.partition(SUFFIX)[0]]
    if not plain and any(name.partition(SUFFIX)[0] + SUFFIX in files for name in indexes):
        return None
    indexes = plain or indexes
    usual = [name for name in indexes if name.partition(SUFFIX)[0] + SUFFIX in _WHOLE]
    if len(indexes) <= 1 or len(usual) == 1:
        return next(iter(usual or indexes), None)
    raise FormatError(
        f"{source.location}: several indexes may be the model's: {', '.join(indexes)}; move the intended model into a "
        "directory of its own"
    )


def _is_of_another(source: Source, index: str, files: Sequence[str]) -> bool:
    """Whether an index is not the model's: its name and all its tensors are others."""
    whole = next((name for name in _WHOLE if name in files), None)
    if whole is None or stem_of_index(index) + SUFFIX in _WHOLE:
        return False
    tensors = {ref.name for ref in read_shard(source, whole).tensors}
    return tensors.isdisjoint(read_index(source, index)[1])


# --- with an index ----------------------------------------------------------------------------------------------------


def _of_index(source: Source, top: Sequence[str], index: str, there: Sequence[str] | None = None) -> Choice:
    """The shards of ``index``. ``top`` may contain another model; ``there`` are the files that exist."""
    metadata, weight_map = read_index(source, index)
    files = sorted(set(weight_map.values()))
    rivals = [name for name in dict.fromkeys((stem_of_index(index) + SUFFIX, *_WHOLE)) if name in top]
    rivals = [name for name in rivals if name not in files]
    missing = sorted(set(files).difference(top if there is None else there))
    if missing and len(missing) == len(files) and rivals:
        return _stale(source, index, weight_map, rivals[0])
    if missing:
        raise FormatError(
            f"{source.location}: {index} names {len(missing)} shards that are not there: {listed(missing)}; the "
            f"download is incomplete" + _or_take(source, rivals) + (f". {source.note}" if source.note else "")
        )
    shards = [read_shard(source, name) for name in files] if rivals else []
    notes = [_same_or_refused(source, index, shards, rival) for rival in rivals]
    return Choice(tuple(files), index, metadata, weight_map, tuple(notes))


def _or_take(source: Source, rivals: Sequence[str]) -> str:
    return f", or the model is {rivals[0]} beside it: then {_take(source, rivals[0])}" if rivals else ""


def _take(source: Source, name: str) -> str:
    """Advice on how to give one file of a source as the base."""
    if source.local_path is not None:
        return f"give the path {source.location}/{name}"
    return f"download {source.location} and give the path of its {name}"


def _stale(source: Source, index: str, weight_map: Mapping[str, str], whole: str) -> Choice:
    """All shards of an index are gone, and one file has the whole model: the index is of an earlier save."""
    tensors = {ref.name for ref in read_shard(source, whole).tensors}
    if absent := [name for name in weight_map if name not in tensors]:
        raise FormatError(
            f"{source.location}: none of the shards that {index} names is there, and {whole} lacks {len(absent)} of "
            f"their tensors, for example {absent[0]!r:.200}. Download the shards, or, if {index} is of another model, "
            f"{_take(source, whole)}"
        )
    note = Warned(f"{source.location}: {index} is stale: none of its shards is there; the model is {whole}")
    return Choice((whole,), notes=(note,))


def _same_or_refused(source: Source, what: str, shards: Sequence[Shard], whole: str, is_all: bool = True) -> str:
    """A note that ``whole`` is the same model as the shards of ``what``; `FormatError` if it is not."""
    difference = _difference(source, shards, read_shard(source, whole), is_all)
    if difference:
        raise FormatError(
            f"{source.location}: {whole} and the shards of {what} are different models ({difference}). transformers "
            f"loads {whole}, vLLM the shards. To use {whole}, {_take(source, whole)}; to use the shards, "
            f"move {whole} out of the directory"
        )
    return f"{source.location}: {whole} has the same tensors as the shards of {what}, and is not copied"


def _difference(source: Source, shards: Sequence[Shard], whole: Shard, is_all: bool) -> str:
    """How shards and a whole file differ, in headers or else in bytes; empty if they are equal.

    Without ``is_all`` the file may have more tensors.
    """
    of_whole = {ref.name: ref for ref in whole.tensors}
    of_shards = {ref.name: (shard.name, ref) for shard in shards for ref in shard.tensors}
    odd = [name for name in (*of_shards, *of_whole) if name not in of_whole or (is_all and name not in of_shards)]
    if odd:
        return f"{odd[0]!r:.200} is only in {whole.name if odd[0] in of_whole else 'the shards'}"
    for name, (_, ref) in of_shards.items():
        other = of_whole[name]
        if (ref.dtype, ref.shape) != (other.dtype, other.shape):
            return (
                f"{name!r:.200} is {ref.dtype} {list(ref.shape)} in the shards, {other.dtype} {list(other.shape)} there"
            )
    for name, (file, ref) in of_shards.items():
        if not _equal_bytes(source, file, ref, whole.name, of_whole[name]):
            return f"{name!r:.200} has other values"
    return ""


def _equal_bytes(source: Source, file: str, ref: TensorRef, other_file: str, other: TensorRef) -> bool:
    return all(
        source.read(file, ref.offset + start, min(_BLOCK, ref.nbytes - start))
        == source.read(other_file, other.offset + start, min(_BLOCK, ref.nbytes - start))
        for start in range(0, ref.nbytes, _BLOCK)
    )


# --- without an index -------------------------------------------------------------------------------------------------


def _refuse_other_than_model(source: Source, names: Sequence[str], files: Sequence[str]) -> None:
    """Refuse a pipeline, an adapter or a directory without safetensors, with advice."""
    is_pipeline = "model_index.json" in names and recognise.parts_with_weights(names) and not set(files) & set(_WHOLE)
    is_adapter = "adapter_config.json" in names and all(_NOT_THE_MODEL.fullmatch(name) for name in files)
    if not files or is_pipeline or is_adapter:
        or_files = f", or the path of one of its files: {listed(files)}" if files and not is_adapter else ""
        what = recognise.what_directory_is(names)
        if what == recognise.IS_ADAPTER:
            raise OtherKindError(f"{source.location}: {what}")
        raise FormatError(f"{source.location}: {what}{or_files}" + ("" if files else "; expected .safetensors files"))


def _without_index(source: Source, files: Sequence[str]) -> Choice:
    usual = [name for name in _WHOLE if name in files]
    if len(usual) > 1:
        raise FormatError(
            f"{source.location}: {' and '.join(usual)} are two models; {_take(source, usual[0])}, or the other"
        )
    if usual:
        return Choice((usual[0],), notes=_beside(source, files, usual[0]))
    if strange := [name for name in files if not name.isprintable()]:
        raise FormatError(f"{source.location}: the file name {strange[0]!r} has characters that cannot be shown")
    stems = {_stem(name) for name in files}
    files = [name for name in files if not _is_variant(_stem(name), stems)]
    for stem, count, missing in _incomplete(files):
        raise FormatError(f"{source.location}: of the {count} shards of {stem}, these are missing: {missing}")
    return Choice(tuple(files))


def _beside(source: Source, files: Sequence[str], whole: str) -> tuple[str, ...]:
    """Shards of the same name without an index. Programs that load every file would load them over the whole one."""
    names = [name for name in files if (match := _NUMBERED.fullmatch(name)) and f"{match['stem']}{SUFFIX}" == whole]
    if not names:
        return ()
    shards = [read_shard(source, name) for name in names]
    return (_same_or_refused(source, listed(names), shards, whole, is_all=False),)


def _stem(name: str) -> str:
    match = _NUMBERED.fullmatch(name)
    return match["stem"] if match else name.removesuffix(SUFFIX)


def _is_variant(stem: str, stems: Iterable[str]) -> bool:
    """Whether ``model.fp16`` is another precision of a file ``model``."""
    plain, dot, variant = stem.rpartition(".")
    return bool(dot) and plain in stems and variant.isidentifier()


def _incomplete(files: Sequence[str]) -> Iterable[tuple[str, int, list[int]]]:
    numbered = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    for stem, count in sorted({(match["stem"], int(match["count"])) for match in numbered}):
        have = {int(match["number"]) for match in numbered if match["stem"] == stem and int(match["count"]) == count}
        if missing := sorted(set(range(1, count + 1)) - have):
            yield stem, count, missing
