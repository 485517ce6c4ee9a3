"""Where a merge is written. A destination is one module here; the rest of the package never asks which it is.

::

    with open_destination(place, overwrite) as destination:          # locked
        receipts = destination.begin(plan, fingerprint)              # of the shards that an earlier run finished
        ...                                                          # `check` reads each of them again
        with destination.handle.writer(shard) as writer:             # for every other shard, in any process
            writer.write_block(...)
            writer.commit()
        destination.finish(record)                                   # only now the output is a model

Killed at any instant, a destination holds no model, or work that a later run can resume, or the whole model; never a
mixture that looks like one. An older model stays whole until only the last files of the new one are missing.
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
    """Writes one shard, whose header is written already. Leaving its block without `commit` removes the shard."""

    @property
    def shares(self) -> bool:
        """Whether `write_block` can use a ``source``."""

    def write_block(
        self, memory: memoryview, position: int, offset: int, size: int, source: tuple[int, int] | None = None
    ) -> None:
        """Put the next ``size`` bytes, from ``position`` of page-aligned ``memory``, at ``offset`` of the data section.

        Blocks come in order. ``position`` and the offset in the file agree modulo the page size, and bytes before
        ``position`` in its page may be overwritten. ``source`` is the descriptor of a file that holds the same bytes,
        and their offset there. `OutputError` where writing fails.
        """

    def commit(self, active: Sequence[int] = (), fidelity: Mapping[str, Fidelity] | None = None) -> Receipt:
        """Make the shard durable, then its receipt; see `Receipt` for ``active`` and ``fidelity``."""


class Handle(Protocol):
    """The part of a begun destination that workers use. It can be pickled where workers are other processes."""

    def writer(self, shard: ShardPlan) -> AbstractContextManager[Writer]:
        """A writer of a shard that no other worker writes. Writers of several shards may be open at a time."""


class Destination(Protocol):
    """Where one merge is written. One process drives it, and holds its lock within its ``with`` block.

    Entering raises `ResumeError` where another process works there. Leaving without `begin` leaves no trace.
    """

    @property
    def location(self) -> str:
        """The full name of the place, as in a plan and for `open_destination`."""

    def problems(self, plan: MergePlan | None = None) -> list[str]:
        """Every reason why a plan, or without one any plan, cannot be written there: place, permission, space.

        Nothing is written.
        """

    def __enter__(self) -> Destination: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, plan: MergePlan, fingerprint: Fingerprint) -> dict[str, Receipt]:
        """Begin or resume a merge. Returns the receipts of shards that were finished for this fingerprint, by name.

        `ResumeError` where other work is stored and may not be overwritten; then nothing is changed.
        """

    def check(self, receipt: Receipt, advance: Callable[[int], None]) -> Receipt | None:
        """Read a finished shard again. Returns its receipt, or None where the stored bytes are not those written.

        ``advance`` receives the bytes done. The receipt has the checksums that the plan asks for.
        """

    @property
    def handle(self) -> Handle:
        """The handle for workers, after `begin`."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """Turn the finished shards into a model: write the files beside them, the ``record``, and the index last.

        Checksums of the other files and its own are added to the record (see `record.written`). Called again after a
        crash, it continues.
        """

    def abort(self) -> None:
        """Remove all work on a merge that cannot succeed. An older model stays, if it is still whole."""

    @property
    def is_resumable(self) -> bool:
        """Whether the same merge, run again, can resume this one."""

    @property
    def holds_model(self) -> bool:
        """Whether the place holds a whole model at this moment."""

    def standing(self) -> str:
        """The text of an error about which model the place holds at this moment."""


#: By the scheme of a name (``scheme://…``): makes a destination from the name, and from whether a finished merge there
#: may be replaced. A name without a scheme is a local directory.
DESTINATIONS: dict[str, Callable[[str, bool], Destination]] = {"": LocalDirectory}


def open_destination(location: str, overwrite: bool) -> Destination:
    """The destination of that name; nothing is opened yet. `PlanError` where the name is not possible."""
    scheme, separator, _ = location.partition("://")
    return DESTINATIONS.get(scheme if separator else "", LocalDirectory)(location, overwrite)
