"""Integers of compressed-tensors: ``pack-quantized``, 1 to 8 bits in words of 32 (Kimi-K2), and ``int-quantized``, I8.

A value is float32((q − z) · scale), with a scale, and maybe a zero point z, for some columns of a row, for a row, or
for all of a matrix (rows, columns). q is from −2^(bits−1) to 2^(bits−1) − 1.

- ``weight_packed`` I32 (rows, ⌈columns · bits / 32⌉): q + 2^(bits−1), as a stream of each row from the lowest bit on;
- ``weight`` I8 (rows, columns): q;
- ``weight_scale`` F32, BF16 or F16: (rows, groups of columns), (rows, 1), or (1,);
- ``weight_zero_point``: with packed codes I32 (⌈rows · bits / 32⌉, groups), packed along the rows, of the same offset;
  else I8 of the scale's shape;
- ``weight_g_idx`` I32 (columns,): the group of each column, where columns are not in the order of their groups;
- ``weight_shape``: (rows, columns).

Source: compressed-tensors' ``PackedQuantizationCompressor``, ``IntQuantizationCompressor`` and ``dequantize``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shardmerge.codecs.codec import Output, ReadPart, StoredTensors, TileSlot
from shardmerge.codecs.compressed_tensors import METHOD, Scheme, refusal, schemes
from shardmerge.codecs.grid_codec import GridCodec
from shardmerge.codecs.quantization import ACTIVATION_SCALES, beside, described, owner_of, quantization, shard_of
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import FLOAT_DTYPES, Encoding, RowRange, TensorRef, Weight, tensor_nbytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKED = "_packed"
#: What may be beside the codes: the scale, the zero points, the groups of columns.
_BESIDE = ("weight_scale", "weight_zero_point", "weight_g_idx")


def _range(bits: int) -> tuple[int, int]:
    """The least and the largest integer."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def _off(bits: int) -> float:
    """What float32 may have rounded off a position between the codes."""
    return float(2.0 ** (bits - 22))


class Integers(GridCodec):
    """Settings: ``bits``, ``scales`` (what has one: group, channel, tensor), ``zeros`` and ``order`` where there are
    zero points and groups of columns in another order, and maybe ``seed``.
    """

    def claims(self, tensors: StoredTensors, config: Mapping[str, Any]) -> Iterator[Weight | str]:
        settings = quantization(config)
        found = [ref for name, ref in tensors.items() if self._has_codes(name, ref)]
        if settings.get("quant_method") != METHOD or not found:
            return
        if problem := refusal(settings):
            yield f"{found[0].name} is stored by {METHOD}, and {problem}"
            return
        known = schemes(settings, "int")
        shapes = self._shapes(tensors, found, known)
        for ref in found:
            try:
                yield self._claim(tensors, ref, known, shapes.get(ref.name))
            except ValueError as error:
                yield f"{ref.name} is stored by {METHOD} as {ref.dtype} {list(ref.shape)}, but {error}"

    def _has_codes(self, name: str, ref: TensorRef) -> bool:
        """Whether a tensor holds codes, by its name and dtype."""
        raise NotImplementedError

    def _shapes(
        self, tensors: StoredTensors, found: list[TensorRef], known: list[Scheme]
    ) -> Mapping[str, tuple[int, int]]:
        """What ``weight_shape`` holds, by the codes' names, of those whose number of columns no header says."""
        return {}

    def _claim(
        self, tensors: Mapping[str, TensorRef], codes: TensorRef, known: list[Scheme], shape: tuple[int, int] | None
    ) -> Weight:
        """The weight with these codes; `ValueError` says what does not fit."""
        if len(codes.shape) != 2 or not all(codes.shape):
            raise ValueError("expected is a matrix")
        name = codes.name.removesuffix(PACKED)
        scale, zeros, order = (tensors.get(f"{owner_of(name)}.{part}") for part in _BESIDE)
        if scale is None or scale.dtype not in FLOAT_DTYPES:
            raise ValueError(f"its scale is {described(scale)}; expected is F32, BF16 or F16")
        fitting = [
            (scheme, columns)
            for scheme in known
            if (columns := self._columns(scheme, codes, scale, zeros, shape)) and _fits(scheme, codes, columns, scale)
        ]
        if len(fitting) != 1:
            of = "; ".join(map(str, known)) or "no integers"
            what = "several of these fit" if fitting else "none of these fits"
            raise ValueError(
                f"its scale is {described(scale)}, its zero points are {described(zeros)}, its weight_shape is "
                f"{list(shape) if shape else 'not needed or missing'}, and config.json says {of}: {what}"
            )
        ((scheme, columns),) = fitting
        parts = [
            ("values", dataclasses.replace(codes, name=name, shape=(codes.shape[0], columns))),
            ("scale", _as_matrix(scale)),
        ]
        if zeros is not None:
            parts.append(("zeros", _as_matrix(zeros)))
        if order is not None:
            if (order.dtype, order.shape) != ("I32", (columns,)) or scheme.strategy != "group":
                raise ValueError(f"{order.name} is {described(order)}; expected is I32 [{columns}], of groups")
            parts.append(("order", order))
        others = beside(tensors, name, ("weight_shape", *ACTIVATION_SCALES))
        has = [(role, True) for role in ("zeros", "order") if role in dict(parts)]
        parts += [(part.name.rpartition(".")[2], part) for part in others]
        encoding = Encoding(self.name, (("bits", scheme.bits), ("scales", scheme.strategy), *has))
        return Weight(name, tuple(parts), shard_of(codes), encoding)

    def _columns(
        self, scheme: Scheme, codes: TensorRef, scale: TensorRef, zeros: TensorRef | None, shape: tuple[int, int] | None
    ) -> int:
        """The number of columns that codes of a scheme have; 0 where they cannot be of it."""
        raise NotImplementedError

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The codes; all else stays as it is."""
        raise NotImplementedError

    # --- computing ----------------------------------------------------------------------------------------------------

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        import torch

        from shardmerge.codecs import grids

        assert slot.tensor.decoding is not None
        bits = slot.tensor.decoding.setting("bits")
        grid = self._grid_of(slot, slot.tensor.decoding, tile.shape[1])
        for here in grids.slabs(tile):
            values = grids.float32_like(tile[here])
            self._numbers(stored[here], bits, values)
            if grid.zeros is not None:
                grids.by_groups(torch.Tensor.sub_, values, grid.of(grid.zeros, here, values.dtype))
            grids.by_groups(torch.Tensor.mul_, values, grid.of(grid.scales, here, values.dtype))
            if values.dtype != tile.dtype:
                tile[here] = values

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """The nearest code on the base's own grid, ties to even, or one of the two neighbours."""
        import torch

        from shardmerge.codecs import grids, rounding

        if not slot.is_checked and not rounding.is_finite(tile):
            return False
        assert slot.tensor.encoding is not None
        bits = slot.tensor.encoding.setting("bits")
        low, high = _range(bits)
        grid = self._grid_of(slot, slot.tensor.encoding, tile.shape[1])
        has_one = slot.tensor.encoding.setting("scales") == "tensor"
        grids.check_divisors(slot, "scale", grid.scales, 0 if has_one else slot.rows.start)
        for here, share in grids.shares(tile, slot):
            position = grids.by_groups(torch.Tensor.div_, tile[here], grid.of(grid.scales, here, tile.dtype))
            if grid.zeros is not None:
                grids.by_groups(torch.Tensor.add_, position, grid.of(grid.zeros, here, tile.dtype))
            position.clamp_(low, high)
            self._store(grids.whole(position, share, _off(bits)), bits, target[here])
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """Half a step, or a whole one where rounding is stochastic, and all of what is beyond the last code."""
        import torch

        from shardmerge.codecs import grids

        grid = self._read(encoding, rows, values.shape[1], part)
        step, bits = 0.5 if encoding.setting("seed") is None else 1.0, encoding.setting("bits")
        low, high = _range(bits)
        everything = slice(0, len(rows))
        scales = grid.of(grid.scales, everything, values.dtype)
        position = grids.by_groups(torch.Tensor.div_, values.clone(), scales)
        if grid.zeros is not None:
            grids.by_groups(torch.Tensor.add_, position, grid.of(grid.zeros, everything, values.dtype))
        beyond = position.sub_(position.clamp(low, high)).abs_()
        bound = grids.by_groups(torch.Tensor.mul_, beyond.add_(step + _off(bits)), scales.abs())
        return bound.add_(values.abs(), alpha=grids.ROUNDINGS)

    def _numbers(self, stored: Tensor, bits: int, out: Tensor) -> None:
        """Codes as stored → their integers, as float32."""
        raise NotImplementedError

    def _store(self, numbers: Tensor, bits: int, target: Tensor) -> None:
        """Integers, as floats, → codes as stored."""
        raise NotImplementedError

    def _grid_of(self, slot: TileSlot, encoding: Encoding, columns: int) -> _Grid:
        from shardmerge.codecs import grids

        try:
            return self._read(encoding, slot.rows, columns, slot.part)
        except ValueError as error:
            ref = grids.part_of(slot, "order")
            raise FormatError(f"{ref.uri}: {ref.name} {error}; the merge was stopped") from None

    def _read(self, encoding: Encoding, rows: RowRange, columns: int, part: ReadPart) -> _Grid:
        """What belongs to some rows. `ValueError` where the groups of columns are none."""
        of_rows = RowRange(0, 1) if encoding.setting("scales") == "tensor" else rows
        scales = part("scale", of_rows)
        zeros = self._zeros(encoding, of_rows, part) if encoding.setting("zeros") else None
        order = part("order", RowRange(0, columns)) if encoding.setting("order") else None
        return _Grid(scales, zeros, None if order is None else _checked(order, scales.shape[1]))

    def _zeros(self, encoding: Encoding, rows: RowRange, part: ReadPart) -> Tensor:
        """Zero points: (rows, groups)."""
        raise NotImplementedError


class PlainIntegers(Integers):
    """Codes of I8, whatever their bits."""

    name = "plain-int"
    title = "integers of up to 8 bits as I8, with groups, zero points"
    methods = (METHOD,)

    def _has_codes(self, name: str, ref: TensorRef) -> bool:
        return ref.dtype == "I8" and name.endswith(".weight")

    def _columns(
        self, scheme: Scheme, codes: TensorRef, scale: TensorRef, zeros: TensorRef | None, shape: tuple[int, int] | None
    ) -> int:
        if scheme.is_symmetric != (zeros is None) or (zeros and (zeros.dtype, zeros.shape) != ("I8", scale.shape)):
            return 0
        return codes.shape[1]

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        return (Output("values", name, "I8", shape, tensor_nbytes("I8", shape)),)

    def _numbers(self, stored: Tensor, bits: int, out: Tensor) -> None:
        out.copy_(stored)

    def _store(self, numbers: Tensor, bits: int, target: Tensor) -> None:
        target.copy_(numbers)

    def _zeros(self, encoding: Encoding, rows: RowRange, part: ReadPart) -> Tensor:
        return part("zeros", rows)


# --- what a checkpoint says -------------------------------------------------------------------------------------------


def _fits(scheme: Scheme, codes: TensorRef, columns: int, scale: TensorRef) -> bool:
    """Whether a matrix of so many columns has a scale of this shape."""
    rows = codes.shape[0]
    if scheme.strategy == "group":
        return columns % scheme.group_size == 0 and scale.shape == (rows, columns // scheme.group_size)
    return is_of_rows(scheme, rows, scale)


def is_of_rows(scheme: Scheme, rows: int, scale: TensorRef) -> bool:
    """Whether a scale without groups is one of each row, or one of all, as the scheme says."""
    return scale.shape in ((rows, 1), (rows,)) if scheme.strategy == "channel" else math.prod(scale.shape) == 1


def _as_matrix(ref: TensorRef) -> TensorRef:
    """A vector as a column."""
    return ref if len(ref.shape) == 2 else dataclasses.replace(ref, shape=(math.prod(ref.shape), 1))


# --- arithmetic -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Grid:
    """Scales and zero points of some rows, or one for all: (rows, groups); ``order`` are the groups of the columns."""

    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def of(self, numbers: Tensor, here: slice, dtype: torch.dtype) -> Tensor:
        """Scales or zero points of some of the rows: for each group of columns, or for each column."""
        found = (numbers if len(numbers) == 1 else numbers[here]).to(dtype)
        return found if self.order is None else found[:, self.order]


def _checked(order: Tensor, groups: int) -> Tensor | None:
    """The group of each column; None where they are in order, which compressed-tensors says by -1 everywhere."""
    import torch

    if bool((order == -1).all()):
        return None
    order = order.long()
    outside = (order < 0) | (order >= groups)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(f"holds {int(order[at])} at [{at}], and there are {groups} groups")
    if bool((torch.bincount(order, minlength=groups) * groups != len(order)).any()):
        raise ValueError(f"does not put as many columns into each of {groups} groups")
    return order


PLAIN_INTEGERS = PlainIntegers()
