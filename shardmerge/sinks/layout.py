"""Which tensor goes into which output file, at which offset. All sizes are known before any data is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardmerge import header
from shardmerge.checkpoint import INDEX_SUFFIX, Checkpoint
from shardmerge.spec import DTYPE_BITS, FLOAT_DTYPES, ShardPlan, TensorInfo, TensorPlan, TensorRef, tensor_nbytes

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


def lay_out(checkpoint: Checkpoint, dtype: str, max_shard_size: int | None) -> Layout:
    """Place every tensor of the base. ``dtype`` is a code or ``same``; ``max_shard_size`` None keeps the shards."""
    if max_shard_size is None:
        shards = tuple(_shard(shard.name, shard.metadata, shard.tensors, dtype) for shard in checkpoint.shards)
        several = checkpoint.index_name is not None or len(shards) > 1
    else:
        shards = _reshard(checkpoint, dtype, max_shard_size)
        several = len(shards) > 1
    return Layout(shards, (checkpoint.index_name or _stem(checkpoint) + INDEX_SUFFIX) if several else None)


def _shard(name: str, metadata: header.Metadata, refs: Sequence[TensorRef], dtype: str) -> ShardPlan:
    if dtype != "same":
        # Widths have changed, so the base's order may leave tensors unaligned; the widest first never does.
        refs = sorted(refs, key=lambda ref: -DTYPE_BITS[output_dtype(ref.dtype, dtype)])
    tensors, end = [], 0
    for ref in refs:
        code = output_dtype(ref.dtype, dtype)
        start, end = end, end + tensor_nbytes(code, ref.shape)
        tensors.append(TensorPlan(ref, TensorInfo(code, ref.shape, (start, end))))
    head = header.encode(metadata, {tensor.source.name: tensor.out for tensor in tensors})
    return ShardPlan(name, metadata, tuple(tensors), len(head), end)


def _reshard(checkpoint: Checkpoint, dtype: str, limit: int) -> tuple[ShardPlan, ...]:
    """Fill files in the base's order up to ``limit`` bytes of data; a tensor above it has a file of its own."""
    groups: list[list[TensorRef]] = [[]]
    filled = 0
    for shard in checkpoint.shards:
        for ref in shard.tensors:
            size = tensor_nbytes(output_dtype(ref.dtype, dtype), ref.shape)
            if groups[-1] and filled + size > limit:
                groups.append([])
                filled = 0
            groups[-1].append(ref)
            filled += size
    stem, count = _stem(checkpoint), len(groups)
    names = [f"{stem}-{number:05d}-of-{count:05d}{_SUFFIX}" for number in range(1, count + 1)]
    if count == 1:
        names = [stem + _SUFFIX]
    metadata = checkpoint.shards[0].metadata
    return tuple(_shard(name, metadata, refs, dtype) for name, refs in zip(names, groups, strict=True))


def _stem(checkpoint: Checkpoint) -> str:
    """``model`` of ``model.safetensors.index.json`` or of ``model-00001-of-00003.safetensors``."""
    if checkpoint.index_name:
        return checkpoint.index_name.removesuffix(INDEX_SUFFIX)
    return _NUMBERED_STEM.sub("", checkpoint.shards[0].name.removesuffix(_SUFFIX))
