"""Stored tensors: their dtypes, sizes and places in files, without their data."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from shardmerge.spec.light import light_dataclass

#: Bits per element of every dtype the safetensors format knows.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
#: The dtypes that weights are merged in and converted between.
FLOAT_DTYPES = ("F32", "F16", "BF16")
#: The dtypes that an adapter's factors are read from.
FACTOR_DTYPES = (*FLOAT_DTYPES, "F64")
#: What indices among an adapter's factors are stored as.
INTEGER_DTYPES = ("I64", "I32", "I16", "I8", "U8", "BOOL")
#: How the config and torch call them.
DTYPE_NAMES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def dtype_code(name: str) -> str:
    """``"bfloat16"`` → ``"BF16"``."""
    return next(code for code, known in DTYPE_NAMES.items() if known == name)


@lru_cache(maxsize=1 << 10)  # layers repeat
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


#: Up to this size a factor is read whole, even where only some of its columns are needed.
KEPT_WHOLE_BYTES = 1 << 20
#: A matrix product of fewer rows goes through another kernel, and rounds differently.
MIN_TILE_ROWS = 16
#: The alignment of direct I/O, in the file and in memory.
PAGE = 4096
#: Bytes of a buffer beyond its data, which may begin anywhere in a page.
BUFFER_SLACK = PAGE
#: Memory of torch when it first computes: pages of its code (most of it), MKL's packing buffers, threads. Measured:
#: 11.1 MiB for safetensors, 7.6 MiB (F32) to 12.4 MiB (Q4_0) for GGUF.
LIBRARY_BYTES = 10 << 20
#: The alignment of matrices that are multiplied: MKL rounds differently where memory is less aligned than torch's.
ALIGNMENT = 64


def aligned(size: int) -> int:
    """Bytes up to the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@light_dataclass(frozen=True, slots=True)
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
    #: 0 where there is none, as for the Hub's files; so are the next two.
    inode: int = 0
    device: int = 0
    #: The time of the last change of content or status, which no program can choose.
    ctime_ns: int = 0


class _Matrix(Protocol):
    """What has a transpose, as torch's tensors do; nothing here imports torch."""

    @property
    def T(self: M) -> M: ...  # noqa: N802


M = TypeVar("M", bound=_Matrix)


class Orientation(str, Enum):
    """How a view of a matrix relates to the next one. docs/glossary.md draws the views: as stored, as the matrix
    (out, in), and as what a method speaks of.
    """

    SAME = "same"
    TRANSPOSED = "transposed"
    #: Nothing but a shape can show it.
    UNKNOWN = "unknown"

    def then(self, step: Orientation) -> Orientation:
        """Two steps as one. If both transpose, they cancel out."""
        return Orientation.SAME if self is step else Orientation.TRANSPOSED

    @property
    def assumed(self) -> Orientation:
        """The same way round, where it is not known."""
        return Orientation.SAME if self is Orientation.UNKNOWN else self

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape seen after this step: the last two dimensions change places where it transposes."""
        if self is not Orientation.TRANSPOSED or len(shape) < 2:
            return shape
        return (*shape[:-2], shape[-1], shape[-2])

    def view(self, matrix: M) -> M:
        """A matrix of torch seen after this step; no copy."""
        return matrix.T if self is Orientation.TRANSPOSED else matrix


def transposed_if(condition: object) -> Orientation:
    return Orientation.TRANSPOSED if condition else Orientation.SAME


@light_dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor's name, type and position in a file, without its data.

    ``offset`` counts from the start of the file. ``strides`` are in elements; ``None`` means dense and row-major, which
    is all that safetensors has. Pickled views, and factors that are stored transposed, have strides. ``orientation`` is
    that of ``shape`` against the file.
    """

    name: str
    uri: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    orientation: Orientation = Orientation.SAME

    @property
    def extent(self) -> tuple[str, int, int]:
        """The file, and the first byte and number of bytes in it."""
        return self.uri, self.offset, self.nbytes

    def transposed(self) -> TensorRef:
        """The same bytes seen as the transpose of a matrix."""
        rows, columns = self.shape
        row_stride, column_stride = self.strides or (columns, 1)
        return dataclasses.replace(
            self,
            shape=(columns, rows),
            strides=(column_stride, row_stride),
            orientation=self.orientation.then(Orientation.TRANSPOSED),
        )


@light_dataclass(frozen=True, slots=True)
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
class Encoding:
    """How a weight is stored, if not plainly by its dtype: the name of a codec and its settings, which are JSON."""

    codec: str
    settings: tuple[tuple[str, Any], ...] = ()
    #: Leading dimensions whose product is the number of rows, where the updates do not say that they are two.
    row_dims: int = 1

    def setting(self, name: str, default: Any = None) -> Any:
        return next((value for key, value in self.settings if key == name), default)


@light_dataclass(frozen=True, slots=True)
class Weight:
    """A logical weight of the base: the stored tensors that are its parts, by role, the values first.

    ``shard`` is the file of the values. ``stored_as`` are the codec and its settings, where it is not stored plainly;
    the values then have the weight's name and shape here, whatever the file calls them.
    """

    name: str
    parts: tuple[tuple[str, TensorRef], ...]
    shard: str
    stored_as: Encoding | None = None

    @property
    def tensor(self) -> TensorRef:
        """The values."""
        return self.parts[0][1]
