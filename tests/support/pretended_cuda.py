"""A GPU that is not there: tensors that say they are on another device, with their numbers in the CPU's memory.

The other device is called meta, as torch needs something of its own for each that it knows, and has no more than names
of CUDA where it was built without.

It is made for what goes wrong on a GPU and not on a CPU, and is stricter than CUDA. An operation fails that

- takes tensors of both, copies and numbers without a dimension excepted;
- comes from a thread that is in no stream of its own;
- takes what another stream has written, and was not waited for since (`Stream.synchronize`, or a number that was read).

Copies are as late as they may be. One from the device comes when its stream is waited for. One to the device is made
at once, but the bytes that it was made of must still be there when its stream is waited for. ``non_blocking`` copies
must be from and to memory that was registered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
#: What is at hand for it.
DEVICE = torch.device("meta")


class MisuseError(AssertionError):
    """Something that would fail on a GPU, or go wrong there at times."""


class Stream:
    """Work in its order; ``number`` says which stream it is."""

    def __init__(self, gpu: PretendedCuda, number: int) -> None:
        self.gpu, self.number = gpu, number
        self.waited = 0
        self._to_host: list[tuple[Tensor, Tensor]] = []
        self._from_host: list[tuple[Tensor, Tensor]] = []

    @property
    def is_reading(self) -> bool:
        """Whether copies of the host's memory may be under way."""
        return bool(self._from_host)

    @property
    def is_busy(self) -> bool:
        """Whether copies of the host's memory, or to it, may be under way."""
        return bool(self._from_host or self._to_host)

    def late_copy(self, target: Tensor, source: Tensor) -> None:
        """Copy from the device to the host."""
        self._to_host.append((target, source.clone()))  # what the stream does afterwards is not copied

    def reads(self, source: Tensor) -> None:
        self._from_host.append((source, source.clone()))

    def synchronize(self) -> None:
        copies, self._to_host = self._to_host, []
        reads, self._from_host = self._from_host, []
        for source, was in reads:
            if not torch.equal(source.view(torch.uint8), was.view(torch.uint8)):
                raise MisuseError("bytes were overwritten before they were copied to the device")
        for target, made in copies:
            target.copy_(made)
        self.waited = self.gpu.tick()


class OnDevice(Tensor):
    """A tensor of the device; ``held`` has its numbers."""

    held: Tensor
    gpu: PretendedCuda

    @staticmethod
    def __new__(cls, held: Tensor, gpu: PretendedCuda) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held, made.gpu = held, gpu
        return made

    def __init__(self, held: Tensor, gpu: PretendedCuda) -> None:
        """What there is to do `__new__` has done."""

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        owner = next(one for one in tree_flatten((args, kwargs))[0] if isinstance(one, OnDevice))
        return owner.gpu.run(func, args, kwargs or {})


class _Within(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is asked for on the device is made there; for one thread."""

    def __init__(self, gpu: PretendedCuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._gpu.run(func, args, kwargs or {})


class PretendedCuda:
    """The device, its streams, and what was done; put in torch's place by `install`."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        #: Host memory that is registered, by address; and all that ever was, in order.
        self.registered: dict[int, int] = {}
        self.ever_registered: list[int] = []
        #: What `cudaHostRegister` answers.
        self.answer = 0
        #: Operations of the device.
        self.operations = 0
        #: Whether the error of a failed call waits for the next kernel.
        self.error_waits = False
        self._here = threading.local()
        self._time = 0
        self._lock = threading.RLock()
        self._written: dict[int, tuple[Stream, int]] = {}

    def install(self, patch: pytest.MonkeyPatch) -> None:
        original = torch.tensor
        # Torch remembers which functions `with torch.device(…)` is for, as they are when it is first used. Were that
        # ours, transformers would never again notice that it makes a model on the meta device.
        _device_constructors()

        def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
            """Torch's own makes one of the meta device without asking anyone."""
            made = original(data, dtype=dtype)
            return made.to(device) if device is not None else made

        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "Stream", lambda device: self.new_stream())
        patch.setattr(torch.cuda, "stream", self.entered)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        runtime = SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self._unregister)
        patch.setattr(torch.cuda, "cudart", lambda: runtime)

    def tick(self) -> int:
        with self._lock:
            self._time += 1
            return self._time

    @property
    def current(self) -> Stream:
        if (stream := getattr(self._here, "stream", None)) is None:
            raise MisuseError("something is done on the device in no stream of its own")
        assert isinstance(stream, Stream)
        return stream

    @property
    def last_of_thread(self) -> Stream | None:
        """The stream that this thread was in last."""
        return getattr(self._here, "last", None)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation, of the CPU or of the device."""
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        mine = [one for one in given if isinstance(one, OnDevice)]
        wanted = kwargs.get("device")
        there = torch.device(wanted).type == DEVICE.type if wanted is not None else bool(mine)
        if not mine and not there:
            return func(*args, **kwargs)
        if _is_view(func):  # there is nothing to do for the device
            seen = func(*tree_map_only(OnDevice, lambda one: one.held, args), **kwargs)
            return tree_map_only(Tensor, lambda made: OnDevice(made, self), seen)
        stream = self.current
        self.operations += 1
        if self.error_waits and not mine:
            self.error_waits = False
            raise RuntimeError("CUDA error: what went wrong before")
        if func is aten.copy_.default and len(mine) == 1:
            return self._copied(stream, *args, **kwargs)
        if func is aten._to_copy.default and (len(mine) == 0 or not there):
            return self._converted(stream, args[0], **kwargs)
        if mine and any(one.dim() for one in given if not isinstance(one, OnDevice)):
            raise MisuseError(f"{func} is given tensors of the CPU and of the device")
        for one in mine:
            self._may_read(one, stream)
        inner_args, inner_kwargs = tree_map_only(OnDevice, lambda one: one.held, (args, kwargs))
        if wanted is not None:
            inner_kwargs["device"] = torch.device("cpu")
        result = func(*inner_args, **inner_kwargs)
        if any(one.shape != one.held.shape for one in mine):
            raise NotImplementedError(f"{func} changes the shape of a tensor")
        if not any(isinstance(one, Tensor) for one in tree_flatten(result)[0]):
            stream.synchronize()  # the host has waited for a number
            return result
        known = {id(one.held): one for one in mine}
        return tree_map_only(Tensor, lambda made: self._made(made, known, stream), result)

    def _made(self, made: Tensor, known: dict[int, OnDevice], stream: Stream) -> Tensor:
        self._written[made.untyped_storage()._cdata] = (stream, self.tick())
        there = known.get(id(made))
        return OnDevice(made, self) if there is None else there

    def _may_read(self, tensor: OnDevice, stream: Stream) -> None:
        writer, when = self._written.get(tensor.held.untyped_storage()._cdata, (stream, 0))
        if writer is not stream and when > writer.waited:
            raise MisuseError(f"stream {stream.number} takes what stream {writer.number} may still be writing")

    def _copied(self, stream: Stream, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if isinstance(target, OnDevice):
            self._to_device(stream, source, non_blocking)
            target.held.copy_(source)
            self._written[target.held.untyped_storage()._cdata] = (stream, self.tick())
        else:
            assert isinstance(source, OnDevice)
            self._to_host(stream, target, source, non_blocking)
        return target

    def _converted(self, stream: Stream, source: Tensor, **options: Any) -> Tensor:
        non_blocking = options.pop("non_blocking", False)
        options["device"] = torch.device("cpu")
        if isinstance(source, OnDevice):
            made = torch.empty_like(source.held, dtype=options.get("dtype"))
            self._to_host(stream, made, source, non_blocking)
            return made
        if options.get("dtype", source.dtype) != source.dtype:
            raise MisuseError("it is converted on the CPU, and copied to the device afterwards")
        self._to_device(stream, source, non_blocking)
        return self._made(aten._to_copy.default(source, **options), {}, stream)

    def _to_device(self, stream: Stream, source: Tensor, non_blocking: bool) -> None:
        if non_blocking:
            self._is_registered(source)
            stream.reads(source)
        else:
            stream.synchronize()

    def _to_host(self, stream: Stream, target: Tensor, source: OnDevice, non_blocking: bool) -> None:
        self._may_read(source, stream)
        if non_blocking:
            self._is_registered(target)
            if target.dtype != source.dtype:
                raise MisuseError("it is converted on its way back")
            stream.late_copy(target, source.held)
        else:
            stream.synchronize()
            target.copy_(source.held)

    def _is_registered(self, memory: Tensor) -> None:
        start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        if self.answer == 0 and not any(at <= start and stop <= at + size for at, size in self.registered.items()):
            raise MisuseError("a copy that nobody waits for is of memory that is not registered")

    def new_stream(self) -> Stream:
        self.streams.append(Stream(self, len(self.streams)))
        return self.streams[-1]

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = getattr(self._here, "stream", None), stream
        self._here.last = stream
        try:
            with _Within(self):
                yield
        finally:
            self._here.stream = before

    def register(self, address: int, size: int, flags: int) -> int:
        if self.answer:
            self.error_waits = True
        elif address in self.registered:
            raise MisuseError("memory is registered twice")
        else:
            self.registered[address] = size
            self.ever_registered.append(address)
        return self.answer

    def _unregister(self, address: int) -> int:
        if any(stream.is_reading for stream in self.streams):
            raise MisuseError("memory is let go while it is read")
        del self.registered[address]
        return 0


def _is_view(func: Any) -> bool:
    returns: Iterable[Any] = func._schema.returns
    return not func._schema.is_mutable and any(one.alias_info is not None for one in returns)


def every_tile(gpu: PretendedCuda, work: Callable[[Any], None]) -> Callable[[Any], None]:
    """``work`` of `ComputeThreads.share`, which must have read and delivered a tile when it returns."""

    def checked(item: Any) -> None:
        work(item)
        stream = gpu.last_of_thread
        if stream is not None and stream.is_busy:
            raise MisuseError("a tile counts as done before its copies are")

    return checked
