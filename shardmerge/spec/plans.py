"""The plan of a merge, as data."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmerge.spec.light import light_dataclass
from shardmerge.spec.packed import PackedSequence
from shardmerge.spec.tensors import (
    BUFFER_SLACK,
    LIBRARY_BYTES,
    Encoding,
    RowRange,
    SourceFile,
    TensorInfo,
    TensorRef,
    even_rows,
)
from shardmerge.spec.updates import Update


@dataclass(frozen=True, slots=True)
class SmallPart:
    """A tensor of the output that is a part of a weight, beside its values."""

    role: str
    name: str
    info: TensorInfo


@light_dataclass(frozen=True, slots=True)
class TensorPlan:
    """One weight of the output: its source, its tensor in the new shard, its updates in order, and its tiles.

    ``source`` are the weight's values as they are stored, with the weight's own name and shape. ``tiles == 0`` means
    that the bytes are copied. ``segments`` are (rows, tiles) of runs of rows that no tile reaches across: experts, and
    modules that are stored as one tensor. Empty, there is one run.
    """

    source: TensorRef
    out: TensorInfo
    updates: tuple[Update, ...] = ()
    tiles: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    #: How the source and the output are stored; None is plainly, by their dtypes.
    decoding: Encoding | None = None
    encoding: Encoding | None = None
    #: Parts of the source beside its values, by role.
    parts: tuple[tuple[str, TensorRef], ...] = ()
    #: Parts of the output that are made beside its values, in the order of their data, which follows the values'.
    made: tuple[SmallPart, ...] = ()
    #: The name of the output's values, where it is not the weight's.
    values_name: str | None = None
    #: Rows of the source that the output is made of; None is all.
    part: RowRange | None = None
    #: The base's own tensor, where the source is an adapter's in its place.
    base: TensorRef | None = None

    def outputs(self) -> Iterator[tuple[str, TensorInfo]]:
        """The tensors of the output that the weight becomes, by name, in the order of their data."""
        yield self.values_name or self.source.name, self.out
        for part in self.made:
            yield part.name, part.info

    @property
    def row_dims(self) -> int:
        """Leading dimensions whose product is the number of rows."""
        if any(update.in_stack for update in self.updates):
            return 2
        return self.encoding.row_dims if self.encoding is not None else 1

    @property
    def goes_by_rows(self) -> bool:
        """Conversion alone works by element, so there every element is a row."""
        return bool(self.source.shape) and self._has_rows

    @property
    def _has_rows(self) -> bool:
        return bool(self.updates) or self.encoding is not None or self.decoding is not None

    @property
    def all_rows(self) -> int:
        """Rows of the source."""
        return math.prod(self.source.shape[: self.row_dims] if self.goes_by_rows else self.source.shape)

    @property
    def first_row(self) -> int:
        return self.part.start if self.part else 0

    @property
    def rows(self) -> int:
        """Rows that tiles are made of."""
        return len(self.part) if self.part else self.all_rows

    @property
    def row_elements(self) -> int:
        return math.prod(self.source.shape[self.row_dims :]) if self._has_rows else 1

    @property
    def read_row(self) -> int:
        """Bytes of a row of the source's values."""
        return self.source.nbytes // max(1, self.all_rows)

    @property
    def write_row(self) -> int:
        """Bytes of a row of the output's values."""
        return self.out.nbytes // max(1, self.rows)

    def tiled(self, segments: tuple[tuple[int, int], ...]) -> TensorPlan:
        """The same with tiles: (rows, tiles) of every run of rows."""
        tiles, several = sum(count for _, count in segments), segments if len(segments) > 1 else ()
        # Not dataclasses.replace(), which takes six times as long: there are as many of these as tensors.
        stored = (self.decoding, self.encoding, self.parts, self.made, self.values_name, self.part, self.base)
        return TensorPlan(self.source, self.out, self.updates, tiles, several, *stored)

    def ranges(self) -> Iterator[RowRange]:
        """The rows of every tile, in order, as the source counts them."""
        start = self.first_row
        for rows, tiles in self.segments or ((self.rows, self.tiles),):
            for part in even_rows(rows, tiles):
                yield RowRange(start + part.start, start + part.stop)
            start += rows


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its name, the header's metadata and its weights in the order of their data.

    The shards of a finished plan are `packed`: unpack one to use its tensors more than once.
    """

    name: str
    metadata: tuple[tuple[str, str], ...]
    tensors: Sequence[TensorPlan]
    header_bytes: int
    data_bytes: int
    #: All that comes before the data, where that is not a safetensors header.
    head: bytes = b""
    #: Each tensor's data begins at a multiple of so many bytes, with zeros before it.
    alignment: int = 1

    def outputs(self) -> Iterator[tuple[str, TensorInfo]]:
        """The tensors of the file by name, in the order of their data."""
        return itertools.chain.from_iterable(tensor.outputs() for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return self.header_bytes + self.data_bytes

    def packed(self) -> ShardPlan:
        """The same with `PackedSequence` for its tensors."""
        return dataclasses.replace(self, tensors=PackedSequence(self.tensors))

    def unpacked(self) -> ShardPlan:
        """The same with a tuple of its tensors."""
        return dataclasses.replace(self, tensors=tuple(self.tensors))


@dataclass(frozen=True, slots=True)
class TargetKind:
    """Modules of the same name in different layers, which an adapter updates alike."""

    #: The last part of the modules' name, with the parameter's where that is not ``weight``.
    module: str
    shape: tuple[int, ...]
    family: str
    #: 0 where the family has none.
    rank: int
    adapter: int
    #: How many modules there are, and their scalings.
    count: int
    scalings: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over all tensors of a plan, so that they need not be unpacked for them."""

    #: Tensors with updates, and those of which an update changes a value.
    updated: int
    changed: int
    #: How many tensors of the output have a dtype, a shape, and as many bytes: some ten kinds, however many tensors.
    kinds: tuple[tuple[str, tuple[int, ...], int, int], ...]
    targets: tuple[TargetKind, ...]


@dataclass(frozen=True, slots=True)
class AuxFile:
    """A file that is copied beside the shards. ``content`` replaces the source's bytes where it is not None."""

    name: str
    source: SourceFile
    content: str | None = None

    @property
    def nbytes(self) -> int:
        return self.source.size if self.content is None else len(self.content.encode())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The working set: what a merge takes above the interpreter with torch and the plan in it, in bytes."""

    buffers: int
    buffer_bytes: int
    #: Threads that compute, each with a workspace and rows of factors of its own.
    workers: int
    workspace_bytes: int
    factor_bytes: int
    #: Factors that several weights share, kept beside those of the weight at hand.
    shared_bytes: int = 0
    #: What torch takes on top of what it always does, for operations that only some outputs or dtypes need.
    code_bytes: int = 0
    #: How many weights are merged at a time, so that no thread waits for the last tile of one.
    weights: int = 1

    @property
    def total(self) -> int:
        buffers = self.buffers * (self.buffer_bytes + BUFFER_SLACK)
        work = self.workers * self.workspace_bytes + self.factor_bytes + self.shared_bytes
        return buffers + work + LIBRARY_BYTES + self.code_bytes


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """The base in a plan and a record."""

    location: str
    revision: str | None
    nbytes: int
    shards: int
    tensors: int
    model_type: str | None
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter in a plan and a record."""

    location: str
    revision: str | None
    format: str
    family: str
    weight: float
    nbytes: int
    tensors: int
    trained_on: str | None
    files: tuple[SourceFile, ...]


#: What a merge's bytes depend on: of each part (base, adapters, files, config, program, work) a value by name, so that
#: one can say in what two merges differ.
Fingerprint = Mapping[str, Mapping[str, Any]]


def digest_of(value: Any) -> str:
    """A hash of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_list(values: Iterator[Any]) -> str:
    """`digest_of` a list, of which a thousand items at a time are in memory."""
    found, separator = hashlib.sha256(b"["), b""
    while items := list(itertools.islice(values, 1000)):
        found.update(separator + json.dumps(items, sort_keys=True)[1:-1].encode())
        separator = b", "
    found.update(b"]")
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will do, decided from headers alone."""

    base: CheckpointInfo
    adapters: tuple[AdapterInfo, ...]
    output: str
    output_dtype: str
    compute_dtype: str
    compute_device: str
    shards: tuple[ShardPlan, ...]
    index_name: str | None
    index_metadata: tuple[tuple[str, Any], ...]
    aux: tuple[AuxFile, ...]
    memory: MemoryPlan
    totals: Totals
    bytes_read: int
    bytes_written: int
    warnings: tuple[str, ...]
    overwrite: bool
    config: Mapping[str, Any]
    fingerprint: Fingerprint

    @property
    def digest(self) -> str:
        """Which plan this is. A plan has read headers only; what a merge writes down has seen the adapters' bytes."""
        return digest_of(self.fingerprint)

    @property
    def format(self) -> str:
        """The layout of the output, by its name in `shardmerge.planning.layouts`."""
        return str(self.config["output"]["format"])

    @property
    def rounding(self) -> str:
        """How updated weights are rounded: ``nearest`` or ``stochastic``."""
        return str(self.config["output"]["rounding"])

    @property
    def seed(self) -> int:
        """Of stochastic rounding."""
        return int(self.config["output"]["seed"])

    @property
    def sha256(self) -> bool:
        """Whether shards get a sha256 beside their other checksum."""
        return bool(self.config["output"]["sha256"])

    def updates(self) -> Iterator[tuple[TensorPlan, Update]]:
        """Every update, with the tensor it applies to."""
        for shard in self.shards:
            for tensor in shard.tensors:
                for update in tensor.updates:
                    yield tensor, update


def jsonable(value: Any) -> Any:
    """Dataclasses → dictionaries, tuples → lists, bytes → base64, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, PackedSequence)):
        return [jsonable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value
