"""Refuse special files in the folders of a base or an adapter: links that lead out of them, FIFOs, devices.

At the top of a folder each is refused by name, used or not; further down it is refused where the folder is copied.
Folders of training runs and of other models are not read. A link to a folder is never followed. It is refused where it
leads out or its files are needed, and reported elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from shardmerge.errors import FormatError, SourceError
from shardmerge.file_formats.checkpoint_choice import SUFFIX
from shardmerge.file_formats.checkpoint_files import read_shard
from shardmerge.planning.other_weights import is_below, is_weights
from shardmerge.planning.tokenizer import is_tokenizer
from shardmerge.sources.source import Source

#: Folders of a training run or of other formats of the same model.
_OTHER_FOLDERS = re.compile(r"(checkpoint-\d+|runs|logs|wandb|global_step\d+|onnx|openvino|coreml|original|gguf)(/.*)?")
#: The folder of base and adapter whose files are taken by their folder's name.
_TEMPLATES = "additional_chat_templates"


def is_of_another(folder: str) -> bool:
    """Whether a folder of a model holds no part of it, by its name."""
    return _OTHER_FOLDERS.fullmatch(folder) is not None


def linked_folders(
    source: Source, names: Sequence[str], needed: Collection[str] = (), left_out: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Links to folders: (those that lead out or are needed, the others).

    ``needed`` are folders that are copied whole. In those that are ``left_out``, or hold no part of the model, nothing
    is looked at.
    """
    found = [name for name in names if name.endswith("/") and not is_of_another(name[:-1])]
    found = [name for name in found if name[:-1].rpartition("/")[0] not in left_out]
    needed = {*needed, _TEMPLATES}
    refused = [name for name in found if source.leads_out(name) or is_below(name, needed)]
    return refused, [name for name in found if name not in refused]


def unfit_in_base(base: Source, names: Sequence[str], used: Collection[str]) -> Iterator[str]:
    """Why files at the top of the base, and those that are ``used``, cannot be read or copied, a reason each."""
    yield from _unfit(base, {*_at_top(base, names), *used})


def unfit_in_adapter(source: Source) -> Iterator[str]:
    """Why files at the top of an adapter's folder, and those of its tokenizer, cannot be read or copied."""
    names = source.names()
    refused, _ = linked_folders(source, [name for name in names if "/" not in name[:-1]])
    yield from _unfit(source, {*_at_top(source, names), *filter(is_tokenizer, names), *refused})


def _at_top(source: Source, names: Sequence[str]) -> list[str]:
    """Files that are checked whether they are used or not. Unused weights are not: they often are links elsewhere."""
    is_local = source.local_path is not None  # elsewhere there are only files
    return [name for name in names if is_local and "/" not in name and not is_weights(name)]


def _unfit(source: Source, names: Collection[str]) -> Iterator[str]:
    for name in sorted(names):
        try:
            source.stat(name)
            if source.leads_out(name):
                yield from _no_weights(source, name)
        except SourceError as error:
            yield str(error)


def _no_weights(source: Source, name: str) -> Iterator[str]:
    """Why a file that is called weights, and is a link that leads out, cannot be copied: it is something else."""
    try:
        if name.endswith(SUFFIX):
            read_shard(source, name)
            return
        why = f"only those in {SUFFIX} files are copied from there"
    except FormatError as error:
        why = str(error)
    yield f"{source.location}: {name} is a link that leads out of its directory, and is not known to be weights: {why}"
