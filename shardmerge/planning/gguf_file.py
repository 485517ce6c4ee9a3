"""A plan whose output is one GGUF file: the same updates of the same stored tensors, laid out as llama.cpp has them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardmerge import gguf
from shardmerge.errors import SourceError
from shardmerge.gguf import OutputTensor, Part
from shardmerge.planning.layout import Layout
from shardmerge.sources.inline import inline_file
from shardmerge.sources.source import read_file
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import AuxFile, ShardPlan, TensorPlan
from shardmerge.spec.tensors import TensorInfo, TensorRef, row_nbytes
from shardmerge.spec.updates import Update

_ALLOW = "output.allow_config_loss: true writes a file that computes something else"
_ALLOWED = "The file was asked for without it (allow_config_loss), so it computes something else than transformers does"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The file and what lies beside it, or why there can be none."""

    layout: Layout
    aux: tuple[AuxFile, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    #: The files whose contents went into it, and a checksum of each.
    made_of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Merged:
    """A tensor of the checkpoint that would be written; a `gguf.layout.Stored`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def lay_out(
    checkpoint: Layout,
    updates: Mapping[str, Sequence[Update]],
    aux: Sequence[AuxFile],
    name: str,
    quantization: str,
    allow_loss: bool = False,
) -> GgufFile:
    """Lay out ``name``-``quantization``.gguf instead of the merged ``checkpoint``, which ``aux`` would lie beside.

    What of the config the file would not say is a problem, or with ``allow_loss`` a warning.

    Weights are rounded to what the checkpoint would hold before they are quantised: so the file is the one that
    converting the checkpoint would give.
    """
    nothing = Layout((), None)
    read = [file for file in aux if gguf.wanted([file.name])]
    if large := gguf.too_large({file.name: _size(file) for file in read}):
        return GgufFile(nothing, problems=large)
    contents = {file.name: _content(file) for file in read}
    if "config.json" not in contents:
        return GgufFile(nothing, problems=("output.format gguf needs the base's config.json, and there is none",))
    model, problems = gguf.read_model(json.loads(contents["config.json"]))
    if model is None:
        return GgufFile(nothing, problems=problems)
    kind = gguf.QUANTIZATIONS[quantization]
    merged = [
        [_Merged(tensor.source.name, tensor.out.dtype, tensor.out.shape) for tensor in shard.tensors]
        for shard in checkpoint.shards
    ]
    layout = gguf.lay_out(model, merged, kind)
    description = gguf.describe(model, layout, kind, contents, name)
    lost = [f"{target} is updated, but is no part of the GGUF file" for target in layout.dropped if updates.get(target)]
    of_config = gguf.losses(model)
    refused = () if allow_loss else tuple(f"{loss}. {_ALLOW}" for loss in of_config)
    problems = (*problems, *refused, *layout.problems, *description.problems, *lost)
    if problems:
        return GgufFile(nothing, problems=problems)
    stored = {tensor.source.name: tensor for shard in checkpoint.shards for tensor in shard.tensors}
    plans = tuple(plan for tensor in layout.tensors for plan in _plans(tensor, stored, updates))
    head = gguf.encode_header(description.values, layout.tensors)
    shard = ShardPlan(f"{name}-{quantization}.gguf", (), plans, len(head), layout.data_bytes, head)
    text = gguf.modelfile(shard.name, description.values, contents)
    config_file = next(file.source for file in aux if file.name == "config.json")
    beside = AuxFile("Modelfile", config_file, text)
    made_of = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    warnings = (*description.warnings, *gguf.notes(model), *(Warned(f"{loss}. {_ALLOWED}") for loss in of_config))
    return GgufFile(Layout((shard,), None), (beside,), warnings=warnings, made_of=made_of)


def _size(file: AuxFile) -> int:
    return file.source.size if file.content is None else len(file.content)


def _content(file: AuxFile) -> bytes:
    if file.content is not None:
        return file.content.encode()
    try:
        return bytes(read_file(file.source))
    except SourceError as error:
        raise type(error)(f"{error}. Nothing was written") from None


def _plans(
    tensor: OutputTensor, stored: Mapping[str, TensorPlan], updates: Mapping[str, Sequence[Update]]
) -> Iterator[TensorPlan]:
    """A plan for each part of a tensor of the file."""
    if not tensor.parts:
        yield _generated(tensor)
    end = tensor.offset
    for part in tensor.parts:
        start, end = end, end + row_nbytes(tensor.kind, len(part.rows) * tensor.columns)
        yield _plan(tensor, part, (start, end), stored[part.tensor], bool(updates.get(part.tensor)))


def _plan(tensor: OutputTensor, part: Part, place: tuple[int, int], merged: TensorPlan, is_updated: bool) -> TensorPlan:
    """``merged`` is the plan of the checkpoint's tensor that the part is made of."""
    finish, ref = tensor.finish, merged.source
    shape = (len(part.rows), tensor.columns) if len(ref.shape) > 1 else ref.shape
    out = TensorInfo(tensor.kind, shape, place)
    size = row_nbytes(ref.dtype, tensor.columns)
    is_all = len(part.rows) * size == ref.nbytes
    if is_all or is_updated:
        return TensorPlan(ref, out, finish=finish, part=None if is_all else part.rows, base=merged.base)
    offset, nbytes = ref.offset + part.rows.start * size, len(part.rows) * size
    return TensorPlan(dataclasses.replace(ref, shape=shape, offset=offset, nbytes=nbytes), out, finish=finish)


def _generated(tensor: OutputTensor) -> TensorPlan:
    """What is made of the config alone is a source like any other, its bytes in its name."""
    from shardmerge.gguf.tiles import values_of

    values = values_of(tensor).tolist()
    file = inline_file(struct.pack(f"<{len(values)}f", *values))
    ref = TensorRef(tensor.name, file.uri, "F32", tensor.shape, 0, file.size)
    return TensorPlan(ref, TensorInfo("F32", tensor.shape, (tensor.offset, tensor.offset + tensor.nbytes)))
