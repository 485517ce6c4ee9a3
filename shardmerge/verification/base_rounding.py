"""W as QLoRA computed with it, from the definitions and with none of the merge's code: by search in the tables.

Each product and sum is that of two float32, exact in float64 and rounded once; the tables are bitsandbytes' own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardmerge.adapters.methods.nf4_rounding import RoundingSettings
from shardmerge.spec.tensors import DTYPE_NAMES
from shardmerge.spec.updates import Update

_BLOCK, _GROUP = 64, 256
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


def _float32(exact: Tensor) -> Tensor:
    return exact.float().double()


def _dynamic() -> Tensor:
    """The 256 values of absmax: for every power of ten the middles of evenly spread numbers, of both signs."""
    parts = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        middles = 10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        parts += [middles, -middles]
    return torch.cat(parts).sort().values.double()


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The nearest of a table's values, of two as near the lower."""
    middles = _float32((table[1:] + table[:-1]) / 2)
    return table[torch.searchsorted(middles, values)]


def _in_blocks(values: Tensor, size: int) -> Tensor:
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _largest(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(1, keepdim=True)


def _scaled(blocks: Tensor, by: Tensor) -> Tensor:
    """Each divided by the largest of its block, by way of its reciprocal; 0 where that is 0."""
    return _float32(blocks * _float32(1 / by.clamp(min=1e-38))).clamp(-1, 1)


class RoundedBase:
    """One weight. With double quantisation all rows are seen before the first is rounded."""

    def __init__(self, update: Update) -> None:
        self._settings = RoundingSettings.of(update)
        self._width = update.columns
        self._absmax = torch.zeros(math.ceil(update.rows * update.columns / _BLOCK), dtype=torch.float64)
        self._rounded: Tensor | None = None

    @property
    def must_see_all(self) -> bool:
        return self._settings.double

    def see(self, values: Tensor, first_row: int) -> None:
        """Whole blocks of W, in float64, from a row on."""
        found, first = _largest(_in_blocks(values, _BLOCK)).flatten(), first_row * self._width // _BLOCK
        self._absmax[first : first + len(found)] = found

    def rows(self, values: Tensor, first_row: int) -> Tensor:
        """The same rows, rounded."""
        blocks = _in_blocks(values, _BLOCK)
        largest = _largest(blocks)
        by = largest
        if self.must_see_all:
            first = first_row * self._width // _BLOCK
            by = self._rounded_absmax()[first : first + len(blocks), None]
        nearest = _nearest(_scaled(blocks, largest), torch.tensor(_NF4, dtype=torch.float32).double())
        found = _float32(nearest * by).to(getattr(torch, DTYPE_NAMES[self._settings.dtype])).double()
        return found.flatten()[: values.numel()].view(values.shape)

    def _rounded_absmax(self) -> Tensor:
        if self._rounded is None:
            offset = _float32(self._absmax.mean())
            groups = _in_blocks(_float32(self._absmax - offset), _GROUP)
            largest = _largest(groups)
            nearest = _nearest(_scaled(groups, largest), _dynamic())
            self._rounded = _float32(_float32(nearest * largest) + offset).flatten()[: len(self._absmax)]
        return self._rounded
