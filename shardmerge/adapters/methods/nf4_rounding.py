"""W as QLoRA computed with it in training: rounded to NF4 and back, before any update is added.

In training a Linear layer computed with R(W), where R is what bitsandbytes does: W is seen as blocks of 64 elements,
row by row; each block is divided by the largest of its magnitudes, absmax, and each quotient becomes the nearest of
NF4's 16 values (of two as near the lower one); these times absmax are rounded to the dtype of W. With double
quantisation absmax is rounded first: less its mean over all of W, and divided by the largest magnitude in a block of
256 of them, it becomes the nearest of 256 values. All is float32, but for the mean, of which nothing says in which
order a GPU adds it up: it is exact here, and rounded once.
Sources: Dettmers et al. 2023, arXiv:2305.14314; bitsandbytes' ``quantize_4bit`` and ``create_dynamic_map``.

This is an update that our config asks for (``base_rounding``), and no adapter.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, Family
from shardmerge.codecs.bitsandbytes_4bit import TABLES
from shardmerge.spec.tensors import DTYPE_NAMES
from shardmerge.spec.updates import Settings, Update, Window

BLOCK = 64
#: absmax that share a scale.
GROUP = 256
#: Elements at a time, so that what is in between takes little memory.
_SLAB = 1 << 14
#: What is in between in all threads: quotients, indices, rounded numbers. Measured with 1 to 4 threads.
_BETWEEN_BYTES = 1 << 20
#: What bitsandbytes takes for the absmax of a block of zeros, which are divided by it.
_LEAST = 1e-38


@dataclass(frozen=True, slots=True)
class RoundingSettings(Settings):
    """Whether absmax is rounded too, and the dtype that the weight had in training."""

    double: bool
    dtype: str


class Nf4Rounding(Family):
    name = "nf4-rounding"
    is_of_adapter = False
    builds = True

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        return []

    def row_unit(self, update: Update | ModuleUpdate) -> int:
        """Rows that end where a block does."""
        assert isinstance(update, Update)
        return BLOCK // math.gcd(update.columns, BLOCK)

    def needs_prepass(self, update: Update) -> bool:
        return RoundingSettings.of(update).double

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        kept = 2 * 4 * _blocks(update) if self.needs_prepass(update) else 0
        return kept + _BETWEEN_BYTES

    def prepass(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        kept = factors.kept("absmax", lambda: torch.zeros(_blocks(update), dtype=torch.float32, device=tile.device))
        first = window.rows.start * update.columns // BLOCK
        for _, blocks in _slabs(tile):
            absmax = blocks.abs().amax(1)
            kept[first : first + len(absmax)] = absmax
            first += len(absmax)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        from shardmerge.codecs import nearest

        settings, table = RoundingSettings.of(update), torch.tensor(TABLES["nf4"], device=tile.device)
        bounds = nearest.middles(TABLES["nf4"], torch.float32)
        dtype = getattr(torch, DTYPE_NAMES[settings.dtype])
        rounded = factors.kept("rounded", self._rounded_absmax(factors)) if settings.double else None
        first = window.rows.start * update.columns // BLOCK
        for part, blocks in _slabs(tile):
            absmax = blocks.abs().amax(1)
            quotients = (blocks * (1 / absmax.clamp(min=_LEAST))[:, None]).clamp_(-1, 1)
            codes = nearest.count_below(bounds, quotients.nan_to_num_(nan=0.0))
            scale = absmax if rounded is None else rounded[first : first + len(absmax)]
            values = torch.index_select(table, 0, codes.view(-1).to(torch.int32)).view(blocks.shape)
            part.copy_(values.mul_(scale[:, None]).to(dtype).view(-1)[: len(part)])
            first += len(absmax)

    def _rounded_absmax(self, factors: Factors) -> Callable[[], Tensor]:
        def rounded() -> Tensor:
            absmax = factors.kept("absmax", lambda: torch.zeros(0)).clone()
            sums = [float(part.sum(dtype=torch.float64)) for part in torch.split(absmax, _SLAB)]
            offset = float32(math.fsum(sums) / len(absmax))
            table = torch.tensor(dynamic_table(), device=absmax.device)
            bounds = (table[1:] + table[:-1]) / 2
            for part in torch.split(absmax, _SLAB):
                groups = torch.nn.functional.pad(part - offset, (0, -len(part) % GROUP)).view(-1, GROUP)
                largest = groups.abs().amax(1, keepdim=True)
                quotients = (groups * (1 / largest.clamp(min=_LEAST))).clamp_(-1, 1)
                values = table[torch.bucketize(quotients, bounds, out_int32=True)]
                part.copy_(values.mul_(largest).add_(offset).view(-1)[: len(part)])
            return absmax

        return rounded


def _blocks(update: Update) -> int:
    return -(-update.rows * update.columns // BLOCK)


def _slabs(tile: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Elements of a tile, and the same as blocks in float32, of which the last is filled up with zeros."""
    for part in torch.split(tile.view(-1), _SLAB):
        yield part, torch.nn.functional.pad(part.float(), (0, -len(part) % BLOCK)).view(-1, BLOCK)


def float32(number: float) -> float:
    """The nearest float32."""
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded


@lru_cache(maxsize=1)
def dynamic_table() -> tuple[float, ...]:
    """bitsandbytes' dynamic type of 8 bits: its values, in order.

    Of numbers from 0.1 to 1, evenly spread, the middles; of each power of ten from 1 to 10⁻⁶ half as many as of the one
    above. ``torch.linspace`` fills float32 from both ends, with fused multiplications.
    """
    first, last = float32(0.1), 1.0
    values = [0.0, 1.0]
    for power in range(7):
        count = 1 << power
        step = float32((last - first) / count)
        places = range(count + 1)
        edges = [float32(first + step * at if at < (count + 1) // 2 else last - step * (count - at)) for at in places]
        middles = [float32(float32(low + high) / 2) for low, high in itertools.pairwise(edges)]
        sizes = [float32(float32(10.0 ** (power - 6)) * middle) for middle in middles]
        values += [sign * size for size in sizes for sign in (1, -1)]
    return tuple(sorted(values))
