"""Cut a shard into jobs, each of which fits a buffer.

Direct I/O needs bytes at the same place within a page in memory as in the file. So a job is read at its source's place
within a page, and written at its output's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardmerge.adapters.registry import FAMILIES
from shardmerge.codecs.registry import encoder
from shardmerge.spec.plans import ShardPlan, TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, PAGE, RowRange
from shardmerge.spec.windows import boundaries


@dataclass(frozen=True, slots=True)
class Job:
    """What is read from where, and what is written to where.

    Offsets count from the start of the file that is read, and from the start of the data in the file that is written;
    ``read_at`` and ``write_at`` are places in the buffers. ``tensor`` is None for a run of bytes that is copied; else
    ``tiles`` are the rows that are worked on at a time.
    """

    uri: str
    read_offset: int
    read_bytes: int
    read_at: int
    write_offset: int
    write_bytes: int
    write_at: int
    tensor: TensorPlan | None = None
    tiles: tuple[RowRange, ...] = ()
    #: The update, by its place among the tensor's, that only looks at the tile; nothing is written then. The number
    #: after the last is the codec's.
    survey: int | None = None
    #: Where there are no tiles: from which byte of the small parts that were made this job writes them.
    made_offset: int = 0

    @property
    def encode_at(self) -> int:
        """Where in the output buffer numbers are encoded: the next multiple of every number's size."""
        return -(-self.write_at // 8) * 8

    @property
    def is_in_place(self) -> bool:
        """Whether each tile is encoded to where it was read.

        Its bytes are still in the core's cache: 2.2 GB in 16 bits take 5 % less time than from one buffer to another.
        """
        return bool(self.tiles) and self.read_at == self.encode_at and self.read_bytes == self.write_bytes


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes that follow each other in a source and in the output."""

    uri: str
    read_offset: int
    write_offset: int
    nbytes: int

    def extended(self, other: _Run) -> _Run | None:
        """Both as one; None where the other does not follow."""
        follows = other.uri == self.uri and other.read_offset == self.read_offset + self.nbytes
        if follows and other.write_offset == self.write_offset + self.nbytes:
            return dataclasses.replace(self, nbytes=self.nbytes + other.nbytes)
        return None


def jobs(shard: ShardPlan, buffer_bytes: int) -> Iterator[Job]:
    """A shard's work in the order of its output, each job within a buffer of ``buffer_bytes`` and a page."""
    run: _Run | None = None
    for tensor in shard.tensors:
        new = None
        if not tensor.tiles:
            if not tensor.source.nbytes:
                continue
            new = _Run(tensor.source.uri, tensor.source.offset, tensor.out.data_offsets[0], tensor.source.nbytes)
            if run and (extended := run.extended(new)):
                run = extended
                continue
        if run:
            yield from _chunks(run, buffer_bytes, shard.header_bytes)
        run = new
        if tensor.tiles:
            yield from _blocks(tensor, buffer_bytes, shard.header_bytes)
    if run:
        yield from _chunks(run, buffer_bytes, shard.header_bytes)


def _chunks(run: _Run, buffer_bytes: int, data_start: int) -> Iterator[Job]:
    """A run in pieces that end where a page of the output does, so that whole pages stay whole: they may be shared."""
    done = 0
    while done < run.nbytes:
        read, write = run.read_offset + done, run.write_offset + done
        write_at = (data_start + write) % PAGE
        size = min(buffer_bytes - write_at, run.nbytes - done)
        yield Job(run.uri, read, size, read % PAGE, write, size, write_at)
        done += size


def _blocks(tensor: TensorPlan, buffer_bytes: int, data_start: int) -> Iterator[Job]:
    """All tiles, as many to a job as a buffer holds.

    Before that comes a pass over them for every update that must see them all before it changes the first, and for a
    codec that must before it encodes the first. After that come the parts that were made of them.
    """
    read_row, write_row = tensor.read_row, tensor.write_row
    most_rows = buffer_bytes // max(1, read_row, write_row)
    item = DTYPE_BITS[tensor.source.dtype] // 8
    surveys = [index for index, update in enumerate(tensor.updates) if FAMILIES[update.family].needs_prepass(update)]
    if tensor.encoding is not None and encoder(tensor).has_prepass(tensor.encoding):
        surveys.append(len(tensor.updates))
    for survey in (*surveys, None):
        of_output = survey is None or survey == len(tensor.updates)
        for tiles in _grouped(tensor.ranges() if of_output else _surveyed(tensor), most_rows):
            start, rows = tiles[0].start, tiles[-1].stop - tiles[0].start
            read = tensor.source.offset + start * read_row
            write = tensor.out.data_offsets[0] + (start - tensor.first_row) * write_row
            yield Job(
                uri=tensor.source.uri,
                read_offset=read,
                read_bytes=rows * read_row,
                read_at=0 if read % item else read % PAGE,  # where a number may be, even if its file has it elsewhere
                write_offset=write,
                write_bytes=rows * write_row if survey is None else 0,
                write_at=(data_start + write) % PAGE,
                tensor=tensor,
                tiles=tiles,
                survey=survey,
            )
    start, stop = tensor.out.data_offsets[1], (tensor.made[-1].info if tensor.made else tensor.out).data_offsets[1]
    for offset in range(start, stop, buffer_bytes):
        size = min(buffer_bytes, stop - offset)
        write_at = (data_start + offset) % PAGE
        yield Job(tensor.source.uri, 0, 0, 0, offset, size, write_at, tensor, made_offset=offset - start)


def _surveyed(tensor: TensorPlan) -> Iterator[RowRange]:
    """The rows of every tile, and where the output is a part of the source, the rest of it, in no larger pieces."""
    tiles = list(tensor.ranges())
    first, last, most = tiles[0].start, tiles[-1].stop, max(map(len, tiles))
    runs = itertools.pairwise(boundaries(dataclasses.replace(tensor, part=None)))
    outside = [RowRange(*run) for start, stop in runs for run in ((start, min(stop, first)), (max(start, last), stop))]
    pieces = [RowRange(at, min(at + most, run.stop)) for run in outside for at in range(run.start, run.stop, most or 1)]
    yield from sorted([*tiles, *pieces], key=lambda rows: rows.start)


def _grouped(tiles: Iterable[RowRange], most_rows: int) -> Iterator[tuple[RowRange, ...]]:
    """Tiles that follow each other, in groups of up to ``most_rows`` rows."""
    group: list[RowRange] = []
    for tile in tiles:
        if group and tile.stop - group[0].start > most_rows:
            yield tuple(group)
            group = []
        group.append(tile)
    if group:
        yield tuple(group)
