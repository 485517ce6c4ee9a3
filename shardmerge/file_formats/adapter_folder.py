"""Sorts the files of an adapter's folder by name: its weights, other trained weights, the trainer's state.

Trainers store weights that were trained in full in other files beside the adapter (``non_lora_state_dict.bin``,
``vit.safetensors``, ``value_head.safetensors``). So every file of weights at the top of the folder counts, unless it is
known to be a trainer's state.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shardmerge.errors import FormatError, OtherKindError
from shardmerge.file_formats import recognise

#: PEFT's names and MLX's.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: transformers' names of the index of a sharded adapter.
INDEXES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
_SHARD = re.compile(r"adapter_model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_READABLE = (".safetensors", *PICKLES)
_HOLDS_WEIGHTS = re.compile(
    r".+\.(safetensors|sft|bin|pt|pth|ckpt|npz|npy|h5|hdf5|msgpack|ot|pkl|pickle|gguf|ggml|onnx|mlmodel|nemo|tflite"
    r"|distcp|pdparams)",
    re.IGNORECASE | re.DOTALL,
)
#: Checkpoints of trainers: transformers, accelerate, DeepSpeed, torchtune; and mlx-lm's earlier steps.
_TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|lr_scheduler|rng_state|random_states|scaler|sampler|dl_state_dict|recipe_state).*"
    r"|training_args\.bin|.*_states\.pt|\d{7}_adapters\.safetensors"
)
#: Folders of a training run: earlier steps of the same adapter, and logs.
_RUN_FOLDERS = re.compile(
    r"(checkpoint-|global_step|runs|logs|wandb|recipe_state|optimizer|pytorch_model_fsdp)[^/]*/.*"
)


@dataclass(frozen=True, slots=True)
class Folder:
    """Names of files of weights."""

    #: The adapter's own: one file, or all shards.
    weights: tuple[str, ...]
    #: Other trained weights, which must be accounted for, too.
    beside: tuple[str, ...]
    #: Files in folders further down, which are not part of this adapter.
    below: tuple[str, ...]
    #: Files that the config ignores.
    ignored: tuple[str, ...]
    #: All files at the top, with training state.
    known: tuple[str, ...]


def is_shard(name: str) -> bool:
    """Whether a name is that of a shard of an adapter."""
    return _SHARD.fullmatch(name) is not None


def is_readable(name: str) -> bool:
    """Whether the tensors of a file of this name can be read."""
    return name.endswith(_READABLE)


def look(location: str, names: Collection[str], named: str | None, ignored: Collection[str]) -> Folder:
    """Sort the files of an adapter's folder.

    ``named`` is the file that a person named, if it was not the folder; ``ignored`` are files that the config ignores.
    Raises `FormatError` if the adapter cannot be determined, or if shards are missing.
    """
    top = [name for name in names if "/" not in name]
    known = [name for name in top if _HOLDS_WEIGHTS.fullmatch(name)]
    counted = [name for name in known if name not in ignored and not _TRAINING_STATE.fullmatch(name)]
    below = [name for name in names if "/" in name and _HOLDS_WEIGHTS.fullmatch(name)]
    if named is not None and named not in counted and not is_shard(named):
        counted.append(named)
    weights = _weights(location, counted, names, named)
    return Folder(
        weights,
        tuple(name for name in counted if name not in weights),
        tuple(name for name in below if not _RUN_FOLDERS.fullmatch(name)),
        tuple(name for name in known if name in ignored),
        tuple(known),
    )


def _weights(location: str, counted: Sequence[str], names: Collection[str], named: str | None) -> tuple[str, ...]:
    shards = [name for name in counted if is_shard(name)]
    if named is not None and not is_shard(named):
        return (named,)
    for usual in WEIGHTS:
        if usual in counted and named is None:
            return (usual,)
    if shards:
        _check_shards(location, shards)
        return tuple(shards)
    # Only a single candidate is certain. Of a pickle and its safetensors twin, libraries load the latter.
    candidates = [name for name in counted if is_readable(name) and twin_of(name) not in counted]
    if len(candidates) == 1:
        return (candidates[0],)
    # PEFT saves an adapter that is not named "default" in a folder of its name.
    nested = [name for name in names if "/" in name and name.endswith(WEIGHTS)]
    found = ", ".join(candidates or nested) or "none of that kind"
    if "adapter_config.json" not in names and (known := recognise.other_than_adapter(sorted(names))):
        kind = OtherKindError if known == recognise.IS_MODEL else FormatError
        raise kind(f"{location}: {known}")
    raise FormatError(
        f"{location}: expected {' or '.join(WEIGHTS[:2])}, or one .safetensors or .pt file; found {found}"
    )


def _check_shards(location: str, shards: Sequence[str]) -> None:
    parts = [match for name in shards if (match := _SHARD.fullmatch(name))]
    counts = sorted({int(part["count"]) for part in parts})
    if len(counts) > 1:
        raise FormatError(
            f"{location}: shards of several adapters, of {' and of '.join(map(str, counts))} files each: "
            f"{', '.join(shards[:4])}; expected one adapter"
        )
    there = {int(part["number"]) for part in parts}
    if missing := [number for number in range(1, counts[0] + 1) if number not in there]:
        raise FormatError(
            f"{location}: of the {counts[0]} shards of adapter_model, these are missing: "
            f"{', '.join(map(str, missing[:5]))}{', …' if len(missing) > 5 else ''}; the download is incomplete"
        )
    if len(there) != counts[0]:
        raise FormatError(f"{location}: its shards are numbered {sorted(there)[:5]}, expected 1 to {counts[0]}")


def twin_of(name: str) -> str | None:
    """The safetensors file of the same name as a pickle; None for any other file."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}.safetensors" if f"{dot}{ending}" in PICKLES else None
