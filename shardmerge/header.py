"""safetensors headers: bytes ↔ `TensorInfo`, and the one place that says whether a header is valid.

The format: 8 bytes of little-endian length N, N bytes of JSON (padded with spaces), then the data. Source: the
safetensors README, and its `Metadata::validate`.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from shardmerge.errors import FormatError
from shardmerge.naming import MAX_NAME
from shardmerge.spec import DTYPE_BITS, TensorInfo, tensor_nbytes

#: What the safetensors library accepts.
MAX_HEADER_BYTES = 100_000_000
#: Header bytes that one read usually brings whole.
FIRST_READ = 1 << 16
LENGTH_BYTES = 8
ALIGNMENT = 8
_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_TOO_LARGE = 1 << 63

Metadata = tuple[tuple[str, str], ...]


def read_header(
    read: Callable[[int, int], bytes], file_size: int, where: str
) -> tuple[Metadata, dict[str, TensorInfo], int]:
    """Read and validate the header of one file.

    ``read(offset, size)`` gives bytes of the file. Returns the metadata, the tensors in the order of their data, and
    the offset at which data begins. Raises `FormatError`, naming ``where``.
    """
    head = read(0, FIRST_READ)
    if len(head) < LENGTH_BYTES:
        raise FormatError(f"{where}: {len(head)} bytes long, too short for a safetensors file")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{where}: its first 8 bytes announce a header of {length} bytes, more than the format's limit of "
            f"{MAX_HEADER_BYTES}; this is no safetensors file"
        )
    data_start = LENGTH_BYTES + length
    if data_start > file_size:
        raise FormatError(
            f"{where}: the header ends at byte {data_start}, but the file is {file_size} bytes long (cut?)"
        )
    if data_start > len(head):
        head += read(len(head), data_start - len(head))
    metadata, tensors = decode(head[LENGTH_BYTES:data_start], where)
    return metadata, validate(tensors, file_size - data_start, where), data_start


def decode(text: bytes, where: str) -> tuple[Metadata, dict[str, TensorInfo]]:
    """Header JSON → metadata and tensors, each entry well formed; `validate` checks how they lie together."""
    try:
        # Decoded here, since json would take UTF-16 as well.
        entries = json.loads(text.decode(), object_pairs_hook=unique_keys)
        if b"\\u" in text:  # half a surrogate pair, which cannot be stored again
            json.dumps(entries, ensure_ascii=False).encode()
    except DuplicateKeyError as error:
        raise FormatError(f"{where}: the header names {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the header is not JSON: {error}") from None
    if not text.startswith(b"{") or not isinstance(entries, dict):
        raise FormatError(f"{where}: the header is not a JSON object")
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    return metadata, {name: _tensor(name, entry, where) for name, entry in entries.items()}


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice; which one is the message."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What ``json.loads`` is to make of an object: of a key that stands twice, it would drop one without a word."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(reprlib.repr(keys.most_common(1)[0][0]))
    return result


def _metadata(value: Any, where: str) -> Metadata:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    return tuple(value.items())


def _are_counts(values: Any) -> bool:
    # A loop, and no all(): this runs for every number of every header.
    if type(values) is not list:
        return False
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value < _TOO_LARGE:
            return False
    return True


def _tensor(name: str, entry: Any, where: str) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise FormatError(f"{where}: a tensor's name has {len(name):,} characters; expected {MAX_NAME:,} at most")
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        raise FormatError(f"{where}: the entry of {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(
            f"{where}: {name!r} has the unknown dtype {reprlib.repr(dtype)}; known are {', '.join(sorted(DTYPE_BITS))}"
        )
    if not _are_counts(shape):
        raise FormatError(f"{where}: {name!r} has the shape {reprlib.repr(shape)}, which is no list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise FormatError(
            f"{where}: {name!r} has the data_offsets {reprlib.repr(offsets)}, which are no pair of offsets"
        )
    return TensorInfo(dtype, tuple(shape), (offsets[0], offsets[1]))


def validate(tensors: Mapping[str, TensorInfo], data_bytes: int, where: str) -> dict[str, TensorInfo]:
    """Check that the tensors tile the data from its first byte to its last, each as large as its shape says.

    Returns them in the order of their data.
    """
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
    """Length, JSON and padding: all that comes before the data, which then starts at a multiple of 8.

    ``length`` is what it must at least be: the format allows any number of spaces at its end.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(length - len(text) - LENGTH_BYTES, -(len(text) + LENGTH_BYTES) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
