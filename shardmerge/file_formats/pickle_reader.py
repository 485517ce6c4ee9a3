"""Follows a pickle of tensors without unpickling it.

A pickle is a program for a stack machine; pickletools splits it into instructions. This machine executes only those of
protocols 2 to 5 that describe tensors: it calls nothing, looks up no name, and bounds its memory. It refuses any other
instruction. Source: torch/_utils.py and torch/storage.py, 2.13.
"""

from __future__ import annotations

import pickletools
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: Bytes of all objects that a pickle makes. A hundred thousand tensors take less.
MAX_OBJECT_BYTES = 150_000_000
#: Bytes beside an object's own: of a reference (on the stack, in the memo, in a list), and of a dictionary's entry.
_PLACE, _ENTRY = 8, 100
_INT_BYTES = 32
#: Limits of torch: arguments of its functions, dimensions of its tensors.
_MOST_ARGUMENTS, _MOST_DIMENSIONS = 16, 64
_TOO_LARGE = 1 << 63
DTYPES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}
#: Other types of storages, for messages.
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


class RefusedError(Exception):
    """A pickle needs something that is not supported."""


class TooLargeError(Exception):
    """A pickle makes larger objects than a state dict has."""


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a module's attribute, which is not looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    key: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """Strides and ``start`` are in elements."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


def follow(text: bytes) -> Any:
    """The object that the pickle describes.

    Raises `RefusedError` or `TooLargeError`, and for a damaged pickle ``ValueError``, ``TypeError``, ``LookupError`` or
    ``struct.error``.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(text):
        if opcode.name == "STOP":
            return machine.stack.pop()
        instruction = _INSTRUCTIONS.get(opcode.name)
        if instruction is None:
            raise RefusedError(f"the instruction {opcode.name}")
        instruction(machine, argument)
    raise ValueError("it has no end")


class _Machine:
    """The stack with its marks, and the memo: a list, since every pickler counts from 0."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.left = MAX_OBJECT_BYTES

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise TooLargeError

    def push(self, value: Any) -> None:
        self.spend(sys.getsizeof(value) + _PLACE)
        self.stack.append(value)

    def mark(self) -> None:
        self.spend(_INT_BYTES + _PLACE)
        self.marks.append(len(self.stack))

    def get(self, place: int) -> None:
        self.spend(_PLACE)
        self.stack.append(self.memo[place])

    def put(self, place: int) -> None:
        if place == len(self.memo):
            self.memoize()
        else:
            self.memo[place] = self.stack[-1]

    def memoize(self) -> None:
        self.spend(_PLACE)
        self.memo.append(self.stack[-1])

    def top(self, count: int) -> list[Any]:
        """Take objects off the stack."""
        if count > len(self.stack):
            raise ValueError("it takes more objects than there are")
        start = len(self.stack) - count
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def since_mark(self) -> list[Any]:
        return self.top(len(self.stack) - self.marks.pop())

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError(f"items of a {type(target).__name__}")
        self.spend(2 * _PLACE * len(items))
        target += items

    def set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError(f"entries of a {type(target).__name__}")
        self.spend(_ENTRY * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and (type(key) is not int or abs(key) >= _TOO_LARGE):
                raise ValueError(f"a {type(key).__name__} is a key of a dictionary")
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(f"a name is a {type(name).__name__} of a {type(module).__name__}")
        found = Name(f"{module}.{name}")
        self.spend(sys.getsizeof(found.name))
        self.push(found)


#: Instructions by their names in pickletools. BUILD sets attributes of a dictionary, which have no meaning here.
_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    **dict.fromkeys(("BININT1", "BININT2", "BININT", "LONG1", "BINFLOAT"), lambda m, number: m.push(number)),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), lambda m, text: m.push(text)),
    "MARK": lambda m, _: m.mark(),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, place: m.get(place)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, place: m.put(place)),
    "MEMOIZE": lambda m, _: m.memoize(),
    "TUPLE1": lambda m, _: m.push(tuple(m.top(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.top(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.top(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "APPEND": lambda m, _: m.append(m.top(1)),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.set(m.top(2)),
    "SETITEMS": lambda m, _: m.set(m.since_mark()),
    "GLOBAL": lambda m, name: m.name(*name.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(*m.top(2)),
    "BINPERSID": lambda m, _: m.push(_storage(*m.top(1))),
    "REDUCE": lambda m, _: m.push(_built(*m.top(2))),
    "BUILD": lambda m, _: m.top(1),
}


# --- storages and tensors ---------------------------------------------------------------------------------------------


def _storage(reference: Any) -> Storage:
    """``("storage", type, key, device, number of elements)``"""
    what, kind, key = reference[:3]
    if what != "storage" or not isinstance(kind, Name) or not isinstance(key, str):
        raise ValueError("a reference to something other than a storage")
    module, _, name = kind.name.rpartition(".")
    if module not in ("torch", "torch.storage") or not name.endswith("Storage"):
        raise RefusedError(kind.name)
    # One string for all storages of a type.
    return Storage(key, DTYPES.get(name) or sys.intern(f"torch.{_OTHER_DTYPES.get(name, name)}"))


def _built(called: Any, arguments: Any) -> Any:
    """The result of one of torch's functions for pickled tensors."""
    if not isinstance(called, Name) or not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
        raise ValueError(f"a call of a {type(called).__name__}")
    if called.name == "collections.OrderedDict" and not arguments:
        return {}
    if called.name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        if not isinstance(arguments[0], Tensor):
            raise ValueError("a parameter that is not a tensor")
        return arguments[0]
    if called.name == "torch._utils._rebuild_tensor_v2":
        return _tensor(*arguments[:4], extra=arguments[6:])
    if called.name == "torch._utils._rebuild_tensor_v3":
        dtype = arguments[6]
        return _tensor(*arguments[:4], dtype=dtype.name if isinstance(dtype, Name) else "", extra=arguments[7:])
    if called.name == "torch._tensor._rebuild_from_type_v2":  # a tensor of a class, or with attributes
        function, _, inner, _ = arguments
        if isinstance(function, Name) and function.name.startswith("torch._utils._rebuild_"):
            return _built(function, inner)
    raise RefusedError(called.name)


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *, extra: tuple[Any, ...], dtype: str = "") -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor without a storage, sizes or strides")
    if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape):,} sizes and {len(strides):,} strides")
    numbers = (start, *shape, *strides)
    if any(type(number) is not int or not 0 <= number < _TOO_LARGE for number in numbers):
        raise ValueError(f"a tensor of shape {reprlib.repr(shape)}")
    if any(extra):
        raise RefusedError("a conjugated or negated view")
    return Tensor(storage, start, shape, strides, dtype or storage.dtype)
