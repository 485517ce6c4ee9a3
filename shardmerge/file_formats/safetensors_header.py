"""Reads, validates and writes safetensors headers.

The format: a little-endian length N of 8 bytes, N bytes of JSON (padded with spaces), then the data.
Source: the safetensors README and its `Metadata::validate`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from shardmerge.errors import FormatError
from shardmerge.file_formats import recognise
from shardmerge.file_formats.header_json import METADATA, TooLongError, entries
from shardmerge.key_mapping.naming import fault
from shardmerge.spec.tensors import DTYPE_BITS, TensorInfo, tensor_nbytes
from shardmerge.system.json_text import DuplicateKeyError

#: The safetensors library's limit.
MAX_HEADER_BYTES = 100_000_000
#: Tensors of one file. Whole models have at most a third of it.
MAX_TENSORS = 500_000
#: torch's limit.
MAX_DIMENSIONS = 64
#: Bytes of the first read, which usually includes the whole header.
FIRST_READ = 1 << 16
LENGTH_BYTES = 8
ALIGNMENT = 8
_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_TOO_LARGE = 1 << 63
_INTEGERS = frozenset({int})

Metadata = tuple[tuple[str, str], ...]


def read_header(
    read: Callable[[int, int], bytes], file_size: int, where: str, most: int = MAX_TENSORS
) -> tuple[Metadata, dict[str, TensorInfo], int]:
    """Read and validate the header of one file of at most ``most`` tensors.

    ``read(offset, size)`` returns bytes of the file. Returns the metadata, the tensors in the order of their data, and
    the offset of the data. Raises `FormatError`, which names ``where``.
    """
    head = read(0, FIRST_READ)
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    is_header = len(head) >= LENGTH_BYTES and 0 < length <= MAX_HEADER_BYTES
    if not is_header and (known := recognise.what_is(head[: recognise.HEAD_BYTES])):
        raise FormatError(f"{where}: {known}")
    if len(head) < LENGTH_BYTES:
        raise FormatError(f"{where}: {len(head)} bytes long, too short for a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{where}: its first 8 bytes announce a header of {length} bytes, more than the format's limit of "
            f"{MAX_HEADER_BYTES}; this is not a safetensors file"
        )
    data_start = LENGTH_BYTES + length
    if data_start > file_size:
        raise FormatError(
            f"{where}: the header ends at byte {data_start}, but the file is {file_size} bytes long (cut?)"
        )
    text = head[LENGTH_BYTES:data_start]
    if data_start > len(head):
        text += read(len(head), data_start - len(head))
    metadata, tensors = decode(text, where, most)
    del text  # a long header is as large as its tensors
    return metadata, validate(tensors, file_size - data_start, where), data_start


def decode(text: bytes, where: str, most: int = MAX_TENSORS) -> tuple[Metadata, dict[str, TensorInfo]]:
    """Header JSON → metadata and well-formed tensors; `validate` checks their offsets.

    Memory is bounded by a small multiple of the header's bytes.
    """
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: the header is not {'a JSON object' if text.strip() else 'JSON: it is empty'}")
    metadata: Metadata | None = None
    tensors: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    try:
        for name, entry in entries(text):
            if name == METADATA and metadata is None:
                metadata = _metadata(entry, where)
            elif name == METADATA or name in tensors:
                raise DuplicateKeyError(reprlib.repr(name))
            elif len(tensors) == most:
                raise FormatError(f"{where}: the header names over {most:,} tensors; expected fewer")
            else:
                dtype, shape, offsets = _checked(name, entry, where)
                # Layers share shapes; one tuple of each is kept.
                tensors[name] = TensorInfo(dtype, shapes.setdefault(shape, shape), offsets)
    except DuplicateKeyError as error:
        raise FormatError(f"{where}: the header names {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the header is not JSON: {error}") from None
    except TooLongError as error:
        raise FormatError(f"{where}: the header has an entry of over {error} characters; expected less") from None
    return metadata or (), tensors


# --- entries ----------------------------------------------------------------------------------------------------------


def _metadata(value: Any, where: str) -> Metadata:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    return tuple(value.items())


def _are_counts(values: Any) -> bool:
    # Without all(): this runs for every number of every header.
    if type(values) is not list or not _INTEGERS.issuperset(map(type, values)):
        return False
    return not values or (min(values) >= 0 and max(values) < _TOO_LARGE)


def _checked(name: str, entry: Any, where: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """A tensor's valid dtype, shape and data_offsets."""
    if wrong := fault(name):
        raise FormatError(f"{where}: {wrong}")
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        raise FormatError(f"{where}: the entry of {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(
            f"{where}: {name!r} has the unknown dtype {reprlib.repr(dtype)}; known are {', '.join(sorted(DTYPE_BITS))}"
        )
    if not _are_counts(shape):
        raise FormatError(f"{where}: {name!r} has the shape {reprlib.repr(shape)}, which is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{where}: {name!r} has {len(shape):,} dimensions; expected {MAX_DIMENSIONS} at most")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise FormatError(
            f"{where}: {name!r} has the data_offsets {reprlib.repr(offsets)}, which are not a pair of offsets"
        )
    return dtype, tuple(shape), (offsets[0], offsets[1])


def validate(tensors: Mapping[str, TensorInfo], data_bytes: int, where: str) -> dict[str, TensorInfo]:
    """Check that the tensors fill the data, each as large as its shape. Returns them in the order of their data."""
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].data_offsets))
    end = 0
    for name, info in ordered.items():
        start, stop = info.data_offsets
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            raise FormatError(f"{where}: {name!r} starts at data byte {start} where {end} was expected; it {what}")
        try:
            expected = tensor_nbytes(info.dtype, info.shape)
        except ValueError as error:
            raise FormatError(f"{where}: {name!r}: {error}") from None
        if stop - start != expected:
            raise FormatError(
                f"{where}: {name!r} is {info.dtype} of shape {list(info.shape)}, which takes {expected} bytes, but its "
                f"data_offsets [{start}, {stop}] hold {stop - start}"
            )
        end = stop
    if end != data_bytes:
        what = "the file was cut" if end > data_bytes else "bytes follow that no tensor owns"
        raise FormatError(
            f"{where}: its tensors take {end} bytes, but the file holds {data_bytes} bytes of data; {what}"
        )
    return ordered


def encode(metadata: Metadata, tensors: Mapping[str, TensorInfo], length: int = 0) -> bytes:
    """Length, JSON and padding; the data after them is aligned to 8 bytes.

    With spaces at its end, the result has at least ``length`` bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(length - len(text) - LENGTH_BYTES, -(len(text) + LENGTH_BYTES) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
