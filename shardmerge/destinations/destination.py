"""Where a merge goes. A destination is one module here; the rest of the package never asks which it is.

::

    with open_destination(place, overwrite) as destination:          # locked
        receipts = destination.begin(plan, fingerprint)              # what an earlier run has finished
        ...                                                          # each is read again by `check`
        with destination.handle.writer(shard) as writer:             # of every other shard, here or anywhere
            writer.write_block(...)
            writer.commit()
        destination.finish(record)                                   # now, and not before, it is a model

Killed at any instant, a destination holds no model, or what a later run can resume, or the whole model; never a mixture
that looks like one. A model that was there before stays whole until the new one is complete but for its last files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

from shardmerge.destinations.local.directory import LocalDirectory
from shardmerge.spec.plans import Fingerprint, MergePlan, ShardPlan
from shardmerge.spec.receipts import Fidelity, Receipt


class Writer(Protocol):
    """One shard in the making. Its header is there already; leaving its block without `commit` removes it."""

    @property
    def shares(self) -> bool:
        """Whether `write_block` can make use of a ``source``."""

    def write_block(
        self, memory: memoryview, position: int, offset: int, size: int, source: tuple[int, int] | None = None
    ) -> None:
        """Put the next ``size`` bytes, from ``position`` of page-aligned ``memory``, at ``offset`` of the data section.

        Blocks come in order. ``position`` and the place in the file are the same within a page, and bytes before
        ``position`` in its page may be overwritten. ``source`` is an open file, and an offset in it, where the same
        bytes are. `OutputError` where it fails.
        """

    def commit(self, active: Sequence[int] = (), fidelity: Mapping[str, Fidelity] | None = None) -> Receipt:
        """Make the shard durable, then its receipt; see `Receipt` for ``active`` and ``fidelity``."""


class Handle(Protocol):
    """What a worker needs of a destination that its driver has begun. Where workers are other processes, it pickles."""

    def writer(self, shard: ShardPlan) -> AbstractContextManager[Writer]:
        """A writer of a shard, for which no other worker has one. Writers of several shards may be open at a time."""


class Destination(Protocol):
    """Where one merge goes, driven by one process, which holds its lock while it has entered it.

    To enter raises `ResumeError` where another process works there. Leaving without `begin` leaves no trace.
    """

    @property
    def location(self) -> str:
        """The whole name of the place, as a plan carries it and as `open_destination` takes it."""

    def problems(self, plan: MergePlan | None = None) -> list[str]:
        """Everything that forbids to write a plan there: place, permission, space. Nothing is written.

        Without a plan, what forbids to write any.
        """

    def __enter__(self) -> Destination: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, plan: MergePlan, fingerprint: Fingerprint) -> dict[str, Receipt]:
        """Begin a merge, or resume it: the receipts of shards that were finished for this very fingerprint, by name.

        `ResumeError` where other work is there and may not be overwritten; then nothing is changed.
        """

    def check(self, receipt: Receipt, advance: Callable[[int], None]) -> Receipt | None:
        """Read a finished shard again: its receipt, or None where the destination has not kept what was written.

        ``advance`` is given the bytes done. The checksums are those that the plan asks for.
        """

    @property
    def handle(self) -> Handle:
        """What workers write with, after `begin`."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """Turn the finished shards into a model: the files beside them, the ``record``, and the index last.

        The record (see `record.written`) is completed with checksums of the other files, and sealed. Run again after a
        crash, it carries on.
        """

    def abort(self) -> None:
        """Remove all work on a merge that cannot succeed. A model that was there before stays, if it is still whole."""

    @property
    def is_resumable(self) -> bool:
        """Whether there is work that the same merge, run again, resumes."""

    @property
    def holds_model(self) -> bool:
        """Whether a whole model is there at this moment."""

    def standing(self) -> str:
        """Whether the place holds a model at this moment, and which, as an error says it."""


#: What makes a destination of its name and of whether a finished merge there may be replaced, by the scheme of the name
#: (``scheme://…``). A name without one is a local directory.
DESTINATIONS: dict[str, Callable[[str, bool], Destination]] = {"": LocalDirectory}


def open_destination(location: str, overwrite: bool) -> Destination:
    """The destination of that name, which is not looked at yet. `PlanError` where there can be none."""
    scheme, separator, _ = location.partition("://")
    return DESTINATIONS.get(scheme if separator else "", LocalDirectory)(location, overwrite)
