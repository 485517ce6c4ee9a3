"""``pack-quantized`` of compressed-tensors: integers of 1 to 8 bits in words; see `shardmerge.codecs.integers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shardmerge.codecs.codec import Output, ReadPart, StoredTensors
from shardmerge.codecs.compressed_tensors import METHOD, Scheme
from shardmerge.codecs.integers import PACKED, Integers, is_of_rows
from shardmerge.spec.tensors import Encoding, RowRange, TensorRef, tensor_nbytes

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 32
#: Bytes of the integers that a ``weight_shape`` is stored as.
_INTEGERS = {"I64": 8, "I32": 4}


class PackedIntegers(Integers):
    """Codes in words of 32 bits."""

    name = "packed-int"
    title = "integers of 1 to 8 bits in words (Kimi's INT4), with groups, zero points, act-order"
    methods = (METHOD,)

    def _has_codes(self, name: str, ref: TensorRef) -> bool:
        return ref.dtype == "I32" and name.endswith(f".weight{PACKED}")

    def _shapes(
        self, tensors: StoredTensors, found: list[TensorRef], known: list[Scheme]
    ) -> Mapping[str, tuple[int, int]]:
        """Where one scheme only has groups and fits, its scales say how many columns there are.

        Large models have tens of thousands of weights, and from the Hub each of these tensors is a request.
        """
        asked = {}
        for ref in (ref for ref in found if len(ref.shape) == 2):
            module = ref.name.removesuffix(f".weight{PACKED}")
            scale, shape = tensors.get(f"{module}.weight_scale"), tensors.get(f"{module}.weight_shape")
            fitting = [scheme for scheme in known if scale is not None and _may_fit(scheme, ref, scale)]
            is_clear = len(fitting) == 1 and fitting[0].strategy == "group"
            if shape is not None and not is_clear and shape.dtype in _INTEGERS and shape.shape == (2,):
                asked[ref.name] = shape
        contents = tensors.contents(list(asked.values()))
        return {
            name: _pair(contents[shape.name], _INTEGERS[shape.dtype])
            for name, shape in asked.items()
            if shape.name in contents
        }

    def _columns(
        self, scheme: Scheme, codes: TensorRef, scale: TensorRef, zeros: TensorRef | None, shape: tuple[int, int] | None
    ) -> int:
        if not _may_fit(scheme, codes, scale) or scheme.is_symmetric != (zeros is None):
            return 0
        if zeros is not None:
            of_rows = len(scale.shape) == 2 and scheme.strategy != "tensor"
            expected = (_words(codes.shape[0], scheme.bits), *scale.shape[1:])
            if not of_rows or (zeros.dtype, zeros.shape) != ("I32", expected):
                return 0
        if shape is None:
            return scale.shape[1] * scheme.group_size if scheme.strategy == "group" else 0
        fits = shape[0] == codes.shape[0] and shape[1] > 0 and _words(shape[1], scheme.bits) == codes.shape[1]
        return shape[1] if fits else 0

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        stored = (*shape[:-1], _words(shape[-1], encoding.setting("bits")))
        return (Output("values", name + PACKED, "I32", stored, tensor_nbytes("I32", stored)),)

    def _numbers(self, stored: Tensor, bits: int, out: Tensor) -> None:
        from shardmerge.codecs import packing

        packing.read(stored, bits, -(1 << bits - 1), out)

    def _store(self, numbers: Tensor, bits: int, target: Tensor) -> None:
        from shardmerge.codecs import packing

        packing.write(numbers, bits, -(1 << bits - 1), target)

    def _zeros(self, encoding: Encoding, rows: RowRange, part: ReadPart) -> Tensor:
        from shardmerge.codecs import packing

        bits = encoding.setting("bits")
        first = rows.start * bits // _WORD
        packed = part("zeros", RowRange(first, _words(rows.stop, bits))).T
        return packing.unpack(packed, bits, len(rows), rows.start * bits - first * _WORD).sub_(1 << bits - 1).T


def _words(count: int, bits: int) -> int:
    """The words that so many codes take."""
    return -(-count * bits // _WORD)


def _may_fit(scheme: Scheme, codes: TensorRef, scale: TensorRef) -> bool:
    """Whether packed codes and their scale may be of a scheme, as far as the headers say."""
    rows, size = codes.shape
    if scheme.strategy == "group":
        is_grid = len(scale.shape) == 2 and scale.shape[0] == rows
        return is_grid and _words(scale.shape[1] * scheme.group_size, scheme.bits) == size
    return is_of_rows(scheme, rows, scale)


def _pair(content: bytes, size: int) -> tuple[int, int]:
    first, second = (int.from_bytes(content[at : at + size], "little", signed=True) for at in (0, size))
    return first, second


PACKED_INTEGERS = PackedIntegers()
