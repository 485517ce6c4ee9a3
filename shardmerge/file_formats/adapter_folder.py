"""Which of a folder's files are an adapter's: its weights, what was trained beside it, the trainer's own state.

Trainers write what was trained in full into files of its own beside the adapter (``non_lora_state_dict.bin``,
``vit.safetensors``, ``value_head.safetensors``). So every file of weights at the top of the folder is a part of what
was trained, unless it is known to be a trainer's state. Only names are looked at here.
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
#: What transformers calls the index of a sharded adapter: as a model's, or by the adapter's own name.
INDEXES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
_SHARD = re.compile(r"adapter_model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_READABLE = (".safetensors", *PICKLES)
_HOLDS_WEIGHTS = re.compile(
    r".+\.(safetensors|sft|bin|pt|pth|ckpt|npz|npy|h5|hdf5|msgpack|ot|pkl|pickle|gguf|ggml|onnx|mlmodel|nemo|tflite"
    r"|distcp|pdparams)",
    re.IGNORECASE | re.DOTALL,
)
#: What trainers keep to go on from: transformers, accelerate, DeepSpeed, torchtune; and mlx-lm's earlier steps.
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
    """Names of files. ``weights`` are the adapter's own: one, or all its shards."""

    weights: tuple[str, ...]
    #: Files of weights beside those, which are accounted for as the adapter is.
    beside: tuple[str, ...]
    #: Files of weights in folders further down, which are not part of this adapter.
    below: tuple[str, ...]
    #: Of those that were to be ignored, the ones that are there.
    ignored: tuple[str, ...]
    #: Files of weights at the top, training state as well.
    known: tuple[str, ...]


def is_shard(name: str) -> bool:
    """Whether a file is called as one shard of an adapter."""
    return _SHARD.fullmatch(name) is not None


def is_readable(name: str) -> bool:
    """Whether tensors of a file that is called so can be read."""
    return name.endswith(_READABLE)


def look(location: str, names: Collection[str], named: str | None, ignored: Collection[str]) -> Folder:
    """What the files of an adapter's folder are.

    ``named`` is the file that was asked for by itself, if one was; ``ignored`` are files that the config leaves out.
    Raises `FormatError` where it is not clear which file is the adapter, or where shards are missing.
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
    # Only a sole candidate is certain. Of a pickle and its safetensors twin, libraries load the latter.
    candidates = [name for name in counted if is_readable(name) and twin_of(name) not in counted]
    if len(candidates) == 1:
        return (candidates[0],)
    # PEFT saves an adapter that is not called "default" into a folder of its name.
    nested = [name for name in names if "/" in name and name.endswith(WEIGHTS)]
    found = ", ".join(candidates or nested) or "none of that kind"
    if "adapter_config.json" not in names and (known := recognise.what_is_no_adapter(sorted(names))):
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
            f"{', '.join(shards[:4])}; expected those of one"
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
    """The safetensors file of the same name as a pickle; None for another kind of file."""
    stem, dot, ending = name.rpartition(".")
    return f"{stem}.safetensors" if f"{dot}{ending}" in PICKLES else None
