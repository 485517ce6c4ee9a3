"""Write a shard as a stream: the header first, then the data at its offsets.

The file has a temporary name until it is durable.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from shardmerge.file_formats import safetensors_header
from shardmerge.spec.plans import ShardPlan
from shardmerge.spec.receipts import Fidelity, Receipt
from shardmerge.spec.tensors import PAGE
from shardmerge.system import durable, reflink
from shardmerge.system.aligned_memory import pages
from shardmerge.system.checksums import Checksums
from shardmerge.system.directory import Entry
from shardmerge.system.page_cache import open_direct

#: The most bytes that wait in the page cache, where writes go through it. The response to an interrupt or to a disk's
#: failure waits for the fsync of no more than that.
_DIRTY_BYTES = 64 << 20


class ShardWriter:
    """Writes one output file from its first byte to its last, and adds each byte to its checksums.

    Leaving the ``with`` block without `commit` removes the file. Where the file system allows it, blocks bypass the
    page cache in whole pages, and the bytes of an unfinished page are kept for the next block. Whole pages that equal a
    source's are shared with it where the file system can (`reflink`), and not written.
    """

    def __init__(
        self,
        file: Entry,
        shard: ShardPlan,
        sha256: bool = False,
        keep: Callable[[Receipt], None] = lambda receipt: None,
    ) -> None:
        """``keep`` receives the receipt when the file is durable."""
        self.path = file
        self._shard, self._keep = shard, keep
        self.checksums = Checksums(sha256)
        self.data_start = shard.header_bytes
        self._temporary = file.with_ending(durable.TEMPORARY_SUFFIX)
        self._fd = self._direct = -1
        self._done = 0
        self._dirty = 0
        self._finished = False
        self._reflink: reflink.Reflink | None = None
        self._page = bytearray(PAGE)
        #: Some layouts have zeros between tensors, fewer than this.
        self._alignment = shard.alignment
        head = head_of(shard)
        try:
            self._fd = self._temporary.create()
            self._direct = self._open_direct()
            # Space is not reserved: the plan has checked it, on ext4 that gains nothing (2.2 GB: 1.43 s without, 1.46 s
            # with), and a file system in memory would touch every page twice.
            if self._direct >= 0 and reflink.can_share(self._fd):
                self._reflink = reflink.Reflink(self._fd)
            memory = pages(-(-len(head) // PAGE) * PAGE)
            memory[: len(head)] = head
            self._append(memory, 0, len(head))
        except OSError as error:
            self._discard()
            raise durable.output_error(file, "writing", error) from None

    def _open_direct(self) -> int:
        """A second descriptor for writes that bypass the page cache; -1 where there is none."""
        with self._temporary.parent.descriptor() as folder:
            descriptor = open_direct(self._temporary.name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=folder)
        if descriptor >= 0 and not os.path.sameopenfile(descriptor, self._fd):
            os.close(descriptor)
            raise OSError(errno.ESTALE, "another file has taken its place")
        return descriptor

    @property
    def shares(self) -> bool:
        return self._reflink is not None and self._direct >= 0

    def write_block(
        self, memory: memoryview, position: int, offset: int, size: int, source: tuple[int, int] | None = None
    ) -> None:
        """See `destination.Writer.write_block`."""
        zeros = self.data_start + offset - self._done
        if zeros and not 0 < zeros < self._alignment:
            raise AssertionError(f"{self.path}: byte {offset} of the data comes at the place of {self._done}")
        try:
            self._append_zeros(zeros)
            self._append(memory, position, size, source)
        except OSError as error:
            raise durable.output_error(self.path, f"writing {size} bytes", error) from None

    def _append_zeros(self, size: int) -> None:
        if size:
            self._append(pages(2 * PAGE), self._done % PAGE, size)

    def _append(self, memory: memoryview, position: int, size: int, source: tuple[int, int] | None = None) -> None:
        start, before = self._done, self._done % PAGE
        self._done += size
        self.checksums.update(memory[position : position + size])
        if self._direct < 0:
            self._write_at(start, memory[position : position + size])
            return
        first = position - before
        memory[first:position] = self._page[:before]
        whole = (before + size) // PAGE * PAGE
        # The page that an earlier block began is not a page of this block's source.
        begun = min(PAGE if before else 0, whole)
        written = begun if source and self._share(start, begun - before, whole - begun, source) else whole
        try:
            _write(self._direct, start - before, memory[first : first + written])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._close_direct()  # this file system opens files for it, but cannot do it
            self._write_at(start - before, memory[first : position + size])
            return
        rest = before + size - whole
        self._page[:rest] = memory[first + whole : position + size]

    def _share(self, start: int, skipped: int, size: int, source: tuple[int, int]) -> bool:
        """Share whole pages, ``size`` bytes from ``start + skipped`` on; False where they must be written."""
        descriptor, offset = source
        if self._reflink is None or descriptor < 0 or size < reflink.LEAST or (offset - start) % PAGE:
            return False
        return self._reflink.share(descriptor, offset + skipped, start + skipped, size)

    def _write_at(self, offset: int, view: memoryview) -> None:
        _write(self._fd, offset, view)
        self._dirty += len(view)
        if self._dirty >= _DIRTY_BYTES:
            os.fsync(self._fd)
            self._dirty = 0

    def _close_direct(self) -> None:
        if self._direct >= 0:
            direct, self._direct = self._direct, -1
            os.close(direct)

    def commit(self, active: Sequence[int] = (), fidelity: Mapping[str, Fidelity] | None = None) -> Receipt:
        """Make the bytes durable, then the name, then the receipt; see `destination.Writer.commit`."""
        with durable.reported(self.path, "writing"):
            self._append_zeros(self._shard.nbytes - self._done)  # after the last tensor, where the format has some
        with durable.reported(self.path, "fsync"):
            if self._direct >= 0:
                rest = self._done % PAGE
                self._write_at(self._done - rest, memoryview(self._page)[:rest])
                self._close_direct()
            os.fsync(self._fd)
            self._must_be_mine()
            descriptor, self._fd = self._fd, -1
            os.close(descriptor)
        durable.rename(self._temporary, self.path)
        self._finished = True
        receipt = Receipt(self._shard.name, self._shard.nbytes, self.checksums.hex(), tuple(active), fidelity or {})
        self._keep(receipt)
        return receipt

    def _must_be_mine(self) -> None:
        """Another process, whose driver was killed, may still write the same shard: its file is not to be renamed."""
        status = self._temporary.status()
        if status is None or not os.path.samestat(status, os.fstat(self._fd)):
            raise OSError(errno.ESTALE, "another process writes the same file")

    def _discard(self) -> None:
        for descriptor in (self._direct, self._fd):
            if descriptor >= 0:
                with suppress(OSError):
                    os.close(descriptor)
        self._direct = self._fd = -1
        durable.remove_leftover(self._temporary)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._finished:
            self._discard()


def _write(descriptor: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def head_of(shard: ShardPlan) -> bytes:
    """The bytes before a shard's data."""
    return shard.head or safetensors_header.encode(shard.metadata, dict(shard.outputs()), shard.header_bytes)
