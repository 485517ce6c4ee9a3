"""The nouns: frozen, slotted dataclasses that are only data.

A *tensor* is stored; a *weight* is logical. Offsets and sizes are bytes, row ranges are half-open, shapes are as
stored (a Linear weight is ``(out, in)``). Everything here pickles and turns into JSON, so that a plan can be printed,
hashed, kept or sent elsewhere.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
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
#: What indices among an adapter's factors are stored as.
INTEGER_DTYPES = ("I64", "I32", "I16", "I8", "U8", "BOOL")

#: Factors of which only columns are needed are read whole up to this size, rather than row by row in pieces.
KEPT_WHOLE_BYTES = 1 << 20

#: How the config and torch call them.
DTYPE_NAMES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def dtype_code(name: str) -> str:
    """``"bfloat16"`` → ``"BF16"``."""
    return next(code for code, known in DTYPE_NAMES.items() if known == name)


#: A matrix product of fewer rows than some goes through another kernel, and rounds differently.
MIN_TILE_ROWS = 16
#: What direct I/O is aligned to, in the file and in memory.
PAGE = 4096
#: What a buffer has beyond its bytes: the pages that a block begins and ends in, and room between input and output.
BUFFER_SLACK = 4 * PAGE

#: What torch takes when it first computes: pages of its code (most of it), MKL's packing buffers, threads. Measured.
LIBRARY_BYTES = 9 << 20

#: Where matrices begin that are multiplied. MKL rounds differently where memory is less aligned than torch's own.
ALIGNMENT = 64


#: Elements and bytes of a block, for dtypes whose rows are blocks. They are llama.cpp's, and outputs only.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
}


def row_nbytes(dtype: str, elements: int) -> int:
    """Bytes of a row of so many elements, or of several rows together."""
    if dtype in BLOCKS:
        block, size = BLOCKS[dtype]
        return elements // block * size
    return elements * DTYPE_BITS[dtype] // 8


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
    #: 0 where there is no such thing, as of the Hub's files; so are the next two.
    inode: int = 0
    device: int = 0
    #: The time of the last change of content or status, which no program can choose.
    ctime_ns: int = 0


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
class Place:
    """Where a part of a module's matrix lies in a stored tensor.

    Rows are those of the matrix in its own orientation, (out, in). Of experts (E, out, in) they are the rows of every
    expert's matrix, and of experts' biases (E, out) the entries of every expert's vector.
    """

    #: Name in the checkpoint.
    tensor: str
    #: How many of the matrix's rows lie here.
    rows: int
    #: The matrix's row of the first of them.
    start: int = 0
    #: The stored tensor's row (its column if ``transposed``) at which that row lies.
    stored_start: int = 0
    #: The parameter has experts: the tensor stores this expert's matrix only; None: it stores all of them, (E, …).
    #: The parameter is one expert's matrix: the tensor stores all experts, (E, …), and the matrix is this one of them.
    expert: int | None = None
    #: The stored tensor's last two dimensions are swapped against the matrix.
    transposed: bool = False
    #: (g, a, b): the stored rows [stored_start, stored_start + rows) seen as (g, a, b) are the matrix's rows seen as
    #: (g, b, a): ``matrix_rows = stored_rows.view(g, a, b, …).transpose(1, 2).reshape(rows, …)``.
    shuffle: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a module as an adapter speaks of it, and where the checkpoint keeps it."""

    #: The in-memory name; the adapter's own where the adapter speaks of a part of a parameter (an expert, a half).
    name: str
    #: In matrix orientation: (out, in), (E, out, in), (out, in, k, …), (n,), (V, D).
    shape: tuple[int, ...]
    #: Together they cover the matrix exactly once.
    places: tuple[Place, ...]
    #: Whether the module in memory keeps it as (in, out); None where the architecture is not known: then places are not
    #: transposed, and the shape is as stored.
    is_transposed: bool | None
    #: Whether the first dimension counts experts: ``shape`` is (E, out, in), or (E, out) for their biases.
    experts: bool = False
    #: Whether its rows are those of two matrices in turn, of gate and of up.
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class ModuleOrder:
    """The Linear layers of a model in the order in which its class registers them."""

    #: The class.
    architecture: str
    modules: tuple[str, ...]
    #: Modules with a matrix whose place is not known, or that are no Linear layers.
    others: tuple[str, ...]
    #: Linear layers that the class has and the checkpoint has no weight of.
    absent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a module's matrix (of one expert's) that a tile holds."""

    rows: RowRange
    columns: RowRange
    expert: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """What one module of one adapter does to one stored tensor.

    ``scaling`` is the whole multiplier: the adapter's own scaling times its weight in the config. ``shape`` is that of
    the matrix that the family speaks of: (out, in), (out, in, kernel…), (n,), or with ``experts`` (E, out, in). Where
    ``transposes``, that is the parameter's transpose. ``settings`` are what else the family needs to know.
    """

    adapter: int
    family: str
    module: str
    target: str
    factors: tuple[tuple[str, TensorRef], ...]
    scaling: float
    rank: int
    shape: tuple[int, ...]
    place: Place
    parameter: str = "weight"
    experts: int = 0
    transposes: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the matrix (of each expert's)."""
        return self.shape[1 if self.experts else 0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[2 if self.experts else 1 :])

    @property
    def by_columns(self) -> bool:
        """Whether a tile of stored rows holds columns of the matrix rather than rows."""
        return self.place.transposed != self.transposes

    @property
    def in_stack(self) -> bool:
        """Whether the stored tensor holds several experts."""
        return (self.experts > 0) == (self.place.expert is None) and (self.experts > 0 or self.place.expert is not None)

    def factor(self, role: str) -> TensorRef:
        return next(ref for name, ref in self.factors if name == role)

    def has(self, role: str) -> bool:
        return any(name == role for name, _ in self.factors)

    def setting(self, name: str, default: Any = None) -> Any:
        return next((value for key, value in self.settings if key == name), default)


@dataclass(frozen=True, slots=True)
class Finish:
    """What another file format does to rows after they are merged: round, turn, add, in this order.

    ``shuffle`` (g, a, b): rows seen as (g, a, b) are the file's seen as (g, b, a); a tile holds multiples of a · b.
    """

    #: What the merged value is rounded to, as if it had been stored in between.
    dtype: str
    shuffle: tuple[int, int, int] | None = None
    #: Added in float32; in float16 where ``dtype`` is F16.
    addend: float = 0.0

    @property
    def group(self) -> int:
        return self.shuffle[1] * self.shuffle[2] if self.shuffle else 1


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: its source, its place in the new shard, its updates in order, its number of row tiles.

    ``tiles == 0`` means that the bytes travel as they are. ``segments`` are (rows, tiles) of runs of rows that no tile
    reaches across: experts, and modules that are stored as one tensor. Empty, there is one run.
    """

    source: TensorRef
    out: TensorInfo
    updates: tuple[Update, ...] = ()
    tiles: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    finish: Finish | None = None
    #: Rows of the source that the output is made of; None is all.
    part: RowRange | None = None
    #: The base's own tensor, where the source is an adapter's in its place.
    base: TensorRef | None = None

    @property
    def row_dims(self) -> int:
        """Leading dimensions whose product is the number of rows."""
        in_stack = any(update.in_stack for update in self.updates)
        return 2 if in_stack or (self.finish is not None and len(self.source.shape) == 3) else 1

    @property
    def goes_by_rows(self) -> bool:
        """Conversion alone works by element, so there every element is a row."""
        return bool(self.source.shape) and (bool(self.updates) or self.finish is not None)

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
        return math.prod(self.source.shape[self.row_dims :]) if self.updates or self.finish else 1

    def ranges(self) -> Iterator[RowRange]:
        """The rows of every tile, in order, as the source counts them."""
        start = self.first_row
        for rows, tiles in self.segments or ((self.rows, self.tiles),):
            for part in even_rows(rows, tiles):
                yield RowRange(start + part.start, start + part.stop)
            start += rows


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its name, the header's metadata and its tensors in the order of their data."""

    name: str
    metadata: tuple[tuple[str, str], ...]
    tensors: tuple[TensorPlan, ...]
    header_bytes: int
    data_bytes: int
    #: All that comes before the data, where it is no safetensors header.
    head: bytes = b""

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

    @property
    def total(self) -> int:
        buffers = self.buffers * (self.buffer_bytes + BUFFER_SLACK)
        work = self.workers * self.workspace_bytes + self.factor_bytes + self.shared_bytes
        return buffers + work + LIBRARY_BYTES + self.code_bytes


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


#: What a merge's bytes depend on: of each part (base, adapters, files, config, program, work) a value by name, so that
#: one can say in what two merges differ.
Fingerprint = Mapping[str, Mapping[str, Any]]


def digest_of(value: Any) -> str:
    """A hash of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    fingerprint: Fingerprint

    @property
    def digest(self) -> str:
        """Which plan this is. A plan has read headers only; what a merge writes down has seen the adapters' bytes."""
        return digest_of(self.fingerprint)

    @property
    def is_gguf(self) -> bool:
        """Whether the output is one GGUF file, and no checkpoint."""
        return bool(self.config["output"]["format"] == "gguf")

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


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a sample of a tensor's elements came through: sums over them, so that samples can be added."""

    #: Σ W², Σ ΔW² and Σ ΔŴ·ΔW, where ΔW is the update before and ΔŴ after the rounding.
    weight: float
    update: float
    kept: float
    #: Elements that are what they would be without the update.
    unchanged: int
    elements: int

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(
            self.weight + other.weight,
            self.update + other.update,
            self.kept + other.kept,
            self.unchanged + other.unchanged,
            self.elements + other.elements,
        )

    @property
    def relative_update(self) -> float:
        """‖ΔW‖ / ‖W‖; 0 where W is all zero."""
        return math.sqrt(self.update / self.weight) if self.weight else 0.0

    @property
    def share_kept(self) -> float:
        """How much of ΔW the rounding kept: the projection of ΔŴ on it. 1 where there is nothing to keep."""
        return self.kept / self.update if self.update else 1.0

    @property
    def share_unchanged(self) -> float:
        return self.unchanged / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """Says that a shard of a merge is finished and durable."""

    shard: str
    nbytes: int
    #: Of the whole file, header included: ``xxh3_128``, and ``sha256`` where it was asked for.
    checksums: Mapping[str, str]
    #: Adapters, by number, of which some factor B in this shard was not all zero.
    active_adapters: tuple[int, ...]
    #: How the updates of this shard's tensors came through the rounding, by the tensor's name.
    fidelity: Mapping[str, Fidelity] = dataclasses.field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """What the journal and the record say of the file."""
        return {"bytes": self.nbytes, **self.checksums}


def jsonable(value: Any) -> Any:
    """Dataclasses → dictionaries, tuples → lists, bytes → base64, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value
