"""The tiles of one weight: decode → each update → encode and check. This imports torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from shardmerge.adapters.registry import FAMILIES
from shardmerge.adapters.work import dtype_for, narrow_dtype, tile_dtype
from shardmerge.codecs.registry import decoder, encoder
from shardmerge.codecs.rounding import NUMBER_DTYPES, TORCH_DTYPES
from shardmerge.execution import nonfinite
from shardmerge.execution.devices import Device, Lane
from shardmerge.execution.factors import LazyFactors, UpdateFactors
from shardmerge.execution.fidelity import Sampler, sampled_rows
from shardmerge.execution.jobs import Tile
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, Orientation, RowRange, TensorInfo, TensorRef
from shardmerge.spec.updates import Update, Window
from shardmerge.spec.windows import Position

#: `Family.apply` or `Family.prepass`.
Apply = Callable[[Tensor, UpdateFactors, Update, Window, Tensor], None]
#: Reads bytes of a stored tensor: their offset within it, and how many.
ReadBytes = Callable[[TensorRef, int, int], Tensor]


class WeightTiles:
    """Decodes, updates and encodes the tiles of one weight, each in a lane. Threads share it."""

    def __init__(
        self,
        tensor: TensorPlan,
        compute_dtype: str,
        device: Device,
        factors: LazyFactors,
        sampler: Sampler,
        read: ReadBytes,
    ) -> None:
        self.tensor = tensor
        self.columns = tensor.row_elements
        self._device, self._loader, self._sampler, self._read = device, factors, sampler, read
        self._dtype = tile_dtype(tensor, compute_dtype)
        #: The dtype of what updates that compute get, where it is not the tile's.
        self._narrow = narrow_dtype(tensor, compute_dtype)
        self._decoder, self._encoder = decoder(tensor), encoder(tensor)
        #: Bytes that the workspace has for an element of the tile.
        self._room = max(DTYPE_BITS[self._dtype] // 8, self._encoder.memory(tensor, self._dtype).element)
        #: The small parts of the output that are being made, by role.
        self._made = {part.role: _zeros(part.info) for part in tensor.made}
        dtypes = [TORCH_DTYPES[dtype_for(update, tensor, compute_dtype)] for update in tensor.updates]
        self._factors = factors.begin(tensor.updates, dtypes, [ref for _, ref in tensor.parts])
        #: Whether the output has the base's own codes and scales, of which only codes change.
        self._is_on_grid = self._decoder is self._encoder and not self._decoder.is_plain and not tensor.made
        self._sampled = sampled_rows(tensor) if self._encoder.is_plain or self._is_on_grid else frozenset()

    def merge(self, lane: Lane, tile: Tile, stored: Tensor, target: Tensor) -> None:
        """Decode ``stored``, update it, and encode it into ``target``, which may be the same memory."""
        slot = _Slot(self, lane, tile.rows)
        here, values, sample = self._decode(slot, stored), self._space(slot)[0], None
        if tile.rows.start in self._sampled:
            sample = self._sampler.before(here)
        for update, position in tile.positions:
            self._give(slot, update, position, FAMILIES[update.family].apply)
            lane.applied[id(self.tensor), id(update)] += len(tile.rows) * len(position.columns)
            if sample is not None and not FAMILIES[update.family].is_of_adapter:
                sample = self._sampler.before(values)  # what the adapters are added to
        if sample is None:
            self._encode(slot, tile, target)
        elif self._is_on_grid:  # encoding uses the tile up
            exact = values[:: sample.step].clone()
            self._decoder.decode(slot, self._device.fetch(self._encode(slot, tile, target)), values)
            self._sampler.after(self.tensor, tile.rows, sample, exact, values[:: sample.step])
        else:
            encoded = self._encode(slot, tile, target)
            self._sampler.after(self.tensor, tile.rows, sample, values[:: sample.step], encoded[:: sample.step])

    def prepass(self, lane: Lane, tile: Tile, stored: Tensor, shown_to: Update | None) -> None:
        """Show the tile to an update, as the updates before it leave it, or to the codec, as all of them leave it."""
        slot = _Slot(self, lane, tile.rows)
        self._decode(slot, stored)
        for update, position in tile.positions:
            family = FAMILIES[update.family]
            self._give(slot, update, position, family.prepass if update is shown_to else family.apply)
        if shown_to is None:
            self._encoder.prepass(slot, self._space(slot)[0])

    def made(self) -> Tensor:
        """The bytes of all small parts of the output in their order, complete when all tiles are merged."""
        return torch.cat([part.view(torch.uint8).flatten() for part in self._made.values()])

    def _space(self, slot: _Slot) -> tuple[Tensor, Tensor]:
        """A lane's tile of so many rows, and its scratch."""
        return slot.workspace.tensors((len(slot.rows), self.columns), self._dtype, self._room)

    def _decode(self, slot: _Slot, stored: Tensor) -> Tensor:
        """Fill a lane's tile. Returns the numbers in it, in the smaller of the two dtypes."""
        fetched = self._device.fetch(stored)  # before it is decoded, as it is smaller
        tile, _ = self._space(slot)
        self._decoder.decode(slot, fetched, tile)
        return fetched if self._decoder.is_plain else tile

    def _encode(self, slot: _Slot, of: Tile, target: Tensor) -> Tensor:
        """Encode a lane's updated tile into ``target``, and return it, on the device if the codec encodes there.

        Raises `NonFiniteError` for a value that the output cannot hold.
        """
        tile, codec = self._space(slot)[0], self._encoder
        encoded = self._device.staging(target) if codec.on_device else target
        if not codec.on_device and slot.lane.on_cpu is not slot.lane.workspace:
            slot.workspace = slot.lane.on_cpu
            tile = self._space(slot)[0].copy_(tile)
        if not codec.encode(slot, tile, encoded):
            nonfinite.check(tile, slot.tensor, of, partial(self._stored, slot))
            slot.is_checked = True
            codec.encode(slot, tile, encoded)
        if codec.on_device:
            self._device.deliver(encoded, target)
        return encoded

    def _give(self, slot: _Slot, update: Update, position: Position, apply: Apply) -> None:
        """Apply an update to its part of the tile, turned as the method speaks of it."""
        tile, scratch = self._space(slot)
        view, space, factors = tile, scratch, self._factors[id(update)]
        columns = position.columns
        if len(columns) != self.columns or position.orientation is Orientation.TRANSPOSED:
            view = position.orientation.view(tile[:, columns.start : columns.stop])
            space = scratch.view(-1)[: view.numel()].view(view.shape)
        if self._narrow is None or not FAMILIES[update.family].computes:
            apply(view, factors, update, position.window, space)
            return
        # What is only copied keeps its own dtype; what computes gets a copy in the compute dtype.
        stored = tile[:, columns.start : columns.stop]
        copy, space = slot.lane.workspace.narrow(
            (stored.shape[0], stored.shape[1]), self._narrow, tile.numel() * self._room
        )
        copy.copy_(stored)
        apply(position.orientation.view(copy), factors, update, position.window, space.view(view.shape))
        stored.copy_(copy)

    def _stored(self, slot: _Slot, ref: TensorRef, start: int, count: int) -> Tensor:
        """Elements of a tensor of the base or an adapter, read again and decoded."""
        if self.tensor.decoding is not None and ref is self.tensor.source:
            return self._decoded_again(slot, start, count)
        size = DTYPE_BITS[ref.dtype] // 8
        return self._read(ref, start * size, count * size).view(TORCH_DTYPES[ref.dtype])

    def _decoded_again(self, slot: _Slot, start: int, count: int) -> Tensor:
        tensor, columns = self.tensor, self.columns
        assert tensor.decoding is not None
        unit = self._decoder.row_unit(tensor.decoding)
        first, stop = start // columns // unit * unit, -(-(start + count) // columns)
        rows = RowRange(first, min(tensor.all_rows, -(-stop // unit) * unit))
        data = self._read(tensor.source, rows.start * tensor.read_row, len(rows) * tensor.read_row)
        tile = torch.empty(len(rows), columns, dtype=TORCH_DTYPES[self._dtype])
        self._decoder.decode(_Slot(self, slot.lane, rows), matrix(data, tensor.source.dtype, len(rows), columns), tile)
        return tile.view(-1)[start - rows.start * columns :][:count]


class _Slot:
    """A tile's surroundings; see `shardmerge.codecs.codec.TileSlot`."""

    __slots__ = ("_of", "is_checked", "lane", "rows", "tensor", "workspace")

    def __init__(self, of: WeightTiles, lane: Lane, rows: RowRange) -> None:
        self._of = of
        self.lane = lane
        self.tensor = of.tensor
        self.rows = rows
        self.workspace = lane.workspace
        self.is_checked = False

    def halves(self) -> tuple[Tensor, Tensor]:
        return self.workspace.halves(len(self.rows) * self._of.columns, self._of._room)

    def part(self, role: str, rows: RowRange) -> Tensor:
        return self._of._loader.part(next(ref for name, ref in self.tensor.parts if name == role), rows)

    def made(self, role: str) -> Tensor:
        return self._of._made[role]


def _zeros(info: TensorInfo) -> Tensor:
    return torch.zeros(info.shape, dtype=NUMBER_DTYPES[info.dtype])


def matrix(raw: Tensor, dtype: str, rows: int, columns: int) -> Tensor:
    """Bytes as rows of numbers of a dtype, or as rows of bytes where torch has no such dtype.

    ``columns`` gives the shape where there are no bytes.
    """
    numbers = raw.view(NUMBER_DTYPES.get(dtype, torch.uint8))
    return numbers.view(rows, len(numbers) // rows if len(numbers) else columns)
