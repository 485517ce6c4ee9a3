"""Opens an adapter: finds its weights and its config, and reads the headers. No tensor data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardmerge.errors import FormatError
from shardmerge.file_formats import adapter_folder
from shardmerge.file_formats.adapter_file import CONFIG_NAME, MAX_TENSORS, AdapterFile, Beside, way_out
from shardmerge.file_formats.adapter_folder import INDEXES, PICKLES, WEIGHTS, Folder
from shardmerge.file_formats.checkpoint_files import Shard, read_index, read_json, read_shard
from shardmerge.file_formats.torch_pickle import read_pickled
from shardmerge.sources.source import Source
from shardmerge.spec.notices import Warned
from shardmerge.spec.tensors import TensorRef

#: Settings of a config. PEFT's classes have sixty.
_MAX_SETTINGS = 5_000
#: Names that a message lists.
_SHOWN = 5


def open_adapter(source: Source, ignore: Sequence[str] = ()) -> AdapterFile:
    """Open an adapter. ``ignore`` are files of weights in its folder that are not part of it.

    Raises `FormatError` or `SourceError`.
    """
    directory, named = _directory(source)
    names = directory.names()
    folder = adapter_folder.look(source.location, names, named, ignore)
    config = read_json(directory, CONFIG_NAME) if CONFIG_NAME in names else None
    if config is not None and len(config) > _MAX_SETTINGS:
        raise FormatError(
            f"{directory.location}: {CONFIG_NAME} has {len(config):,} settings; expected {_MAX_SETTINGS:,} at most"
        )
    parts = [_read(directory, name) for name in folder.weights]
    tensors = _together(directory, parts)
    if not tensors:
        raise FormatError(f"{parts[0].file.uri}: holds no tensors")
    if len(tensors) > MAX_TENSORS:
        raise FormatError(
            f"{parts[0].file.uri}: the adapter has {len(tensors):,} tensors; expected at most {MAX_TENSORS:,}"
        )
    _check_index(directory, names, parts)
    own = {part.name: _by_name(part) for part in parts}
    beside, problems, notes = _beside(directory, folder, own)
    there = ", ".join(folder.known) or "none"
    unknown = [
        f"ignore_files names {name!r:.200}, which is not a file of weights in its folder; there are {there}"
        for name in ignore
        if name not in folder.known
    ]
    return AdapterFile(
        directory,
        tuple(part.file for part in parts),
        directory.stat(CONFIG_NAME) if config is not None else None,
        config,
        tensors,
        _metadata(directory, parts),
        tuple(beside),
        (*unknown, *problems),
        (*notes, *_notes(folder)),
    )


def _directory(source: Source) -> tuple[Source, str | None]:
    """The place of an adapter's files, and the file that a person named, if it was not the folder.

    A file with one of the usual names has its folder around it, with PEFT's config. Any other file is a whole adapter.
    """
    directory = source.directory()
    if directory is source:
        return source, None
    name = source.names()[0]
    around = name in WEIGHTS or adapter_folder.is_shard(name)
    return (directory if around else source), name


def _read(source: Source, name: str) -> Shard:
    if not name.endswith(PICKLES):
        return read_shard(source, name, MAX_TENSORS)
    file = source.stat(name)
    return Shard(name, file, (), tuple(read_pickled(source.fetch(name), file.uri).values()))


def _by_name(part: Shard) -> dict[str, TensorRef]:
    return {ref.name: ref for ref in part.tensors}


# --- shards -----------------------------------------------------------------------------------------------------------


def _together(source: Source, parts: Sequence[Shard]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for part in parts:
        for ref in part.tensors:
            if ref.name in tensors:
                first = tensors[ref.name].uri.rpartition("/")[2]
                raise FormatError(
                    f"{source.location}: the tensor {ref.name!r} is stored twice, in {first} and in {part.name}"
                )
            tensors[ref.name] = ref
    return tensors


def _metadata(source: Source, parts: Sequence[Shard]) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for part in parts:
        for key, value in part.metadata:
            if metadata.setdefault(key, value) != value:
                raise FormatError(
                    f"{source.location}: the metadata of its shards differ: {key!r:.80} is {metadata[key]!r:.80}, but "
                    f"{value!r:.80} in {part.name}"
                )
    return metadata


def _check_index(source: Source, names: Sequence[str], parts: Sequence[Shard]) -> None:
    """Refuse shards that do not agree with their index. An index of other files is a model's."""
    if not adapter_folder.is_shard(parts[0].name):
        return
    there = {ref.name: part.name for part in parts for ref in part.tensors}
    for index in INDEXES:
        weight_map = read_index(source, index)[1] if index in names else {}
        if not any(map(adapter_folder.is_shard, weight_map.values())):
            continue
        for tensor in sorted({*there, *weight_map}):
            found, expected = there.get(tensor), weight_map.get(tensor)
            if found != expected:
                raise FormatError(
                    f"{source.location}: {index} puts {tensor!r:.200} into {expected or 'no file'}, but "
                    f"{f'it is in {found}' if found else 'it is not there'}; index and shards are of different adapters"
                )


# --- other weights ----------------------------------------------------------------------------------------------------


def _beside(
    source: Source, folder: Folder, own: Mapping[str, Mapping[str, TensorRef]]
) -> tuple[list[Beside], list[str], list[str]]:
    """Other trained weights in the folder, problems with them, and notes."""
    found = {name: _read_beside(source, name) for name in folder.beside}
    known = {**own, **{name: of.tensors for name, of in found.items()}}
    problems: list[str] = []
    notes: list[str] = []
    for name in folder.beside:
        # Of a pickle and a safetensors file of one name, libraries load one.
        twin = adapter_folder.twin_of(name)
        read = twin if twin in known else next((of for of in own if adapter_folder.twin_of(of) == name), None)
        if read is None or found[name].problem:
            continue
        if _shapes(found.pop(name).tensors) == _shapes(known[read]):
            notes.append(f"{name} has the same tensors as {read}, which is read; {name} is not")
        else:
            problems.append(
                f"{name} has other tensors than {read}, which is read instead; if it is of another adapter, "
                f"{way_out(name)}"
            )
    return list(found.values()), problems, notes


def _shapes(tensors: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    return {name: ref.shape for name, ref in tensors.items()}


def _read_beside(source: Source, name: str) -> Beside:
    why = "in a format that is not supported"
    if adapter_folder.is_readable(name):
        try:
            part = _read(source, name)
            return Beside(name, part.file, _by_name(part))
        except FormatError as error:
            why = f"and cannot be read: {error}"
    problem = f"{name} is beside the adapter, where trained weights are stored, {why}"
    return Beside(name, source.stat(name), {}, f"{problem}; if the model needs none of it, {way_out(name)}")


def _notes(folder: Folder) -> list[str]:
    notes = []
    if folder.ignored:
        notes.append(f"ignored, as ignore_files says: {', '.join(folder.ignored)}")
    if folder.below:
        more = ", …" if len(folder.below) > _SHOWN else ""
        below = f"{', '.join(folder.below[:_SHOWN])}{more}"
        notes.append(Warned(f"files of weights in folders below it are not part of it and are not merged: {below}"))
    return notes
