"""Write safetensors shards as a stream, and commit a whole checkpoint.

A shard is written header first, then data at its offsets, under a temporary name in the journal's stage; when it is
durable it takes its own name there. The commit moves the finished shards into the output and writes what makes it a
model last: the index, or the only shard. Until then ``from_pretrained`` finds no weights.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

from shardmerge.destinations.journal import Journal
from shardmerge.destinations.record import RECORD_NAME, sealed
from shardmerge.errors import OutputError
from shardmerge.file_formats import safetensors_header
from shardmerge.sources.source import open_reader
from shardmerge.spec.plans import AuxFile, MergePlan, ShardPlan, TensorPlan
from shardmerge.spec.tensors import PAGE, SourceFile
from shardmerge.system import durable, reflink
from shardmerge.system.aligned_memory import pages
from shardmerge.system.checksums import Checksums
from shardmerge.system.directory import Entry
from shardmerge.system.page_cache import open_direct

_COPY_BYTES = 1 << 20
_ALIGNMENT = 32
#: What waits in the page cache at most, where writes go through it. An interrupt, and the news that a disk has failed,
#: wait for the fsync of no more than that.
_DIRTY_BYTES = 64 << 20


class ShardWriter:
    """One output file in the making, from its first byte to its last.

    Leaving the ``with`` block without `commit` removes it. Checksums are taken of the bytes as they come. Where the
    file system can, blocks go past the page cache, in whole pages: the bytes of the last, unfinished page wait for the
    next block in memory. Else they are written as they come. Whole pages that are a source's as they are, are shared
    with it where the file system knows how (`reflink`), and not written.
    """

    def __init__(self, file: Entry, shard: ShardPlan, sha256: bool = False) -> None:
        self.path = file
        self.checksums = Checksums(sha256)
        self.data_start = shard.header_bytes
        self._temporary = file.with_ending(durable.TEMPORARY_SUFFIX)
        self._fd = self._direct = -1
        self._done = 0
        self._dirty = 0
        self._finished = False
        self._reflink: reflink.Reflink | None = None
        self._reserved = False
        self._page = bytearray(PAGE)
        self._nbytes = shard.nbytes
        # Formats other than safetensors have zeros between tensors, fewer than this.
        self._most_zeros = 0 if not shard.head else _ALIGNMENT
        head = shard.head or safetensors_header.encode(
            shard.metadata, {tensor.source.name: tensor.out for tensor in shard.tensors}, shard.header_bytes
        )
        try:
            self._fd = self._temporary.create()
            self._direct = self._open_direct()
            if self._direct >= 0:
                if reflink.can_share(self._fd):
                    self._reflink = reflink.Reflink(self._fd)
                for start, stop in _written(shard) if self._reflink else [(0, shard.nbytes)]:
                    self._reserve(start, stop - start)
            memory = pages(-(-len(head) // PAGE) * PAGE)
            memory[: len(head)] = head
            self._append(memory, 0, len(head))
        except OSError as error:
            self._discard()
            raise durable.output_error(file, "writing", error) from None

    def _open_direct(self) -> int:
        """The same file once more, for writes past the page cache; -1 where there is no such thing."""
        with self._temporary.parent.descriptor() as folder:
            descriptor = open_direct(self._temporary.name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=folder)
        if descriptor >= 0 and not os.path.sameopenfile(descriptor, self._fd):
            os.close(descriptor)
            raise OSError(errno.ESTALE, "another file has taken its place")
        return descriptor

    @property
    def shares(self) -> bool:
        """Whether `write_block` can make use of a ``source``."""
        return self._reflink is not None and self._direct >= 0

    def _reserve(self, start: int, size: int) -> None:
        """Take the space up front, where the file system knows how: a full disk shows before the work is done."""
        try:
            os.posix_fallocate(self._fd, start, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise

    def write_block(
        self, memory: memoryview, position: int, offset: int, size: int, source: tuple[int, int] | None = None
    ) -> None:
        """Put the next ``size`` bytes, from ``position`` of page-aligned ``memory``, at ``offset`` of the data section.

        ``position`` and the place in the file must be the same within a page. Bytes before it in its page may be
        overwritten. ``source`` is an open file, and an offset in it, where the same bytes are.
        """
        zeros = self.data_start + offset - self._done
        if zeros and not 0 < zeros < self._most_zeros:
            raise AssertionError(f"{self.path}: byte {offset} of the data comes at the place of {self._done}")
        try:
            self._append_zeros(zeros)
            self._append(memory, position, size, source)
        except OSError as error:
            raise durable.output_error(self.path, f"writing {size} bytes", error) from None

    def fill_up(self) -> None:
        """The zeros after the last tensor, where the format has some. Then the checksums are those of the file."""
        try:
            self._append_zeros(self._nbytes - self._done)
        except OSError as error:
            raise durable.output_error(self.path, "writing", error) from None

    def _append_zeros(self, size: int) -> None:
        if size:
            memory = pages(2 * PAGE)
            self._append(memory, self._done % PAGE, size)

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
        # The page that this block only finishes is no page of its source.
        begun = min(PAGE if before else 0, whole)
        written = begun if source and self._share(start, begun - before, whole - begun, source) else whole
        try:
            self._write_direct(start - before, memory[first : first + written])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._close_direct()  # this file system promises what it cannot do
            self._write_at(start - before, memory[first : position + size])
            return
        rest = before + size - whole
        self._page[:rest] = memory[first + whole : position + size]

    def _share(self, start: int, skipped: int, size: int, source: tuple[int, int]) -> bool:
        """Whether ``size`` bytes, whole pages, need not be written: those ``skipped`` bytes behind ``start``."""
        descriptor, offset = source
        if self._reflink is None or descriptor < 0 or size < reflink.LEAST or (offset - start) % PAGE:
            return False
        if self._reflink.share(descriptor, offset + skipped, start + skipped, size):
            return True
        if self._reflink.has_refused and not self._reserved:
            self._reserve(start, self._nbytes - start)
            self._reserved = True
        return False

    def _write_direct(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._direct, view[done:], offset + done)

    def _write_at(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)
        self._dirty += done
        if self._dirty >= _DIRTY_BYTES:
            os.fsync(self._fd)
            self._dirty = 0

    def _close_direct(self) -> None:
        if self._direct >= 0:
            direct, self._direct = self._direct, -1
            os.close(direct)

    def commit(self) -> None:
        """Make the bytes durable, then the name."""
        try:
            if self._direct >= 0:
                rest = self._done % PAGE
                self._write_at(self._done - rest, memoryview(self._page)[:rest])
                self._close_direct()
            os.fsync(self._fd)
            descriptor, self._fd = self._fd, -1
            os.close(descriptor)
        except OSError as error:
            raise durable.output_error(self.path, "fsync", error) from None
        durable.rename(self._temporary, self.path)
        self._finished = True

    def _discard(self) -> None:
        for descriptor in (self._direct, self._fd):
            if descriptor >= 0:
                with suppress(OSError):
                    os.close(descriptor)
        self._direct = self._fd = -1
        durable.remove_leftover(self._temporary)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self._discard()


def _written(shard: ShardPlan) -> list[tuple[int, int]]:
    """The parts of a file that cannot be shared with a source, as far as the plan knows.

    Only for these is space reserved where files share blocks: it may not be there twice, and btrfs takes nothing of a
    reserved extent back while any part of it is in use.
    """
    parts = [(0, shard.header_bytes)]
    for tensor in shard.tensors:
        start, stop = (shard.header_bytes + offset for offset in tensor.out.data_offsets)
        if start == stop or _is_shared(tensor, start):
            continue
        if start == parts[-1][1]:
            start = parts.pop()[0]
        parts.append((start, stop))
    return parts


def _is_shared(tensor: TensorPlan, start: int) -> bool:
    """Whether a tensor that begins at ``start`` of its file can be shared with its source but for its ends."""
    return not tensor.tiles and tensor.source.nbytes >= reflink.LEAST and (tensor.source.offset - start) % PAGE == 0


class SafetensorsSink:
    """The output directory of a merge."""

    def __init__(self, plan: MergePlan, journal: Journal) -> None:
        self.plan = plan
        self.journal = journal
        self.output = journal.root

    def writer(self, shard: ShardPlan) -> ShardWriter:
        return ShardWriter(self.journal.stage / shard.name, shard, self.plan.sha256)

    def commit(self, record: dict[str, Any]) -> None:
        """Turn the finished shards into a checkpoint. Running it again after a crash carries on where it stopped."""
        plan = self.plan
        self.journal.begin_commit(self.files())
        *first, last = plan.shards
        for shard in first:
            self._place(shard)
        others = {aux.name: self._copy(aux) for aux in plan.aux}
        if plan.index_name is None:
            self._write_record(record, others)
            self._place(last)
        else:
            self._place(last)
            index = _json(self._index())
            self._write_record(record, {**others, plan.index_name: self._entry(index)})
            durable.write_file(self.output / plan.index_name, [index])

    def files(self) -> list[str]:
        """Every file of the finished output; the last is the one that makes it a model."""
        aux, shards = [aux.name for aux in self.plan.aux], [shard.name for shard in self.plan.shards]
        if self.plan.index_name is None:
            return [*aux, RECORD_NAME, *shards]
        return [*aux, *shards, RECORD_NAME, self.plan.index_name]

    def _place(self, shard: ShardPlan) -> None:
        staged, place = self.journal.stage / shard.name, self.output / shard.name
        if staged.file_status() is not None:
            durable.rename(staged, place)
            return
        # An earlier run has moved it, and was perhaps killed before it did this.
        durable.fsync_directory(self.output.here)
        if (status := place.file_status()) is None or status.st_size != shard.nbytes:
            raise OutputError(f"{staged}: was finished, and is no longer there")

    def _copy(self, aux: AuxFile) -> dict[str, Any]:
        """Write a file beside the shards; what the record says of it."""
        target = self.output / aux.name
        durable.make_folder(target.parent)
        if aux.content is not None:
            content = aux.content.encode()
            durable.write_file(target, [content])
            return self._entry(content)
        checksums = Checksums(self.plan.sha256)
        durable.write_file(target, _chunks(aux.source, checksums))
        return {"bytes": aux.source.size, **checksums.hex()}

    def _entry(self, content: bytes) -> dict[str, Any]:
        checksums = Checksums(self.plan.sha256)
        checksums.update(content)
        return {"bytes": len(content), **checksums.hex()}

    def _write_record(self, record: dict[str, Any], others: dict[str, Any]) -> None:
        durable.write_file(self.output / RECORD_NAME, [_json(sealed({**record, "other_files": others}))])

    def _index(self) -> dict[str, Any]:
        """``total_size`` is the bytes of all tensors, without headers, as transformers counts it."""
        shards = self.plan.shards
        metadata = {**dict(self.plan.index_metadata), "total_size": sum(shard.data_bytes for shard in shards)}
        weight_map = {tensor.source.name: shard.name for shard in shards for tensor in shard.tensors}
        return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _chunks(file: SourceFile, checksums: Checksums) -> Iterable[bytes]:
    """The file's bytes, which ``checksums`` is told too."""
    reader = open_reader(file)
    try:
        for offset in range(0, file.size, _COPY_BYTES):
            chunk = bytearray(min(_COPY_BYTES, file.size - offset))
            reader.read_into(offset, memoryview(chunk))
            checksums.update(memoryview(chunk))
            yield bytes(chunk)
        reader.check()
    finally:
        reader.close()
