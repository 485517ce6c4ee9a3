"""Which tensor goes into which output file, at which offset. All sizes are known before any data is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.file_formats import safetensors_header
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.checkpoint_files import index_of_stem, stem_of_index
from shardmerge.spec.plans import ShardPlan, TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, FLOAT_DTYPES, PAGE, TensorInfo, TensorRef, tensor_nbytes

_NUMBERED_STEM = re.compile(r"-\d{5}-of-\d{5}$")
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Layout:
    """The output's files, and the name of its index where there is more than one."""

    shards: tuple[ShardPlan, ...]
    index_name: str | None


def output_dtype(stored: str, wanted: str) -> str:
    """The dtype that a tensor is stored in: only F32, F16 and BF16 follow ``output.dtype``."""
    return wanted if wanted != "same" and stored in FLOAT_DTYPES else stored


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor of the output: where its data comes from, and the base's tensor in whose place it is."""

    source: TensorRef
    base: TensorRef

    @property
    def dtype(self) -> str:
        return self.base.dtype


def lay_out(
    checkpoint: Checkpoint,
    dtype: str,
    max_shard_size: int | None,
    replaced: Mapping[str, TensorRef] | None = None,
    added: Sequence[TensorRef] = (),
    left_out: Collection[str] = (),
) -> Layout:
    """Place every tensor of the base that is not ``left_out``, or what is ``replaced`` by name; ``added`` comes last.

    ``dtype`` is a code or ``same``; ``max_shard_size`` None keeps the shards.
    """
    replaced = replaced or {}
    groups = [
        [Outgoing(replaced.get(ref.name, ref), ref) for ref in shard.tensors if ref.name not in left_out]
        for shard in checkpoint.shards
    ]
    groups[-1] += [Outgoing(replaced.get(ref.name, ref), ref) for ref in added]
    if max_shard_size is None:
        kept = [
            (shard, group) for shard, group in zip(checkpoint.shards, groups, strict=True) if group or not shard.tensors
        ]
        names = [shard.name for shard, _ in kept]
        if len(kept) < len(groups):
            names = _numbered(checkpoint, len(kept))
        shards = tuple(
            _shard(name, shard.metadata, group, dtype) for name, (shard, group) in zip(names, kept, strict=True)
        )
        several = checkpoint.index_name is not None or len(shards) > 1
    else:
        shards = _reshard(checkpoint, [tensor for group in groups for tensor in group], dtype, max_shard_size)
        several = len(shards) > 1
    return Layout(shards, (checkpoint.index_name or index_of_stem(_stem(checkpoint))) if several else None)


def _shard(name: str, metadata: safetensors_header.Metadata, group: Sequence[Outgoing], dtype: str) -> ShardPlan:
    if dtype != "same":
        # Widths have changed, so the base's order may leave tensors unaligned; the widest first never does.
        group = sorted(group, key=lambda tensor: -DTYPE_BITS[output_dtype(tensor.dtype, dtype)])
    tensors, end = [], 0
    for tensor in group:
        code, shape = output_dtype(tensor.dtype, dtype), tensor.source.shape
        start, end = end, end + tensor_nbytes(code, shape)
        base = None if tensor.source is tensor.base else tensor.base
        tensors.append(TensorPlan(tensor.source, TensorInfo(code, shape, (start, end)), base=base))
    head = safetensors_header.encode(metadata, {tensor.source.name: tensor.out for tensor in tensors})
    return ShardPlan(name, metadata, tuple(tensors), _like_source(len(head), tensors), end)


def _like_source(header_bytes: int, tensors: Sequence[TensorPlan]) -> int:
    """A header's length, made longer so that most data is at the same place within a page as in its source.

    Bytes then go from one file to the other by direct I/O without being moved in memory.
    """
    shifts: dict[int, int] = {}
    for tensor in tensors:
        shift = (tensor.source.offset - tensor.out.data_offsets[0]) % PAGE
        shifts[shift] = shifts.get(shift, 0) + tensor.source.nbytes
    shift = max(shifts, key=lambda shift: shifts[shift], default=0)
    if shift % safetensors_header.ALIGNMENT or 2 * shifts.get(shift, 0) <= sum(shifts.values()):
        return header_bytes
    return header_bytes + (shift - header_bytes) % PAGE


def _reshard(checkpoint: Checkpoint, tensors: Sequence[Outgoing], dtype: str, limit: int) -> tuple[ShardPlan, ...]:
    """Fill files in the base's order up to ``limit`` bytes of data; a tensor above it has a file of its own."""
    groups: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_nbytes(output_dtype(tensor.dtype, dtype), tensor.source.shape)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    names, metadata = _numbered(checkpoint, len(groups)), checkpoint.shards[0].metadata
    return tuple(_shard(name, metadata, group, dtype) for name, group in zip(names, groups, strict=True))


def _numbered(checkpoint: Checkpoint, count: int) -> list[str]:
    """Names of so many shards."""
    stem = _stem(checkpoint)
    if count == 1:
        return [stem + _SUFFIX]
    return [f"{stem}-{number:05d}-of-{count:05d}{_SUFFIX}" for number in range(1, count + 1)]


def _stem(checkpoint: Checkpoint) -> str:
    """``model`` of ``model.safetensors.index.json`` or of ``model-00001-of-00003.safetensors``."""
    if checkpoint.index_name:
        return stem_of_index(checkpoint.index_name)
    return _NUMBERED_STEM.sub("", checkpoint.shards[0].name.removesuffix(_SUFFIX))
