"""Pickled tensor files (``.bin``, ``.pt``) → `TensorRef`s, without running what is in them and without their data.

``torch.load(weights_only=True)`` under ``FakeTensorMode`` yields shapes, strides and the place of each storage in the
zip archive, so that factors of a pickle are read lazily by byte range like those of a safetensors file.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from shardmerge.errors import FormatError, SourceError
from shardmerge.spec import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of the pickle proper, without the tensors' data: a million entries need less.
MAX_PICKLE_BYTES = 100_000_000
_LOCAL_HEADER_BYTES = 30
_CODES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}


def read_pickled(path: Path, uri: str) -> dict[str, TensorRef]:
    """The tensors of a state dict saved by ``torch.save``.

    Raises `FormatError` for anything else, `SourceError` if the file cannot be read.
    """
    records = _check_archive(path)
    state = _load(path)
    if not isinstance(state, dict):
        raise FormatError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors (a state dict)")
    return {name: _ref(path, uri, name, value, records) for name, value in state.items()}


def _check_archive(path: Path) -> dict[int, int]:
    """The sizes of the archive's entries by the offsets of their data."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = archive.infolist()
            records = {_data_offset(file, entry): entry.file_size for entry in entries}
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error):
        raise FormatError(
            f"{path}: not the zip archive that torch.save writes since PyTorch 1.6, or it was cut. Load it where it "
            "came from and save it again, best as safetensors"
        ) from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FormatError(f"{path}: {entry.filename} is compressed, which torch.save never does")
        if entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise FormatError(f"{path}: its pickle is {entry.file_size} bytes long; the limit is {MAX_PICKLE_BYTES}")
    return records


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's data begins: after its own header, whose two last fields are the lengths of what follows it."""
    file.seek(entry.header_offset + _LOCAL_HEADER_BYTES - 4)
    name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + _LOCAL_HEADER_BYTES + int(name) + int(extra)


def _load(path: Path) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            return torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own advice, to load with weights_only=False, is what must not be followed here.
        reason = str(error).splitlines()[0].split("In PyTorch 2.6")[0].strip()
        raise FormatError(
            f"{path}: the pickle asks for more than tensors, so it was not loaded: it could run code. {reason}"
        ) from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # What a hostile pickle makes torch raise has no common class; nothing was run, and nothing is kept.
        raise FormatError(f"{path}: cannot be loaded as tensors: {type(error).__name__}: {error}") from None


def _ref(path: Path, uri: str, name: Any, value: Any, records: Mapping[int, int]) -> TensorRef:
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise FormatError(
            f"{path}: the entry {name!r} is a {type(value).__name__}; expected a flat dictionary of tensors by name"
        )
    code = _CODES.get(str(value.dtype))
    if code is None or value.layout != torch.strided:
        raise FormatError(f"{path}: {name!r} is a {value.layout} tensor of {value.dtype}; expected dense floats")
    return _dense_ref(path, uri, name, value, code, records)


def _dense_ref(path: Path, uri: str, name: str, tensor: Tensor, code: str, records: Mapping[int, int]) -> TensorRef:
    size = tensor.element_size()
    extent = 0
    if tensor.numel():
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset() * size
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    # The pickle says how large a storage is; what counts is how much the file has of it.
    if offset is None or begin + extent * size > records.get(offset, -1):
        raise FormatError(f"{path}: {name!r} reaches outside its storage")
    return TensorRef(
        name=name,
        uri=uri,
        dtype=code,
        shape=tuple(tensor.shape),
        offset=offset + begin,
        nbytes=extent * size,
        strides=None if tensor.is_contiguous() else tuple(tensor.stride()),
    )
