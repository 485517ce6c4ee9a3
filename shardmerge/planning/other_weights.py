"""Weights beside the model's own: they are copied, or left out with a note.

A model may need more weights than its index names: layers that only some programs load (``mtp.safetensors``), a head
that is stored by itself, modules of sentence-transformers in folders. They are copied byte for byte. Left out are the
same model in another format or precision, which the merge would not change, adapters, and other models in folders.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmerge.destinations.record import RECORD_NAME
from shardmerge.errors import FormatError
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.checkpoint_files import is_index, read_index, read_json, read_shard
from shardmerge.sources.source import Source
from shardmerge.spec.notices import Warned
from shardmerge.system import json_text

_WEIGHTS = re.compile(
    r".*(\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|npz|pickle|pkl|tflite|mlmodel|nemo)"
    r"|\.(safetensors|bin|h5|msgpack)\.index(\.[^./]+)?\.json)(\.tmp|\.lock)?",
    re.DOTALL,  # a name may hold the end of a line
)
#: What a training run leaves to go on from, and unfinished files: no weights of a model.
_STATE = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state)[^/]*|[^/]+_states\.pt"
    r"|[^/]+\.(tmp|lock)",
    re.DOTALL,
)
#: The same model as it was, for other programs or in another precision.
_COPIES = re.compile(
    r"(pytorch_model|tf_model|flax_model|rust_model|consolidated|open_clip|openvino|(diffusion_pytorch_)?model\b)[^/]*"
    r"|[^/]+\.(ckpt|gguf|ggml|onnx|onnx_data|ot|tflite|mlmodel|nemo)",
    re.DOTALL,
)
#: Safetensors files of the same model, in which tensors have other names.
_FOREIGN = ("consolidated", "open_clip")
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\b.*|adapters\.(safetensors|npz)", re.DOTALL)
#: What loads a model's folders: diffusers, sentence-transformers.
_MANIFESTS = ("model_index.json", "modules.json", "router_config.json")


@dataclass(slots=True)
class OtherWeights:
    """Files of the base that hold weights or an adapter: those to copy, and what a person should know of the rest."""

    copied: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def is_adapter(name: str) -> bool:
    """Whether a file in the base's own folder makes transformers take the folder for an adapter, or is its weights."""
    return _ADAPTER.fullmatch(name) is not None


def needed_folders(base: Source, names: Sequence[str]) -> set[str]:
    """Folders that the files which describe a model of several parts name, and that are there."""
    manifests = [read_json(base, name, parse=json_text.parse) for name in _MANIFESTS if name in names]
    named = {folder.strip("/") for manifest in manifests for folder in _folders_of(manifest)}
    return {folder for folder in named if folder and any(name.startswith(f"{folder}/") for name in names)}


def _folders_of(manifest: Any) -> Iterator[str]:
    """The paths in ``modules.json``, the types in ``router_config.json``, the parts in ``model_index.json``."""
    if isinstance(manifest, list):
        paths = (entry.get("path") for entry in manifest if isinstance(entry, dict))
        yield from (path for path in paths if isinstance(path, str))
    elif isinstance(manifest, dict):
        types = manifest.get("types")
        yield from types if isinstance(types, dict) else ()
        yield from (
            key for key, value in manifest.items() if isinstance(value, list) and len(value) == 2 and any(value)
        )


def is_below(name: str, folders: Collection[str]) -> bool:
    return any(name.startswith(f"{folder}/") for folder in folders)


def sort_out(
    checkpoint: Checkpoint, base: Source, names: Sequence[str], needed: Collection[str], copies: bool = True
) -> OtherWeights:
    """Decide what to do with each file of the base that holds weights and is not a shard of the model.

    ``needed`` are the folders that are copied whole. Without ``copies`` the output has no room for other weights.
    """
    result = OtherWeights()
    own = {shard.name for shard in checkpoint.shards} | {checkpoint.index_name}
    others = [name for name in names if is_weights(name) and name not in own and name != RECORD_NAME]
    needed = needed if copies else ()
    result.copied = [name for name in others if is_below(name, needed)]
    top = [name for name in others if "/" not in name and not _STATE.fullmatch(name) and not is_adapter(name)]
    extra, left = _beside(checkpoint, base, [name for name in top if not name.endswith(".json")])
    if not copies:
        extra, left = [], [*extra, *left]
    indexes = [name for name in top if is_index(name) and _names_only(base, name, extra)]
    result.copied += [*extra, *indexes]
    folders = {name.rpartition("/")[0] for name in others if "/" in name and not is_below(name, needed)}
    left += [f"{folder}/" for folder in sorted(folders)]
    if extra:
        result.notes.append(f"weights of the base beside the model are copied as they are: {_listed(extra)}")
    if left:
        result.notes.append(Warned(f"weights of the base that are not the model's own are not copied: {_listed(left)}"))
    if of_adapter := [name for name in names if is_adapter(name)]:
        adapter = f"the base's folder holds an adapter, too: {_listed(of_adapter)}"
        why = "transformers would take the output for an adapter"
        result.notes.append(Warned(f"{adapter}; it is neither merged nor copied, since {why}"))
    return result


def _beside(checkpoint: Checkpoint, base: Source, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files with weights that the model does not hold, files that are left out)."""
    extra, left = [], []
    for name in names:
        why = _why_not(checkpoint, base, name)
        if why is None:
            extra.append(name)
        else:
            left.append(name + why)
    return extra, left


def _why_not(checkpoint: Checkpoint, base: Source, name: str) -> str | None:
    """Why a file is left out, to follow its name; None for one that is copied."""
    if not name.endswith(".safetensors"):
        return "" if _COPIES.fullmatch(name) else None
    if name.startswith(_FOREIGN):
        return ""
    try:
        tensors = read_shard(base, name).tensors
    except FormatError as error:
        return f" (cannot be read: {error})"
    # One tensor of the model's name, and it is another copy of the model or of a part.
    return "" if any(ref.name in checkpoint.weights for ref in tensors) else None


def _names_only(base: Source, index: str, files: Sequence[str]) -> bool:
    """Whether an index names files that are copied, and no others."""
    try:
        return set(read_index(base, index)[1].values()) <= set(files)
    except FormatError:
        return False


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
