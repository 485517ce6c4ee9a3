"""Where tiles are computed: on the CPU, or on a GPU, to which they are copied and back; and the memory for it.

On a GPU every lane has a stream, so that the copies of one tile overlap with the products of another. Leaving
`on_stream` waits for the stream: then bytes have been read from a buffer, and have arrived in one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor

from shardmerge.codecs.rounding import TORCH_DTYPES, seen_as
from shardmerge.spec.tensors import aligned


def device_for(device: torch.device, streams: int) -> Device:
    return Device() if device.type == "cpu" else CudaDevice(torch.device(device.type, device.index or 0), streams)


_NOTHING = nullcontext()


class Device:
    """The CPU: tiles are decoded from a buffer, and rounded into another."""

    device = torch.device("cpu")

    def pin(self, buffers: Iterable[Tensor]) -> None:
        """Page-lock memory that is copied from and to, until `close`."""

    def close(self) -> None:
        """Undo `pin`."""

    def on_stream(self, number: int) -> AbstractContextManager[None]:
        """A context in which work goes to a stream, by its number. Leaving it waits for the work."""
        return _NOTHING

    def fetch(self, stored: Tensor) -> Tensor:
        """A buffer's bytes on this device; it may be the same memory."""
        return stored

    def synchronize(self) -> None:
        """Wait for this thread's stream, so that other threads may use its results."""

    def in_full(self) -> AbstractContextManager[None]:
        """A context of the process in which products of float32 are computed in float32, not in TF32."""
        return _NOTHING

    def staging(self, target: Tensor) -> Tensor:
        """Memory of this device like ``target``, a part of a buffer, or ``target`` itself; see `deliver`."""
        return target

    def deliver(self, staged: Tensor, target: Tensor) -> None:
        """Copy a tensor of `staging` to its target; it is complete after `synchronize`."""


class CudaDevice(Device):
    """A GPU. Torch's allocator keeps the memory of each stream apart."""

    def __init__(self, device: torch.device, streams: int) -> None:
        self.device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(streams)]  # type: ignore[no-untyped-call]
        self._pinned: list[int] = []

    def pin(self, buffers: Iterable[Tensor]) -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for buffer in buffers:
            with torch.cuda.device(self.device):
                failed = int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1))  # for all of CUDA's contexts
            if not failed:
                self._pinned.append(buffer.data_ptr())
                continue
            # Copies are only slower then. But CUDA reports the error again when the next kernel starts.
            with suppress(RuntimeError), self.on_stream(0):
                torch.ones(1, device=self.device)

    def close(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())  # type: ignore[no-untyped-call]

    @contextmanager
    def on_stream(self, number: int) -> Iterator[None]:
        with torch.cuda.stream(self._streams[number]):
            try:
                yield
            finally:
                self.synchronize()

    def fetch(self, stored: Tensor) -> Tensor:
        return stored.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def in_full(self) -> Iterator[None]:
        # Torch refuses a mixture of its old switches and those that it has since 2.9. WaveFT's are convolutions.
        of: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
        switch, off = "allow_tf32", cast(Any, False)
        if hasattr(of[0], "fp32_precision"):
            of, switch, off = (of[0], of[1].conv), "fp32_precision", "ieee"
        before = [getattr(one, switch) for one in of]
        try:
            for one in of:
                setattr(one, switch, off)
            yield
        finally:
            for one, was in zip(of, before, strict=True):
                setattr(one, switch, was)

    def staging(self, target: Tensor) -> Tensor:
        return torch.empty_like(target, device=self.device)

    def deliver(self, staged: Tensor, target: Tensor) -> None:
        target.copy_(staged, non_blocking=True)


# --- what a thread computes with --------------------------------------------------------------------------------------


class Workspace:
    """Memory of one thread that computes: a tile in the compute dtype, and as much scratch."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._key: tuple[object, ...] = ()
        self._tensors = (self._memory, self._memory)

    def halves(self, elements: int, size: int) -> tuple[Tensor, Tensor]:
        """Memory for ``elements`` of ``size`` bytes each, twice."""
        nbytes = elements * size
        return self._memory[:nbytes], self._memory[aligned(nbytes) : aligned(nbytes) + nbytes]

    def tensors(self, shape: tuple[int, int], dtype: str, size: int) -> tuple[Tensor, Tensor]:
        """A tile and scratch, both dense, each at the beginning of one of the `halves` of ``size`` bytes an element."""
        if self._key != (shape, dtype, size):
            tile, scratch = self.halves(shape[0] * shape[1], size)
            self._key = (shape, dtype, size)
            self._tensors = (seen_as(tile, dtype, shape), seen_as(scratch, dtype, shape))
        return self._tensors

    def narrow(self, shape: tuple[int, int], dtype: str, after: int) -> tuple[Tensor, Tensor]:
        """Memory for a copy of a part of a tile and its scratch, both dense and within the tile's scratch.

        ``after``: the bytes of the tile.
        """
        memory = self._memory[aligned(after) :]
        start = aligned(shape[0] * shape[1] * TORCH_DTYPES[dtype].itemsize)
        return seen_as(memory, dtype, shape), seen_as(memory[start:], dtype, shape)


class Lane:
    """What one thread at a time computes with: workspaces and a stream, and an account of the work done."""

    def __init__(self, device: Device, stream: int, size: int) -> None:
        self.stream = stream
        with device.on_stream(stream):
            self.workspace = Workspace(size, device.device)
        # Some codecs encode on the CPU. Untouched, this takes no memory.
        self.on_cpu = self.workspace if device.device.type == "cpu" else Workspace(size, torch.device("cpu"))
        #: How many elements of a tensor an update was applied to, both by identity.
        self.applied: Counter[tuple[int, int]] = Counter()
        self.seconds = 0.0
