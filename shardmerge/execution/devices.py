"""Where tiles are worked on: in the buffers' own memory, or on a GPU, to which they are copied and back.

On a GPU every thread has a stream of its own, so that the copies of one tile overlap with the products of another. What
a thread does is done in turns, and what was begun in a turn is over when it ends: bytes have been read from a buffer,
and have arrived in one, before anyone is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor


def place_on(device: torch.device, workers: int) -> Place:
    return Place() if device.type == "cpu" else CudaPlace(torch.device(device.type, device.index or 0), workers)


_NOTHING = nullcontext()


class Place:
    """The CPU: tiles are decoded from their buffer, and rounded into it."""

    device = torch.device("cpu")

    def pin(self, buffers: Iterable[Tensor]) -> None:
        """Get memory ready to be copied from and to, until `close`."""

    def close(self) -> None:
        """Undo `pin`."""

    def turn(self, worker: int) -> AbstractContextManager[None]:
        """What a thread, told by its number, does in here is done when it leaves."""
        return _NOTHING

    def fetch(self, stored: Tensor) -> Tensor:
        """What lies in a buffer, here; it may be the same memory."""
        return stored

    def settle(self) -> None:
        """Wait for what this thread has begun: it is then for other threads to use."""

    def in_full(self) -> AbstractContextManager[None]:
        """Products of float32 are float32's; for one thread to say, around all turns."""
        return _NOTHING

    def beside(self, target: Tensor) -> Tensor:
        """Memory here to make in what shall be in ``target``; `deliver` takes it there."""
        return target

    def deliver(self, made: Tensor, target: Tensor) -> None:
        """Bring what was made `beside` a target into it; it is there when the turn ends."""


class CudaPlace(Place):
    """A GPU. Its memory comes from torch's allocator, of which every stream has memory of its own."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self.device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(workers)]  # type: ignore[no-untyped-call]
        self._pinned: list[int] = []

    def pin(self, buffers: Iterable[Tensor]) -> None:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for buffer in buffers:
            with torch.cuda.device(self.device):
                failed = int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1))  # for all of CUDA's contexts
            if not failed:
                self._pinned.append(buffer.data_ptr())
                continue
            # Copies are slower then, and no less right. But CUDA keeps the error for the next who launches a kernel.
            with suppress(RuntimeError), self.turn(0):
                torch.ones(1, device=self.device)

    def close(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())  # type: ignore[no-untyped-call]

    @contextmanager
    def turn(self, worker: int) -> Iterator[None]:
        with torch.cuda.stream(self._streams[worker]):
            try:
                yield
            finally:
                self.settle()

    def fetch(self, stored: Tensor) -> Tensor:
        return stored.to(self.device, non_blocking=True)

    def settle(self) -> None:
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

    def beside(self, target: Tensor) -> Tensor:
        return torch.empty_like(target, device=self.device)

    def deliver(self, made: Tensor, target: Tensor) -> None:
        target.copy_(made, non_blocking=True)
