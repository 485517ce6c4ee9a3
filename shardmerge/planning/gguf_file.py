"""One GGUF file as output: the same updates of the same stored tensors, laid out as llama.cpp has them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.config.schema import OutputConfig
from shardmerge.errors import SourceError
from shardmerge.gguf import layout as gguf_layout
from shardmerge.gguf.files import MAX_BYTES, too_large, wanted
from shardmerge.gguf.formats import ALIGNMENT, QUANTIZATIONS
from shardmerge.gguf.generated import values_of
from shardmerge.gguf.layout import OutputTensor, Part
from shardmerge.gguf.metadata import describe
from shardmerge.gguf.model import read_model
from shardmerge.gguf.ollama import modelfile
from shardmerge.gguf.settings import losses, notes
from shardmerge.gguf.writer import encode_header
from shardmerge.planning.aux_files import AuxFiles
from shardmerge.planning.layout import Layout
from shardmerge.planning.layouts import LaidOut
from shardmerge.sources.inline import inline_file
from shardmerge.sources.source import read_file
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import AuxFile, ShardPlan, TensorPlan
from shardmerge.spec.tensors import TensorInfo, TensorRef
from shardmerge.spec.updates import Update
from shardmerge.system.garbage import give_back

_ALLOW = "output.allow_config_loss: true writes a file that computes something else"
_ALLOWED = "The file was asked for without it (allow_config_loss), so it computes something else than transformers does"


@dataclass(frozen=True, slots=True)
class _Merged:
    """A tensor of the checkpoint that would be written; a `gguf.layout.Stored`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def lay_out(
    checkpoint: Layout, updates: Mapping[str, Sequence[Update]], aux: AuxFiles, name: str, output: OutputConfig
) -> LaidOut:
    """Lay out ``name``-``output.quantization``.gguf instead of the merged ``checkpoint``; see `OutputLayout.lay_out`.

    What of the config the file would not say is a problem, or with ``output.allow_config_loss`` a warning.

    Weights are rounded to what the checkpoint would hold before they are quantised: so the file is the one that
    converting the checkpoint would give.
    """
    laid_out = _laid_out(checkpoint, updates, aux.files, name, output)
    left_out = [note for note in aux.of_tokenizer if laid_out.problems and "tokenizer.model" in note]
    give_back()  # a vocabulary takes 50 MB while it is read, which torch, in a thread of its own, would not get
    return dataclasses.replace(laid_out, problems=(*laid_out.problems, *left_out))


def _laid_out(
    checkpoint: Layout, updates: Mapping[str, Sequence[Update]], aux: Sequence[AuxFile], name: str, output: OutputConfig
) -> LaidOut:
    nothing = Layout((), None)
    read = [file for file in aux if wanted([file.name])]
    if large := too_large({file.name: _size(file) for file in read}):
        return LaidOut(nothing, problems=large)
    contents = {file.name: _content(file) for file in read}
    if "config.json" not in contents:
        return LaidOut(nothing, problems=("output.format gguf needs the base's config.json, and there is none",))
    model, problems = read_model(json.loads(contents["config.json"]))
    if model is None:
        return LaidOut(nothing, problems=problems)
    kind = QUANTIZATIONS[output.quantization]
    merged = [
        [_Merged(tensor.source.name, tensor.out.dtype, tensor.out.shape) for tensor in shard.tensors]
        for shard in checkpoint.shards
    ]
    layout = gguf_layout.lay_out(model, merged, kind)
    description = describe(model, layout, kind, contents, name)
    lost = [f"{target} is updated, but is not in the GGUF file" for target in layout.dropped if updates.get(target)]
    of_config = losses(model)
    refused = () if output.allow_config_loss else tuple(f"{loss}. {_ALLOW}" for loss in of_config)
    problems = (*problems, *refused, *layout.problems, *description.problems, *lost)
    if problems:
        return LaidOut(nothing, problems=problems)
    stored = {tensor.source.name: tensor for shard in checkpoint.shards for tensor in shard.tensors}
    plans = tuple(plan for tensor in layout.tensors for plan in _plans(tensor, stored, updates))
    head = encode_header(description.values, layout.tensors)
    shard = ShardPlan(f"{name}-{output.quantization}.gguf", (), plans, len(head), layout.data_bytes, head, ALIGNMENT)
    text = modelfile(shard.name, description.values, contents)
    config_file = next(file.source for file in aux if file.name == "config.json")
    beside = AuxFile("Modelfile", config_file, text)
    made_of = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    warnings = (*description.warnings, *notes(model), *(Warned(f"{loss}. {_ALLOWED}") for loss in of_config))
    return LaidOut(Layout((shard,), None), (beside,), warnings=warnings, made_of=made_of)


def _size(file: AuxFile) -> int:
    return file.source.size if file.content is None else len(file.content)


def _content(file: AuxFile) -> bytes:
    if file.content is not None:
        return file.content.encode()
    try:
        return bytes(read_file(file.source, MAX_BYTES))
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
        start, end = end, end + len(part.rows) * tensor.row_nbytes
        yield _plan(tensor, part, (start, end), stored[part.tensor], bool(updates.get(part.tensor)))


def _plan(
    tensor: OutputTensor, part: Part, data_offsets: tuple[int, int], merged: TensorPlan, is_updated: bool
) -> TensorPlan:
    """``merged`` is the plan of the checkpoint's tensor that the part is made of."""
    ref = merged.source
    shape = (len(part.rows), tensor.columns) if len(ref.shape) > 1 else ref.shape
    out = TensorInfo(tensor.kind, shape, data_offsets)
    size = ref.nbytes // max(1, math.prod(ref.shape) // tensor.columns)
    is_all = len(part.rows) * size == ref.nbytes
    if is_all or is_updated or merged.decoding:
        encoding = dataclasses.replace(tensor.encoding, row_dims=2 if len(ref.shape) == 3 else 1)
        return dataclasses.replace(
            merged, out=out, encoding=encoding, part=None if is_all else part.rows, made=(), values_name=None
        )
    offset, nbytes = ref.offset + part.rows.start * size, len(part.rows) * size
    of_part = dataclasses.replace(ref, shape=shape, offset=offset, nbytes=nbytes)
    return TensorPlan(of_part, out, encoding=tensor.encoding)


def _generated(tensor: OutputTensor) -> TensorPlan:
    """The source of a tensor that is made of the config alone; its bytes are in its name."""
    values = values_of(tensor.values)
    file = inline_file(struct.pack(f"<{len(values)}f", *values))
    ref = TensorRef(tensor.name, file.uri, "F32", tensor.shape, 0, file.size)
    return TensorPlan(ref, TensorInfo("F32", tensor.shape, (tensor.offset, tensor.offset + tensor.nbytes)))
