"""Pickled tensor files (``.bin``, ``.pt``) → `TensorRef`s, without running what is in them and without their data.

What torch.save writes is a zip archive: a pickle, and beside it the bytes of every storage. A pickle is a program for a
stack machine. Of its instructions those that describe tensors are followed here; none of them calls anything, and none
takes more memory than is in proportion to its bytes in the file. Any other is refused. So factors of a pickle are read
lazily by byte range like those of a safetensors file, and a plan needs no torch.
Source: torch/serialization.py and torch/_utils.py, 2.13; Python's pickletools.
"""

from __future__ import annotations

import io
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge import recognise
from shardmerge.errors import FormatError, SourceError
from shardmerge.naming import fault
from shardmerge.regular_files import open_regular
from shardmerge.spec import DTYPE_BITS, TensorRef, tensor_nbytes

#: Bytes of the pickle proper, without the tensors' data: a hundred thousand entries need less.
MAX_PICKLE_BYTES = 20_000_000
#: Of the archive's directory, which has about a hundred for each tensor.
MAX_DIRECTORY_BYTES = 20_000_000
_LOCAL_HEADER_BYTES = 30
_TOO_LARGE = 1 << 63
_DTYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}
#: What else torch calls the type of a storage's numbers; a message names it.
_OTHER_DTYPES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


def read_pickled(path: Path, uri: str) -> dict[str, TensorRef]:
    """The tensors of a state dict saved by ``torch.save``.

    Raises `FormatError` for anything else, `SourceError` if the file cannot be read.
    """
    text, records = _read_archive(path)
    try:
        state = _follow(text)
    except _RefusedError as error:
        raise FormatError(
            f"{path}: the pickle asks for more than tensors, so it was not loaded: {str(error)[:300]} could run code"
        ) from None
    except (ValueError, TypeError, LookupError) as error:
        raise FormatError(f"{path}: its pickle is damaged: {str(error)[:300]}") from None
    if not isinstance(state, dict):
        found = "Tensor" if isinstance(state, _Tensor) else type(state).__name__
        raise FormatError(f"{path}: holds a {found}, expected a dictionary of tensors (a state dict)")
    return {name: _ref(path, uri, name, value, records) for name, value in state.items()}


# --- the archive ------------------------------------------------------------------------------------------------------


class _Archive(io.FileIO):
    """A file of which zipfile gets no more at once than the directory may take: it reads whatever it is told to."""

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


# --- the pickle -------------------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    """What a pickle asks for and does not get."""


@dataclass(frozen=True, slots=True)
class _Name:
    """Something of a module, which is not looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Strides and ``start`` are in elements."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


_VALUES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _follow(text: bytes) -> Any:
    """What the pickle leaves on the stack. Raises `_RefusedError`, or what a damaged one makes Python raise."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(text):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name in ("TUPLE", "SETITEMS", "APPENDS"):
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                _fill(stack[-1], items, "SETITEMS" if name == "SETITEMS" else "APPENDS")
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _fill(stack[-1], [key, value], "SETITEMS")
        elif name == "APPEND":
            value = stack.pop()
            _fill(stack[-1], [value], "APPENDS")
        elif name == "GLOBAL":
            stack.append(_Name(argument.replace(" ", ".")))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_built(called, arguments))
        elif name == "BUILD":  # attributes of a dictionary, such as the versions of its modules
            stack.pop()
        elif name not in ("PROTO", "STOP"):
            raise _RefusedError(f"the instruction {name}")
    return stack.pop()


def _fill(target: Any, items: list[Any], how: str) -> None:
    if how == "APPENDS" and isinstance(target, list):
        target += items
    elif how == "SETITEMS" and isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and (type(key) is not int or abs(key) >= _TOO_LARGE):
                raise ValueError(f"a {type(key).__name__} is a key of a dictionary")
            target[key] = value
    else:
        raise ValueError(f"items of a {type(target).__name__}")


def _storage(reference: Any) -> _Storage:
    """``("storage", type, key, device, number of elements)``"""
    what, kind, key = reference[:3]
    if what != "storage" or not isinstance(kind, _Name) or not isinstance(key, str):
        raise ValueError("a reference to something that is no storage")
    module, _, name = kind.name.rpartition(".")
    if module not in ("torch", "torch.storage") or not name.endswith("Storage"):
        raise _RefusedError(kind.name)
    return _Storage(key, _DTYPES.get(name, f"torch.{_OTHER_DTYPES.get(name, name)}"))


def _built(called: Any, arguments: Any) -> Any:
    """What one of the functions by which torch pickles tensors would return."""
    if not isinstance(called, _Name) or not isinstance(arguments, tuple):
        raise ValueError(f"a call of a {type(called).__name__}")
    if called.name == "collections.OrderedDict" and not arguments:
        return {}
    if called.name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        if not isinstance(arguments[0], _Tensor):
            raise ValueError("a parameter that is no tensor")
        return arguments[0]
    if called.name == "torch._utils._rebuild_tensor_v2":
        return _tensor(*arguments[:4], extra=arguments[6:])
    if called.name == "torch._utils._rebuild_tensor_v3":
        dtype = arguments[6]
        return _tensor(*arguments[:4], dtype=dtype.name if isinstance(dtype, _Name) else "", extra=arguments[7:])
    if called.name == "torch._tensor._rebuild_from_type_v2":  # a tensor of a class, or with attributes
        function, _, inner, _ = arguments
        if isinstance(function, _Name) and function.name.startswith("torch._utils._rebuild_"):
            return _built(function, inner)
    raise _RefusedError(called.name)


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *, extra: tuple[Any, ...], dtype: str = "") -> _Tensor:
    numbers = (start, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor without a storage, or with other strides than sizes")
    if any(type(number) is not int or not 0 <= number < _TOO_LARGE for number in numbers):
        raise ValueError(f"a tensor of shape {reprlib.repr(shape)}")
    if any(extra):
        raise _RefusedError("a conjugated or negated view")
    return _Tensor(storage, start, tuple(shape), tuple(strides), dtype or storage.dtype)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _ref(path: Path, uri: str, name: Any, value: Any, records: Mapping[str, tuple[int, int]]) -> TensorRef:
    if not isinstance(name, str) or not isinstance(value, _Tensor):
        raise FormatError(
            f"{path}: the entry {reprlib.repr(name)} is a {type(value).__name__}; expected a flat dictionary of "
            "tensors by name"
        )
    if wrong := fault(name):
        raise FormatError(f"{path}: {wrong}")
    if value.dtype not in _DTYPES.values():
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


def _is_dense(tensor: _Tensor) -> bool:
    """Whether its elements lie one after the other; the stride of a single one means nothing."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected and 0 not in tensor.shape:
            return False
        expected *= size
    return True
