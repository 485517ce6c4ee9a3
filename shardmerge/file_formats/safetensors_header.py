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
from shardmerge.key_mapping.naming import MAX_NAME, fault
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
_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_quoted = json.encoder.encode_basestring

Metadata = tuple[tuple[str, str], ...]
#: One of each shape.
_Shapes = dict[tuple[int, ...], tuple[int, ...]]


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
    shapes: _Shapes = {}
    try:
        for name, entry in entries(text):
            if name == METADATA and metadata is None:
                metadata = _metadata(entry, where)
            elif name == METADATA or name in tensors:
                raise DuplicateKeyError(reprlib.repr(name))
            elif len(tensors) == most:
                raise FormatError(f"{where}: the header names over {most:,} tensors; expected fewer")
            else:
                tensors[name] = _checked(name, entry, shapes, where)
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
    return type(values) is list and all(type(value) is int and 0 <= value < _TOO_LARGE for value in values)


def _checked(name: str, entry: Any, shapes: _Shapes, where: str) -> TensorInfo:
    """A tensor's entry as the format has it. Raises `FormatError`.

    Layers repeat: where a shape is in ``shapes``, few checks are left. That takes 4 % off a plan of 45,000 targets.
    """
    try:
        dtype, sizes, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_plain = type(dtype) is str and dtype in DTYPE_BITS and len(name) <= MAX_NAME and name.isprintable()
        is_counted = type(start) is type(stop) is int and 0 <= start < _TOO_LARGE and 0 <= stop < _TOO_LARGE
        # To a dictionary True is 1, and 2.0 is 2.
        if is_plain and is_counted and type(sizes) is list and _INTEGERS.issuperset(map(type, sizes)):
            return TensorInfo(dtype, shapes[tuple(sizes)], (start, stop))
    except (KeyError, TypeError, ValueError):
        pass
    if wrong := fault(name) or _fault_of_entry(name, entry):
        raise FormatError(f"{where}: {wrong}")
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    return TensorInfo(entry["dtype"], shapes.setdefault(shape, shape), (start, stop))


def _fault_of_entry(name: str, entry: Any) -> str:
    """Why an entry is refused; empty where nothing is wrong with it."""
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        return f"the entry of {name!r} must have dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"{name!r} has the unknown dtype {reprlib.repr(dtype)}; known are {', '.join(sorted(DTYPE_BITS))}"
    if not _are_counts(shape):
        return f"{name!r} has the shape {reprlib.repr(shape)}, which is not a list of sizes"
    if len(shape) > MAX_DIMENSIONS:
        return f"{name!r} has {len(shape):,} dimensions; expected {MAX_DIMENSIONS} at most"
    if not _are_counts(offsets) or len(offsets) != 2:
        return f"{name!r} has the data_offsets {reprlib.repr(offsets)}, which are not a pair of offsets"
    return ""


def validate(tensors: Mapping[str, TensorInfo], data_bytes: int, where: str) -> dict[str, TensorInfo]:
    """Check that the tensors fill the data, each as large as its shape. Returns them in the order of their data."""
    ordered = dict(tensors)
    starts = [info.data_offsets for info in tensors.values()]
    if starts != sorted(starts):
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
    entries = [f'"__metadata__":{_json(dict(metadata))}'] if metadata else []
    shapes = {shape: _json(shape) for shape in {info.shape for info in tensors.values()}}
    for name, info in tensors.items():
        start, stop = info.data_offsets
        entries.append(
            f'{_quoted(name)}:{{"dtype":"{info.dtype}","shape":{shapes[info.shape]},"data_offsets":[{start},{stop}]}}'
        )
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * max(length - len(text) - LENGTH_BYTES, -(len(text) + LENGTH_BYTES) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
