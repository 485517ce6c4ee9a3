"""An adapter's files → its config and its tensors, as `TensorRef`s. No tensor data is read."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmerge.adapters.base_view import NO_BASE, BaseView
from shardmerge.adapters.claims import Claims
from shardmerge.adapters.formats.base import AdapterContent
from shardmerge.adapters.formats.wholes import claim_beside
from shardmerge.adapters.registry import FORMATS, detect_format
from shardmerge.config.schema import AdapterConfig
from shardmerge.errors import FormatError
from shardmerge.file_formats import adapter_folder
from shardmerge.file_formats.adapter_folder import INDEXES, PICKLES, WEIGHTS, Folder
from shardmerge.file_formats.checkpoint_files import read_index, read_json, read_shard
from shardmerge.file_formats.torch_pickle import read_pickled
from shardmerge.sources.source import Source, open_reader
from shardmerge.spec.notices import Warned
from shardmerge.spec.tensors import DTYPE_BITS, SourceFile, TensorRef
from shardmerge.system import bounded_regex

CONFIG_NAME = "adapter_config.json"
#: Settings of one; PEFT's classes have sixty.
_MAX_SETTINGS = 5_000
#: Files further down that are named one by one.
_SHOWN = 5
_STRUCT_CODES = {"F16": "e", "F32": "f", "F64": "d", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


#: Three (DoRA's) for each of three matrices of each of 384 experts in 61 layers are 210,816.
MAX_TENSORS = 250_000


@dataclass(frozen=True, slots=True)
class Beside:
    """A file of weights beside the adapter's own. ``problem`` says why it has no tensors that could be read."""

    name: str
    file: SourceFile
    tensors: Mapping[str, TensorRef]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it is stored. ``config`` is None where there is no adapter_config.json."""

    source: Source
    #: Of its weights: one file, or all shards.
    files: tuple[SourceFile, ...]
    config_file: SourceFile | None
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorRef]
    #: The metadata of its safetensors header, of all shards'; empty for a pickle.
    metadata: Mapping[str, str]
    #: Files of weights that were trained with it.
    beside: tuple[Beside, ...] = ()
    #: What is wrong with its folder, and what is to be said of it.
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> SourceFile:
        """The file of its weights, of several the first."""
        return self.files[0]

    @property
    def name(self) -> str:
        """What that file is called."""
        return self.file.uri.rpartition("/")[2]

    @property
    def all_files(self) -> tuple[SourceFile, ...]:
        """Every file that a merge depends on."""
        config = (self.config_file,) if self.config_file else ()
        return (*self.files, *config, *(beside.file for beside in self.beside))

    def apart_from(self, files: Collection[str]) -> AdapterFile:
        """The same without those files beside it that are another's, the base's, by uri."""
        return dataclasses.replace(self, beside=tuple(of for of in self.beside if of.file.uri not in files))

    @property
    def trained_on(self) -> str | None:
        """The base that its config names."""
        config = self.config or {}
        value = config.get("base_model_name_or_path", config.get("model"))
        return value if isinstance(value, str) and value else None

    @property
    def family(self) -> str:
        """The method that made it, by PEFT's name where it has one."""
        return detect_format(self.tensors, self.config).method(self.tensors, self.config)

    def format(self, wanted: str = "auto") -> str:
        """The name of its format: the one that is ``wanted``, or that which its files show."""
        return detect_format(self.tensors, self.config).name if wanted == "auto" else wanted

    def claims(self, config: AdapterConfig, base: BaseView = NO_BASE) -> Claims:
        """Its updates and problems, as ``config`` says; the reader asks ``base`` what the files leave open."""
        claims = self._own_claims(config, base)
        claims.problems += self.problems
        claims.warnings += self.notes
        for beside in self.beside:
            if beside.problem:
                claims.problems.append(beside.problem)
            tensors = _chosen(beside.tensors, config)
            twice = [name for name in tensors if name in self.tensors]
            if twice:
                claims.problems.append(
                    f"{beside.name} is beside the adapter and holds {len(twice)} tensors that {self.name} holds, too, "
                    f"such as {twice[0]} {list(tensors[twice[0]].shape)}; if it is of another adapter, "
                    f"{way_out(beside.name)}"
                )
            claim_beside(claims, beside.name, {name: ref for name, ref in tensors.items() if name not in twice})
        return claims

    def _own_claims(self, config: AdapterConfig, base: BaseView) -> Claims:
        tensors = self.chosen(config)
        if not tensors:
            return Claims.refusal(f"no tensor's name begins with prefix {config.prefix!r}")
        content = AdapterContent(
            tensors,
            self.config,
            self.metadata,
            config.alpha,
            config.scaling,
            None if config.expert_layout == "auto" else config.expert_layout,
            self.read_number,
            config.ignore_keys,
        )
        try:
            with bounded_regex.bounded():
                return FORMATS[self.format(config.format)].claim(content, base)
        except bounded_regex.SlowPatternError as error:
            return Claims.refusal(f"{CONFIG_NAME}: {error}")

    def chosen(self, config: AdapterConfig) -> Mapping[str, TensorRef]:
        """Its tensors, or those that begin with the config's ``prefix``."""
        return _chosen(self.tensors, config)

    def read_number(self, ref: TensorRef) -> float:
        """The value of a tensor of one number."""
        data = bytearray(DTYPE_BITS[ref.dtype] // 8)
        with open_reader(next(file for file in self.files if file.uri == ref.uri)) as reader:
            reader.read_into(ref.offset, memoryview(data))
        if ref.dtype == "BF16":  # the upper half of a float32
            data, code = bytearray(b"\0\0") + data, "f"
        elif (code := _STRUCT_CODES.get(ref.dtype, "")) == "":
            raise FormatError(f"{ref.uri}: {ref.name} is stored as {ref.dtype}; expected a number")
        (value,) = struct.unpack(f"<{code}", data)
        if not math.isfinite(value):
            raise FormatError(f"{ref.uri}: {ref.name} holds {value}")
        return float(value)


def open_adapter(source: Source, ignore: Sequence[str] = ()) -> AdapterFile:
    """Find the weights and the config, and read the headers. Raises `FormatError` or `SourceError`.

    ``ignore`` are names of files of weights in the adapter's folder that are no part of it.
    """
    directory, named = _directory(source)
    names = directory.names()
    folder = adapter_folder.look(source.location, names, named, ignore)
    config = read_json(directory, names, CONFIG_NAME) if CONFIG_NAME in names else None
    if config is not None and len(config) > _MAX_SETTINGS:
        raise FormatError(
            f"{directory.location}: {CONFIG_NAME} has {len(config):,} settings; expected {_MAX_SETTINGS:,} at most"
        )
    parts = [_read(directory, name) for name in folder.weights]
    tensors = _together(directory, folder, parts)
    if not tensors:
        raise FormatError(f"{parts[0].file.uri}: holds no tensors")
    if len(tensors) > MAX_TENSORS:
        raise FormatError(
            f"{parts[0].file.uri}: the adapter has {len(tensors):,} tensors; expected at most {MAX_TENSORS:,}"
        )
    _check_index(directory, names, parts)
    own = dict(zip(folder.weights, (part.tensors for part in parts), strict=True))
    beside, problems, notes = _beside(directory, folder, own)
    return AdapterFile(
        directory,
        tuple(part.file for part in parts),
        directory.stat(CONFIG_NAME) if config is not None else None,
        config,
        tensors,
        _metadata(directory, parts),
        tuple(beside),
        (*_no_such_files(folder, ignore), *problems),
        (*notes, *_notes(folder)),
    )


def _directory(source: Source) -> tuple[Source, str | None]:
    """Where an adapter's files are, and which of them was named by itself.

    By one of the usual names it still has its folder around it, with the config that PEFT wrote. Any other file is all.
    """
    directory = source.directory()
    if directory is source:
        return source, None
    name = source.names()[0]
    around = name in WEIGHTS or adapter_folder.is_shard(name)
    return (directory if around else source), name


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of weights, as it was read."""

    name: str
    file: SourceFile
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorRef]


def _read(source: Source, name: str) -> _Part:
    file = source.stat(name)
    if name.endswith(PICKLES):
        return _Part(name, file, {}, read_pickled(source.fetch(name), file.uri))
    shard = read_shard(source, name, MAX_TENSORS)
    return _Part(name, file, dict(shard.metadata), {ref.name: ref for ref in shard.tensors})


# --- shards -----------------------------------------------------------------------------------------------------------


def _together(source: Source, folder: Folder, parts: Sequence[_Part]) -> dict[str, TensorRef]:
    """The tensors of all shards."""
    if len(parts) == 1:
        return dict(parts[0].tensors)
    tensors: dict[str, TensorRef] = {}
    places: dict[str, str] = {}
    for part in parts:
        for name in part.tensors:
            if name in places:
                raise FormatError(
                    f"{source.location}: the tensor {name!r} is stored twice, in {places[name]} and in {part.name}"
                )
            places[name] = part.name
        tensors |= part.tensors
    return tensors


def _metadata(source: Source, parts: Sequence[_Part]) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for part in parts:
        for key, value in part.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise FormatError(
                    f"{source.location}: the metadata of its shards differ: {key!r:.80} is {metadata[key]!r:.80}, and "
                    f"in {part.name} {value!r:.80}"
                )
    return metadata


def _check_index(source: Source, names: Sequence[str], parts: Sequence[_Part]) -> None:
    """Refuse shards that are not those of their index. An index of other files is that of a model beside them."""
    if not adapter_folder.is_shard(parts[0].name):
        return
    there = {tensor: part.name for part in parts for tensor in part.tensors}
    for index in INDEXES:
        weight_map = read_index(source, index)[1] if index in names else {}
        if not any(map(adapter_folder.is_shard, weight_map.values())):
            continue
        for tensor in sorted({*there, *weight_map}):
            found, expected = there.get(tensor), weight_map.get(tensor)
            if found != expected:
                raise FormatError(
                    f"{source.location}: {index} puts {tensor!r:.200} into {expected or 'no file'}, but "
                    f"{f'it is in {found}' if found else 'it is not there'}; index and shards are not of one adapter"
                )


# --- files beside it --------------------------------------------------------------------------------------------------


def _beside(
    source: Source, folder: Folder, own: Mapping[str, Mapping[str, TensorRef]]
) -> tuple[list[Beside], list[str], list[str]]:
    """Files of weights beside the adapter's; what is wrong with them, and what is to be said of them."""
    found = {name: _read_beside(source, name) for name in folder.beside}
    known = {**own, **{name: of.tensors for name, of in found.items()}}
    problems: list[str] = []
    notes: list[str] = []
    for name in folder.beside:
        read = _read_in_its_place(name, known, own)
        if read is None or found[name].problem:
            continue
        if _shapes(found.pop(name).tensors) == _shapes(known[read]):
            notes.append(f"{name} holds the same tensors as {read}, which is read; {name} is not")
        else:
            problems.append(
                f"{name} holds other tensors than {read}, which is read in its place; if it is of another adapter, "
                f"{way_out(name)}"
            )
    return list(found.values()), problems, notes


def _read_in_its_place(name: str, known: Collection[str], own: Collection[str]) -> str | None:
    """The file of the same name in the other format, safetensors or pickle, that libraries load in place of this."""
    if (twin := adapter_folder.twin_of(name)) in known:
        return twin
    return next((other for other in own if adapter_folder.twin_of(other) == name), None)


def _shapes(tensors: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    return {name: ref.shape for name, ref in tensors.items()}


def _read_beside(source: Source, name: str) -> Beside:
    said = f"{name} is beside the adapter, where trained weights are stored"
    if not adapter_folder.is_readable(name):
        return Beside(name, source.stat(name), {}, f"{said}, in a format that is not read here; {_unless(name)}")
    try:
        part = _read(source, name)
    except FormatError as error:
        return Beside(name, source.stat(name), {}, f"{said}, and cannot be read: {error}; {_unless(name)}")
    return Beside(name, part.file, part.tensors)


def way_out(name: str) -> str:
    """What leaves a file out."""
    return f"ignore_files: [{name}] in the adapter's entry of the config merges without it"


def _unless(name: str) -> str:
    return f"if the model needs none of it, {way_out(name)}"


def _no_such_files(folder: Folder, ignore: Sequence[str]) -> list[str]:
    return [
        f"ignore_files names {name!r:.200}, which is not a file of weights in its folder; there are "
        f"{', '.join(folder.known) or 'none'}"
        for name in ignore
        if name not in folder.known
    ]


def _notes(folder: Folder) -> list[str]:
    notes = []
    if folder.ignored:
        notes.append(f"ignored, as ignore_files says: {', '.join(folder.ignored)}")
    if folder.below:
        more = ", …" if len(folder.below) > _SHOWN else ""
        below = f"{', '.join(folder.below[:_SHOWN])}{more}"
        notes.append(Warned(f"files of weights in folders below it are no part of it and are not merged: {below}"))
    return notes


def _chosen(tensors: Mapping[str, TensorRef], config: AdapterConfig) -> Mapping[str, TensorRef]:
    prefix = config.prefix
    return tensors if not prefix else {k: ref for k, ref in tensors.items() if k.startswith(prefix)}
