"""The memory in which threads compute tiles."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from shardmerge.codecs.rounding import TORCH_DTYPES, seen_as
from shardmerge.execution.devices import Device
from shardmerge.spec.tensors import aligned


class Workspace:
    """Memory of one thread that computes: a tile in the dtype of the work, and as much scratch."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._key: tuple[object, ...] = ()
        self._tensors = (self._memory, self._memory)

    def halves(self, elements: int, size: int) -> tuple[Tensor, Tensor]:
        """Memory for ``elements`` of ``size`` bytes each, twice."""
        nbytes = elements * size
        return self._memory[:nbytes], self._memory[aligned(nbytes) : aligned(nbytes) + nbytes]

    def tensors(self, shape: tuple[int, int], dtype: str, size: int) -> tuple[Tensor, Tensor]:
        """A tile and scratch, both dense; the same as before where nothing else is asked for.

        Each is the beginning of one of the `halves`, which have ``size`` bytes an element.
        """
        if self._key != (shape, dtype, size):
            tile, scratch = self.halves(shape[0] * shape[1], size)
            self._key = (shape, dtype, size)
            self._tensors = (seen_as(tile, dtype, shape), seen_as(scratch, dtype, shape))
        return self._tensors

    def narrow(self, shape: tuple[int, int], dtype: str, after: int) -> tuple[Tensor, Tensor]:
        """A copy of a part of a tile and scratch of its own, both dense and within the scratch of the tile's.

        ``after`` are the bytes of the tile.
        """
        memory = self._memory[aligned(after) :]
        start = aligned(shape[0] * shape[1] * TORCH_DTYPES[dtype].itemsize)
        return seen_as(memory, dtype, shape), seen_as(memory[start:], dtype, shape)


class Lane:
    """What one thread at a time computes with: workspaces, a stream by its number, and an account of the work done."""

    def __init__(self, device: Device, stream: int, size: int) -> None:
        self.stream = stream
        with device.on_stream(stream):
            self.workspace = Workspace(size, device.device)
        # Some codecs encode on the CPU. What is not touched of this takes no memory.
        self.on_cpu = self.workspace if device.device.type == "cpu" else Workspace(size, torch.device("cpu"))
        #: How many elements of a tensor were given to an update, both by identity.
        self.given: Counter[tuple[int, int]] = Counter()
        self.seconds = 0.0
