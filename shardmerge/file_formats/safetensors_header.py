"""safetensors headers: bytes ↔ `TensorInfo`, and the one place that says whether a header is valid.

The format: 8 bytes of little-endian length N, N bytes of JSON (padded with spaces), then the data. Source: the
safetensors README, and its `Metadata::validate`.
"""

from __future__ import annotations

import json
import re
import reprlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from shardmerge.errors import FormatError
from shardmerge.file_formats import recognise
from shardmerge.key_mapping.naming import fault
from shardmerge.spec.tensors import DTYPE_BITS, TensorInfo, tensor_nbytes
from shardmerge.system.json_text import DuplicateKeyError, unique_keys

#: What the safetensors library accepts.
MAX_HEADER_BYTES = 100_000_000
#: Of one file. Whole models have a third of them at most.
MAX_TENSORS = 500_000
#: Of a tensor, as in torch.
MAX_DIMENSIONS = 64
#: Characters of a tensor's name and entry together. Real ones have two hundred.
MAX_ENTRY = 2_000_000
#: Characters of ``__metadata__``, in which some keep a picture.
MAX_METADATA = 10_000_000
#: Header bytes that one read usually brings whole.
FIRST_READ = 1 << 16
LENGTH_BYTES = 8
ALIGNMENT = 8
_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_METADATA = "__metadata__"
_TOO_LARGE = 1 << 63
_INTEGERS = frozenset({int})
#: Header bytes that are decoded at a time.
_PART = 1 << 20
#: Characters of entries that are read at once.
_AT_ONCE = 1 << 18
#: How far from where text was cut JSON may see something else wrong with it: the length of ``-Infinity``.
_NEAR = 9
_SPACES = re.compile(r"[ \t\n\r]*")

Metadata = tuple[tuple[str, str], ...]


def read_header(
    read: Callable[[int, int], bytes], file_size: int, where: str, most: int = MAX_TENSORS
) -> tuple[Metadata, dict[str, TensorInfo], int]:
    """Read and validate the header of one file.

    ``read(offset, size)`` gives bytes of the file, which may name ``most`` tensors. Returns the metadata, the tensors
    in the order of their data, and the offset at which data begins. Raises `FormatError`, naming ``where``.
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
    del text  # a long one is as large as what was made of it
    return metadata, validate(tensors, file_size - data_start, where), data_start


def decode(text: bytes, where: str, most: int = MAX_TENSORS) -> tuple[Metadata, dict[str, TensorInfo]]:
    """Header JSON → metadata and tensors, each entry well formed; `validate` checks their offsets.

    Memory is bounded by a small multiple of the header's bytes, whatever they say.
    """
    if not text.startswith(b"{"):
        raise FormatError(f"{where}: the header is not {'a JSON object' if text.strip() else 'JSON: it is empty'}")
    metadata: Metadata | None = None
    tensors: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    try:
        for name, entry in _entries(text) if len(text) <= MAX_ENTRY else _entries_of_many(text):
            if name == _METADATA and metadata is None:
                metadata = _metadata(entry, where)
            elif name == _METADATA or name in tensors:
                raise DuplicateKeyError(reprlib.repr(name))
            elif len(tensors) == most:
                raise FormatError(f"{where}: the header names over {most:,} tensors; expected fewer")
            else:
                dtype, shape, offsets = _checked(name, entry, where)
                # Layers have the same shapes, so there are few; one of each is kept.
                tensors[name] = TensorInfo(dtype, shapes.setdefault(shape, shape), offsets)
    except DuplicateKeyError as error:
        raise FormatError(f"{where}: the header names {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the header is not JSON: {error}") from None
    except _TooLongError as error:
        raise FormatError(f"{where}: the header has an entry of over {error} characters; expected less") from None
    return metadata or (), tensors


def _entries(data: bytes) -> Iterable[tuple[str, Any]]:
    """Keys and values of an object in JSON. Raises `ValueError` for anything else, or `RecursionError`."""
    # Decoded here, since json would take UTF-16 as well.
    entries = _without_duplicates(data.decode())
    if b"\\u" in data:
        _check_surrogates(entries)
    found: Iterable[tuple[str, Any]] = entries.items()
    return found


def _without_duplicates(text: str) -> Any:
    """What JSON says. Raises `DuplicateKeyError` for an object with a key twice.

    Each key has a colon: where there are no more of them than keys were read, no key was lost. Only otherwise is
    Python asked for every object, which takes 4 % of a plan of 45,000 targets.
    """
    value = json.loads(text)
    if isinstance(value, dict):
        keys = len(value) + sum([len(entry) for entry in value.values() if type(entry) is dict])
        if text.count(":") == keys:
            return value
    return json.loads(text, object_pairs_hook=unique_keys)


def _check_surrogates(value: Any) -> None:
    """`ValueError` for half a pair, which cannot be stored again."""
    json.dumps(value, ensure_ascii=False).encode()


# --- headers that are long --------------------------------------------------------------------------------------------


class _TooLongError(Exception):
    """An entry is longer than it may be; the limit is the message."""


def _entries_of_many(data: bytes) -> Iterator[tuple[str, Any]]:
    """What `_entries` gives, with one entry at a time in memory: Python's objects take thirty times their JSON.

    Raises `_TooLongError`, too, which a header that is shorter than `MAX_ENTRY` cannot cause.
    """
    has_escapes = b"\\u" in data
    parts = _Parts(data)
    index = parts.next(parts.reach(0, MAX_ENTRY), "{") + 1
    if parts.text.startswith("}", parts.skip(index)):
        index = parts.skip(index)
    else:
        while True:
            name, value, index = _entry(parts, index)
            if has_escapes:
                _check_surrogates([name, value])
            yield name, value
            many, index = _whole_entries(parts, index, has_escapes)
            yield from many
            index = parts.skip(index)
            if parts.text.startswith("}", index):
                break
            index = parts.next(index, ",") + 1
    index += 1
    while (index := parts.skip(index)) == len(parts.text) and not parts.is_last:
        index = parts.reach(index, 1)
    if index < len(parts.text):
        raise parts.wrong("extra data", index)


def _whole_entries(parts: _Parts, index: int, has_escapes: bool) -> tuple[Iterable[tuple[str, Any]], int]:
    """The entries behind a comma at ``index`` that are whole in this part, and where they end; perhaps none.

    They are cut off where one looks to be whole. If that was inside a text or an entry, what was cut off is not JSON,
    and goes entry by entry, as all that is wrong does. One by one, 90,000 entries take 8 % of a plan of 45,000 targets.
    """
    end = parts.text.rfind('},"', index, index + _AT_ONCE)
    if end < 0 or not parts.text.startswith(',"', index):
        return (), index
    try:
        entries = _without_duplicates("{" + parts.text[index + 1 : end + 1] + "}")
        if has_escapes:
            _check_surrogates(entries)
    except (ValueError, RecursionError):
        return (), index
    return entries.items(), end + 1


def _entry(parts: _Parts, index: int) -> tuple[str, Any, int]:
    """The key and the value at ``index``, and where they end."""
    limit, scan = MAX_ENTRY, _any_value
    # Room for the entry, and for what stands between it and the next.
    start = index = parts.reach(index, 2 * limit)
    try:
        name, index = scan(parts.text, parts.next(index, '"'))
        index = parts.skip(parts.next(index, ":") + 1)
        if name == _METADATA:
            limit, scan = MAX_METADATA, _strings
            start = index = parts.reach(index, limit + 1)
        value, index = scan(parts.text, index)
    except json.JSONDecodeError as error:
        # An entry that is not complete in this part is too long, whatever else JSON finds wrong with it.
        if not parts.is_last and (error.msg.startswith("Unterminated") or error.pos > len(parts.text) - _NEAR):
            raise _TooLongError(f"{limit:,}") from None
        raise parts.wrong(error.msg, error.pos) from None
    if index - start > limit:
        raise _TooLongError(f"{limit:,}")
    return name, value, parts.begin_again(index) if name == _METADATA else index


class _Parts:
    """UTF-8 of which a part at a time is decoded; as one string it could take four times its bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._decoder = getincrementaldecoder("utf-8")()
        #: Characters before this part.
        self._before = 0
        self.text = ""
        self.is_last = False

    def reach(self, index: int, size: int) -> int:
        """Have ``size`` characters from ``index`` on in this part, or all there are; where the first of them is now."""
        while not self.is_last and len(self.text) - index < size:
            data = self._data[self._at : self._at + _PART]
            self._at += len(data)
            self.is_last = self._at == len(self._data)
            self._before += index
            self.text = self.text[index:] + self._decoder.decode(data, self.is_last)
            index = 0
        return index

    def begin_again(self, index: int) -> int:
        """Let go of a part that has become long: what is behind ``index`` is decoded anew."""
        self._at -= len(self.text[index:].encode()) + len(self._decoder.getstate()[0])
        self._decoder.reset()
        self._before += index
        self.text, self.is_last = "", False
        return self.reach(0, MAX_ENTRY)

    def skip(self, index: int) -> int:
        """Where the next character is that is not a space."""
        found = _SPACES.match(self.text, index)
        return found.end() if found else index

    def next(self, index: int, wanted: str) -> int:
        """Where the next character is, which must be ``wanted``."""
        index = self.skip(index)
        if not self.text.startswith(wanted, index):
            raise self.wrong(f"expecting {wanted!r}", index)
        return index

    def wrong(self, what: str, index: int) -> ValueError:
        return ValueError(f"{what}: char {self._before + index}")


# --- what an entry must be --------------------------------------------------------------------------------------------


def _strings_alone(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    """None for an object of something else than strings, so that it takes no memory."""
    return unique_keys(pairs) if all(isinstance(value, str) for _, value in pairs) else None


_any_value = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode
_strings = json.JSONDecoder(object_pairs_hook=_strings_alone).raw_decode


def _metadata(value: Any, where: str) -> Metadata:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    return tuple(value.items())


def _are_counts(values: Any) -> bool:
    # No all(): this runs for every number of every header.
    if type(values) is not list or not _INTEGERS.issuperset(map(type, values)):
        return False
    return not values or (min(values) >= 0 and max(values) < _TOO_LARGE)


def _checked(name: str, entry: Any, where: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """A tensor's dtype, shape and data_offsets, each of which is what it must be."""
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
