"""Reads the tensors of a pickled file (``.bin``, ``.pt``) as `TensorRef`s, without unpickling and without their data.

torch.save writes a zip archive: a pickle, and the bytes of every storage. `pickle_reader` follows the pickle. So the
tensors are read lazily by byte range, as those of a safetensors file, and without torch.
Source: torch/serialization.py, 2.13.
"""

from __future__ import annotations

import io
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardmerge.errors import FormatError, SourceError
from shardmerge.file_formats import pickle_reader, recognise
from shardmerge.file_formats.pickle_reader import Tensor
from shardmerge.key_mapping.naming import fault
from shardmerge.spec.tensors import DTYPE_BITS, TensorRef, tensor_nbytes
from shardmerge.system.regular_files import open_regular

#: Bytes of the pickle without the tensors' data. A hundred thousand entries take less.
MAX_PICKLE_BYTES = 20_000_000
#: Bytes of the archive's directory, which has about a hundred for each tensor.
MAX_DIRECTORY_BYTES = 20_000_000
_LOCAL_HEADER_BYTES = 30


def read_pickled(path: Path, uri: str) -> dict[str, TensorRef]:
    """The tensors of a state dict saved by ``torch.save``. Raises `FormatError`, or `SourceError`."""
    text, records = _read_archive(path)
    try:
        state = pickle_reader.follow(text)
    except pickle_reader.RefusedError as error:
        raise FormatError(
            f"{path}: the pickle needs more than tensors, so it was not loaded: {str(error)[:300]} could run code"
        ) from None
    except pickle_reader.TooLargeError:
        raise FormatError(
            f"{path}: its pickle makes objects of over {pickle_reader.MAX_OBJECT_BYTES:,} bytes, more than a hundred "
            "thousand tensors take. Save it again as safetensors"
        ) from None
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise FormatError(f"{path}: its pickle is damaged: {str(error)[:300]}") from None
    if not isinstance(state, dict):
        found = "Tensor" if isinstance(state, Tensor) else type(state).__name__
        raise FormatError(f"{path}: holds a {found}, expected a dictionary of tensors (a state dict)")
    return {name: _ref(path, uri, name, value, records) for name, value in state.items()}


# --- the archive ------------------------------------------------------------------------------------------------------


class _Archive(io.FileIO):
    """A file with a limit for a read: zipfile trusts the size of the directory in the file."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile
        return super().read(size)


def _read_archive(path: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle, and key → offset and size of each storage."""
    try:
        with _Archive(open_regular(path)[0]) as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (pickle,) = (name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl"))
            _check_entries(path, archive, pickle)
            prefix, order = pickle.removesuffix(".pkl") + "/", pickle.replace("data.pkl", "byteorder")
            records = {
                name.removeprefix(prefix): (_data_offset(file, entry), entry.file_size)
                for name, entry in entries.items()
                if name.startswith(prefix)
            }
            if order in entries and archive.read(order) != b"little":
                raise FormatError(f"{path}: was saved on a big-endian machine; save it again on this one")
            end = file.seek(0, io.SEEK_END)
            if any(offset + size > end for offset, size in records.values()):
                raise zipfile.BadZipFile
            return archive.read(pickle), records
    except FormatError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # for a damaged directory, zipfile raises errors of struct, str and int
        known = _recognised(path) or (
            "is not a zip archive of torch.save (PyTorch 1.6 or later), or it was cut. Load it where it came from and "
            "save it again, best as safetensors"
        )
        raise FormatError(f"{path}: {known}") from None


def _recognised(path: Path) -> str | None:
    """What a file is that is not an archive; None if it was cut, or is older than torch's archives."""
    try:
        with open(open_regular(path)[0], "rb") as file:
            head = file.read(recognise.HEAD_BYTES)
    except OSError:
        return None
    if recognise.is_safetensors(head):
        return "it is a safetensors file; give it the ending .safetensors"
    return None if head.startswith((b"PK", b"\x80")) else recognise.what_is(head)


def _check_entries(path: Path, archive: zipfile.ZipFile, pickle: str) -> None:
    entries = archive.infolist()
    if len(entries) > len(archive.NameToInfo):
        raise FormatError(f"{path}: two entries of the archive have the same name")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise FormatError(f"{path}: {reprlib.repr(entry.filename)} is compressed, which torch.save never does")
    if (size := archive.getinfo(pickle).file_size) > MAX_PICKLE_BYTES:
        raise FormatError(f"{path}: its pickle is {size} bytes long; the limit is {MAX_PICKLE_BYTES}")


def _data_offset(file: io.FileIO, entry: zipfile.ZipInfo) -> int:
    """The offset of an entry's data: after its header, which ends with the lengths of a name and an extra field."""
    file.seek(entry.header_offset + _LOCAL_HEADER_BYTES - 4)
    name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + _LOCAL_HEADER_BYTES + int(name) + int(extra)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _ref(path: Path, uri: str, name: Any, value: Any, records: Mapping[str, tuple[int, int]]) -> TensorRef:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise FormatError(
            f"{path}: the entry {reprlib.repr(name)} is a {type(value).__name__}; expected a flat dictionary of "
            "tensors by name"
        )
    if wrong := fault(name):
        raise FormatError(f"{path}: {wrong}")
    if value.dtype not in pickle_reader.DTYPES.values():
        raise FormatError(f"{path}: {name!r} is a tensor of {value.dtype}; expected dense floats")
    try:
        tensor_nbytes(value.dtype, value.shape)
    except ValueError as error:
        raise FormatError(f"{path}: {name!r}: {error}") from None
    size = DTYPE_BITS[value.dtype] // 8
    extent = 0
    if 0 not in value.shape:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.strides, strict=True))
    # The archive's size of the storage counts, not the pickle's.
    offset, available = records.get(value.storage.key, (0, -1))
    if (value.start + extent) * size > available:
        raise FormatError(f"{path}: {name!r} reaches outside its storage")
    return TensorRef(
        name=name,
        uri=uri,
        dtype=value.dtype,
        shape=value.shape,
        offset=offset + value.start * size,
        nbytes=extent * size,
        strides=None if _is_dense(value) else value.strides,
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are contiguous. The stride of a dimension of size 1 has no meaning."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected and 0 not in tensor.shape:
            return False
        expected *= size
    return True
