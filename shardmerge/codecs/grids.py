"""What formats share that store codes with a scale for some columns of a row. Importing this module imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shardmerge.codecs import stochastic
from shardmerge.codecs.codec import TileSlot
from shardmerge.errors import FormatError
from shardmerge.spec.tensors import TensorRef, even_rows

#: What the roundings of decoding and encoding in float32 may move a value, relative to it.
ROUNDINGS = 2.0**-22
#: Elements at a time, so that what is in between takes little memory: `grid_codec.ROUNDING_BYTES` a thread.
_SLAB = 1 << 15

#: Changes values by others, in place: adds, subtracts, multiplies, divides.
Change = Callable[[Tensor, Tensor], object]


def by_groups(change: Change, values: Tensor, grid: Tensor) -> Tensor:
    """Change ``values`` (rows, columns) in place by a ``grid`` (rows, or one for all; groups of columns)."""
    change(values.view(len(values), grid.shape[1], -1), grid[:, :, None])
    return values


def float32_like(tile: Tensor) -> Tensor:
    """The tile, or float32 of its shape."""
    return tile if tile.dtype == torch.float32 else torch.empty_like(tile, dtype=torch.float32)


def slabs(tile: Tensor) -> Iterator[slice]:
    """Some rows of a tile after the other."""
    pieces = max(1, min(len(tile), -(-tile.numel() // _SLAB)))
    yield from (slice(part.start, part.stop) for part in even_rows(len(tile), pieces))


def shares(tile: Tensor, slot: TileSlot) -> Iterator[tuple[slice, Tensor | None]]:
    """Some rows of a tile after the other, with a random share for each element where rounding is stochastic."""
    encoding = slot.tensor.encoding
    assert encoding is not None
    if (seed := encoding.setting("seed")) is None:
        yield from ((here, None) for here in slabs(tile))
    else:
        yield from stochastic.shares(tile, seed, slot.tensor.source.name, slot.rows)


def whole(position: Tensor, share: Tensor | None, exact: float | Tensor) -> Tensor:
    """Positions between whole numbers → the nearest one, ties to even; with a random share one of the two neighbours.

    What differs from a whole number by ``exact`` at most is that number: float32 has rounded it, and a weight without a
    change keeps its codes.
    """
    nearest = position.round()
    if share is None:
        return nearest
    below = position.floor()
    chosen = below + (position - below > share)
    return torch.where((position - nearest).abs_() <= exact, nearest, chosen)


def part_of(slot: TileSlot, role: str) -> TensorRef:
    """The small part of that role, to name it."""
    return next(ref for name, ref in slot.tensor.parts if name == role)


def check_divisors(slot: TileSlot, role: str, scales: Tensor, first: int) -> None:
    """Stop at a scale of 0: nothing but 0 could be stored. ``first`` is the row at which the scales begin."""
    if bool((scales == 0).any()):
        row, column = (int(index) for index in (scales == 0).nonzero()[0])
        ref = part_of(slot, role)
        raise FormatError(
            f"{ref.uri}: {ref.name} holds 0 at [{first + row}, {column}], so no code can hold an updated value of "
            f"{slot.tensor.source.name}; output.quantized: mixed or dense can"
        )
