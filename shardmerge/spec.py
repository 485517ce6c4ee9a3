"""The nouns: frozen, slotted dataclasses that are only data.

A *tensor* is stored; a *weight* is logical. Offsets and sizes are bytes, row ranges are half-open, shapes are as
stored (a Linear weight is ``(out, in)``). Everything here pickles and turns into JSON, so that a plan can be printed,
hashed, kept or sent elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Bits per element of every dtype the safetensors format knows.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: The dtypes that weights are merged in and converted between.
FLOAT_DTYPES = ("F32", "F16", "BF16")
#: The dtypes that an adapter's factors are read from.
FACTOR_DTYPES = (*FLOAT_DTYPES, "F64")

#: How the config and torch call them.
DTYPE_NAMES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def dtype_code(name: str) -> str:
    """``"bfloat16"`` → ``"BF16"``."""
    return next(code for code, known in DTYPE_NAMES.items() if known == name)


#: Where matrices begin that are multiplied. MKL rounds differently where memory is less aligned than torch's own.
ALIGNMENT = 64


def aligned(size: int) -> int:
    """Bytes up to the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a dense tensor takes.

    ``ValueError`` where a sub-byte dtype does not fill its last byte, or where no file could hold so many elements.
    """
    elements = 1
    for size in shape:  # not math.prod: a hostile shape takes it minutes
        elements *= size
        if elements >= 1 << 63:
            raise ValueError(f"{dtype} of shape {reprlib.repr(list(shape))} has more elements than a file can hold")
    bits = elements * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} of shape {list(shape)} does not fill whole bytes")
    return bits // 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a safetensors header; ``data_offsets`` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when the plan was made. ``uri`` is an absolute path, or ``hub://org/name@commit/file``."""

    uri: str
    size: int
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a stored tensor lies, without its data.

    ``offset`` counts from the start of the file. ``strides`` are in elements; ``None`` means dense and row-major, which
    is all that safetensors has. Pickled views, and factors that are kept transposed, have strides. ``is_transposed``
    says that ``shape`` is the other way round than in the file.
    """

    name: str
    uri: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    is_transposed: bool = False

    def transposed(self) -> TensorRef:
        """The same bytes seen as the transpose of a matrix."""
        rows, columns = self.shape
        row_stride, column_stride = self.strides or (columns, 1)
        return dataclasses.replace(
            self,
            shape=(columns, rows),
            strides=(column_stride, row_stride),
            is_transposed=not self.is_transposed,
        )


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows ``start <= row < stop``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def even_rows(rows: int, tiles: int) -> Iterator[RowRange]:
    """Split ``rows`` into ``tiles`` ranges whose lengths differ by one at most, the longer ones first."""
    quotient, remainder = divmod(rows, tiles)
    start = 0
    for tile in range(tiles):
        stop = start + quotient + (tile < remainder)
        yield RowRange(start, stop)
        start = stop


@dataclass(frozen=True, slots=True)
class Weight:
    """A logical weight of the base: the stored tensors that make it up, by role, and the shard each lies in."""

    name: str
    parts: tuple[tuple[str, TensorRef], ...]
    shard: str

    @property
    def tensor(self) -> TensorRef:
        """The one part of a weight that is stored plainly."""
        return self.parts[0][1]


@dataclass(frozen=True, slots=True)
class Update:
    """What one module of one adapter does to one base weight.

    ``scaling`` is the whole multiplier: the adapter's own scaling times its weight in the config.
    """

    adapter: int
    family: str
    module: str
    target: str
    factors: tuple[tuple[str, TensorRef], ...]
    scaling: float
    rank: int

    def factor(self, role: str) -> TensorRef:
        return next(ref for name, ref in self.factors if name == role)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: its source, its place in the new shard, its updates in order, its number of row tiles.

    ``tiles == 0`` means that the bytes travel as they are.
    """

    source: TensorRef
    out: TensorInfo
    updates: tuple[Update, ...] = ()
    tiles: int = 0

    @property
    def rows(self) -> int:
        """Rows that tiles are made of. Conversion alone works by element, so there every element is a row."""
        return self.source.shape[0] if self.updates and self.source.shape else math.prod(self.source.shape)

    @property
    def row_elements(self) -> int:
        return math.prod(self.source.shape[1:]) if self.updates else 1


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its name, the header's metadata and its tensors in the order of their data."""

    name: str
    metadata: tuple[tuple[str, str], ...]
    tensors: tuple[TensorPlan, ...]
    header_bytes: int
    data_bytes: int

    @property
    def nbytes(self) -> int:
        return self.header_bytes + self.data_bytes


@dataclass(frozen=True, slots=True)
class AuxFile:
    """A file that is copied beside the shards. ``content`` replaces the source's bytes where it is not None."""

    name: str
    source: SourceFile
    content: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The working set above the interpreter's own memory, in bytes."""

    buffers: int
    buffer_bytes: int
    workspace_bytes: int
    factor_bytes: int

    @property
    def total(self) -> int:
        return self.buffers * self.buffer_bytes + self.workspace_bytes + self.factor_bytes


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a plan and a record say of the base."""

    location: str
    revision: str | None
    nbytes: int
    shards: int
    tensors: int
    model_type: str | None
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a plan and a record say of an adapter."""

    location: str
    revision: str | None
    format: str
    family: str
    weight: float
    nbytes: int
    tensors: int
    trained_on: str | None
    files: tuple[SourceFile, ...]


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
    bytes_read: int
    bytes_written: int
    warnings: tuple[str, ...]
    overwrite: bool
    config: Mapping[str, Any]
    digest: str

    def updates(self) -> Iterator[tuple[TensorPlan, Update]]:
        """Every update, with the tensor it applies to."""
        for shard in self.shards:
            for tensor in shard.tensors:
                for update in tensor.updates:
                    yield tensor, update


@dataclass(frozen=True, slots=True)
class Receipt:
    """Says that a shard of a merge is finished and durable."""

    shard: str
    digest: str
    nbytes: int
    #: Adapters, by number, of which some factor B in this shard was not all zero.
    active_adapters: tuple[int, ...]


def jsonable(value: Any) -> Any:
    """Dataclasses → dictionaries, tuples → lists, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
