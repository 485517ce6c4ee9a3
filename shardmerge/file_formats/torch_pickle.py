"""Pickled tensor files (``.bin``, ``.pt``) → `TensorRef`s, without running what is in them and without their data.

What torch.save writes is a zip archive: a pickle, and beside it the bytes of every storage. The pickle is followed and
not run (`file_formats.pickle_reader`). So factors of a pickle are read lazily by byte range like those of a
safetensors file, and a plan needs no torch. Source: torch/serialization.py, 2.13.
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

#: Bytes of the pickle proper, without the tensors' data: a hundred thousand entries need less.
MAX_PICKLE_BYTES = 20_000_000
#: Of the archive's directory, which has about a hundred for each tensor.
MAX_DIRECTORY_BYTES = 20_000_000
_LOCAL_HEADER_BYTES = 30


def read_pickled(path: Path, uri: str) -> dict[str, TensorRef]:
    """The tensors of a state dict saved by ``torch.save``.

    Raises `FormatError` for anything else, `SourceError` if the file cannot be read.
    """
    text, records = _read_archive(path)
    try:
        state = pickle_reader.follow(text)
    except pickle_reader.RefusedError as error:
        raise FormatError(
            f"{path}: the pickle asks for more than tensors, so it was not loaded: {str(error)[:300]} could run code"
        ) from None
    except pickle_reader.TooLargeError:
        raise FormatError(
            f"{path}: its pickle makes objects of over {pickle_reader.MAX_OBJECT_BYTES:,} bytes; expected a state dict"
            ", of which a hundred thousand tensors take less. Save it again as safetensors"
        ) from None
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise FormatError(f"{path}: its pickle is damaged: {str(error)[:300]}") from None
    if not isinstance(state, dict):
        found = "Tensor" if isinstance(state, Tensor) else type(state).__name__
        raise FormatError(f"{path}: holds a {found}, expected a dictionary of tensors (a state dict)")
    return {name: _ref(path, uri, name, value, records) for name, value in state.items()}


# --- the archive ------------------------------------------------------------------------------------------------------


class _Archive(io.FileIO):
    """A file of which zipfile gets no more at once than the directory may take: it believes the sizes in the file."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile
        return super().read(size)


def _read_archive(path: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle, and where the data of each storage is: offset and size by its key."""
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
                raise FormatError(f"{path}: was saved on a machine of the other byte order; save it again on this one")
            end = file.seek(0, io.SEEK_END)
            if any(offset + size > end for offset, size in records.values()):
                raise zipfile.BadZipFile
            return archive.read(pickle), records
    except FormatError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # of a damaged directory, zipfile lets pass through what struct, str and int raise
        if known := _recognised(path):
            raise FormatError(f"{path}: {known}") from None
        raise FormatError(
            f"{path}: not the zip archive that torch.save writes since PyTorch 1.6, or it was cut. Load it where it "
            "came from and save it again, best as safetensors"
        ) from None


def _recognised(path: Path) -> str | None:
    """What a file is that no archive of torch.save is; None for one that was cut, or is older than the archive."""
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
    """Where an entry's data begins: after its own header, whose two last fields are the lengths of what follows it."""
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
    # The pickle says how large a storage is; what counts is how much the file has of it.
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
    """Whether its elements are stored one after the other; the stride of a single one means nothing."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected and 0 not in tensor.shape:
            return False
        expected *= size
    return True
