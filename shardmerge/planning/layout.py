"""Lay out a checkpoint as output: the file and the offset of every weight, from headers alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs import comfy
from shardmerge.codecs.codec import Output
from shardmerge.codecs.registry import CODECS
from shardmerge.file_formats import safetensors_header
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.checkpoint_files import index_of_stem, stem_of_index
from shardmerge.spec.light import light_dataclass
from shardmerge.spec.plans import ShardPlan, SmallPart, TensorPlan
from shardmerge.spec.tensors import (
    DTYPE_BITS,
    FLOAT_DTYPES,
    PAGE,
    Encoding,
    TensorInfo,
    TensorRef,
    Weight,
    tensor_nbytes,
)
from shardmerge.spec.updates import Update

#: By the name of the stored tensor.
Updates = Mapping[str, Sequence[Update]]

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


@light_dataclass(frozen=True, slots=True)
class Plain:
    """A weight that the output stores by its dtype: where its data is, and the base's tensor in whose place it is."""

    source: TensorRef
    base: TensorRef
    dtype: str
    nbytes: int
    updates: Sequence[Update] = ()

    def plan(self, start: int) -> TensorPlan:
        """The weight's plan, with its data from ``start`` on."""
        info = TensorInfo(self.dtype, self.source.shape, (start, start + self.nbytes))
        base = None if self.source is self.base else self.base
        return TensorPlan(self.source, info, tuple(self.updates), base=base)


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight that the base stores by a codec and that is worked on: what it becomes."""

    weight: Weight
    outputs: tuple[Output, ...]
    encoding: Encoding
    updates: Sequence[Update]

    @property
    def base(self) -> TensorRef:
        """The values that the base stores."""
        return self.weight.tensor

    @property
    def dtype(self) -> str:
        """The dtype of the values."""
        return self.outputs[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def plan(self, start: int) -> TensorPlan:
        """The weight's plan, with its data from ``start`` on."""
        infos = []
        for output in self.outputs:
            start, end = start + output.nbytes, start
            infos.append(TensorInfo(output.dtype, output.shape, (end, start)))
        small = zip(self.outputs[1:], infos[1:], strict=True)
        name = self.outputs[0].name
        return TensorPlan(
            self.weight.tensor,
            infos[0],
            tuple(self.updates),
            decoding=self.weight.stored_as,
            encoding=self.encoding,
            parts=self.weight.parts[1:],
            made=tuple(SmallPart(output.role, output.name, info) for output, info in small),
            values_name=name if name != self.weight.name else None,
        )


Outgoing = Plain | Coded


def lay_out(
    checkpoint: Checkpoint,
    dtype: str,
    max_shard_size: int | None,
    updates: Updates | None = None,
    added: Sequence[TensorRef] = (),
    left_out: Collection[str] = (),
    encodings: Mapping[str, Encoding] | None = None,
) -> Layout:
    """Place every weight of the base that is not ``left_out``, with its updates; ``added`` comes last.

    ``dtype`` is a code or ``same``; ``max_shard_size`` None keeps the shards. A weight that an adapter replaces is that
    adapter's. ``encodings`` are what weights become, by name, that are not stored plainly and do not keep their bytes.
    """
    outgoing = _Outgoing(checkpoint, dtype, updates or {}, encodings or {})
    groups = [
        [found for ref in shard.tensors if ref.name not in left_out and (found := outgoing.of(ref))]
        for shard in checkpoint.shards
    ]
    groups[-1] += [outgoing.plain(ref) for ref in added]
    quantised = _still_quantised(checkpoint, encodings or {})
    metadata = [comfy.without_formats(shard.metadata, quantised) for shard in checkpoint.shards]
    if max_shard_size is None:
        kept = [
            (shard.name, said, group)
            for shard, said, group in zip(checkpoint.shards, metadata, groups, strict=True)
            if group or not shard.tensors
        ]
        names = [name for name, _, _ in kept]
        if len(kept) < len(groups):
            names = _numbered(checkpoint, len(kept))
        shards = tuple(_shard(name, said, group, dtype) for name, (_, said, group) in zip(names, kept, strict=True))
        several = checkpoint.index_name is not None or len(shards) > 1
    else:
        everything = [tensor for group in groups for tensor in group]
        shards = _reshard(checkpoint, metadata[0], everything, dtype, max_shard_size)
        several = len(shards) > 1
    return Layout(shards, (checkpoint.index_name or index_of_stem(_stem(checkpoint))) if several else None)


class _Outgoing:
    """Stored tensors of a base → what they are in the output.

    Of a weight that is worked on, the parts that are made anew leave their places: they follow the values. Parts that
    stay keep their bytes, whatever ``dtype`` is.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, updates: Updates, encodings: Mapping[str, Encoding]) -> None:
        self._dtype, self._updates, self._replaced = dtype, updates, _replaced(updates)
        #: What becomes of weights that are worked on, by the places of the parts that do not stay.
        self._coded: dict[tuple[str, int, int], Outgoing] = {}
        coded = [weight for weight in checkpoint.weights.values() if weight.stored_as is not None]
        self._parts = {ref.extent for weight in coded for _, ref in weight.parts}
        for weight in coded:
            if (encoding := encodings.get(weight.name)) is None:
                continue
            outgoing = self._worked(weight, encoding, updates.get(weight.name, ()))
            made = {output.role for output in outgoing.outputs} if isinstance(outgoing, Coded) else {"values"}
            is_same = weight.stored_as is not None and encoding.codec == weight.stored_as.codec
            leaving = [ref for role, ref in weight.parts if role in made or not is_same]
            self._coded |= dict.fromkeys([ref.extent for ref in leaving], outgoing)

    def _worked(self, weight: Weight, encoding: Encoding, updates: Sequence[Update]) -> Outgoing:
        """A weight in another encoding, or an adapter's whole one in its place."""
        if (whole := self._replaced.get(weight.name)) is not None:
            dtype = CODECS[encoding.codec].values
            return Plain(whole, weight.tensor, dtype, tensor_nbytes(dtype, whole.shape), updates)
        outputs = CODECS[encoding.codec].outputs(weight.name, weight.tensor.shape, encoding)
        return Coded(weight, outputs, encoding, updates)

    def of(self, ref: TensorRef) -> Outgoing | None:
        """The weight that a stored tensor becomes; None for a part that is laid out elsewhere, or left out."""
        if not self._coded or (coded := self._coded.get(ref.extent)) is None:
            return self.plain(ref)
        return coded if coded.base.extent == ref.extent else None

    def plain(self, ref: TensorRef) -> Plain:
        """A tensor that is stored plainly, or an adapter's whole one in its place."""
        source, dtype = self._replaced.get(ref.name, ref), ref.dtype
        if not self._parts or ref.extent not in self._parts:
            dtype = output_dtype(dtype, self._dtype)
        return Plain(source, ref, dtype, tensor_nbytes(dtype, source.shape), self._updates.get(ref.name, ()))


def _replaced(updates: Mapping[str, Sequence[Update]]) -> dict[str, TensorRef]:
    """Stored tensors for which an adapter has a whole one, as tensors of the base's name."""
    return {
        target: dataclasses.replace(update.factor("whole"), name=target)
        for target, of in updates.items()
        for update in of
        if FAMILIES[update.family].is_source
    }


def _shard(name: str, metadata: safetensors_header.Metadata, group: Sequence[Outgoing], dtype: str) -> ShardPlan:
    if dtype != "same" or any(map(_is_recoded, group)):
        # Widths have changed, so the base's order may leave tensors unaligned; the widest first never does.
        group = sorted(group, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    ends = list(itertools.accumulate((tensor.nbytes for tensor in group), initial=0))
    tensors = [tensor.plan(start) for tensor, start in zip(group, ends, strict=False)]
    stored = {name: info for tensor in tensors for name, info in tensor.outputs()}
    head = safetensors_header.encode(metadata, stored)
    return ShardPlan(name, metadata, tuple(tensors), _like_source(len(head), tensors), ends[-1])


def _is_recoded(tensor: Outgoing) -> bool:
    """Whether a quantised weight has become one of another format."""
    if not isinstance(tensor, Coded) or tensor.weight.stored_as is None:
        return False
    return tensor.weight.stored_as.codec != tensor.encoding.codec


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


def _still_quantised(checkpoint: Checkpoint, encodings: Mapping[str, Encoding]) -> set[str]:
    """The weights that the output stores in the same quantised format as the base."""
    return {
        name
        for name, weight in checkpoint.weights.items()
        if weight.stored_as is not None and encodings.get(name, weight.stored_as).codec == weight.stored_as.codec
    }


def _reshard(
    checkpoint: Checkpoint,
    metadata: safetensors_header.Metadata,
    tensors: Sequence[Outgoing],
    dtype: str,
    limit: int,
) -> tuple[ShardPlan, ...]:
    """Fill files in the base's order up to ``limit`` bytes of data; a tensor above it has a file of its own."""
    groups: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.nbytes
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    names = _numbered(checkpoint, len(groups))
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
