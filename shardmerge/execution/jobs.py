"""Cut a shard into jobs, each of which fits one buffer, and say where in the buffer its bytes lie."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardmerge.adapters.registry import FAMILIES
from shardmerge.spec.plans import ShardPlan, TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, PAGE, RowRange, aligned, row_nbytes
from shardmerge.spec.windows import boundaries


@dataclass(frozen=True, slots=True)
class Job:
    """Bytes of one buffer: what is read from where, and what is written to where.

    ``tensor`` is None for a run of bytes that travels as it is; else ``tiles`` are the rows that are worked on at a
    time.
    """

    uri: str
    read_offset: int
    read_bytes: int
    write_offset: int
    write_bytes: int
    tensor: TensorPlan | None = None
    tiles: tuple[RowRange, ...] = ()
    #: The update, by its place among the tensor's, that only looks at the tile; nothing is written then.
    survey: int | None = None


def jobs(shard: ShardPlan, buffer_bytes: int) -> Iterator[Job]:
    """A shard's work in the order of its output, each job within one buffer."""
    run: Job | None = None
    for tensor in shard.tensors:
        if tensor.tiles:
            if run:
                yield from _chunks(run, buffer_bytes, shard.header_bytes)
                run = None
            yield from _blocks(tensor, buffer_bytes)
        elif tensor.source.nbytes:
            run, finished = _extend(run, tensor)
            if finished:
                yield from _chunks(finished, buffer_bytes, shard.header_bytes)
    if run:
        yield from _chunks(run, buffer_bytes, shard.header_bytes)


def _extend(run: Job | None, tensor: TensorPlan) -> tuple[Job, Job | None]:
    """Add a tensor to a run of bytes if it follows on both sides; else begin a new run and give back the old one."""
    source, start = tensor.source, tensor.out.data_offsets[0]
    new = Job(source.uri, source.offset, source.nbytes, start, source.nbytes)
    if run is None:
        return new, None
    follows = run.uri == new.uri and run.read_offset + run.read_bytes == new.read_offset
    if follows and run.write_offset + run.write_bytes == new.write_offset:
        size = run.read_bytes + new.read_bytes
        return Job(run.uri, run.read_offset, size, run.write_offset, size), None
    return new, run


def _chunks(run: Job, buffer_bytes: int, data_start: int) -> Iterator[Job]:
    """A run in pieces that end where a page of the output does, so that whole pages stay whole: they may be shared."""
    start = 0
    while start < run.read_bytes:
        before = (data_start + run.write_offset + start) % PAGE
        size = min(buffer_bytes - before, run.read_bytes - start)
        yield Job(run.uri, run.read_offset + start, size, run.write_offset + start, size)
        start += size


def _blocks(tensor: TensorPlan, buffer_bytes: int) -> Iterator[Job]:
    """All tiles, as many to a job as a buffer holds.

    Before that comes a pass over them for every update that must see them all before it changes the first.
    """
    read_row = row_nbytes(tensor.source.dtype, tensor.row_elements)
    write_row = row_nbytes(tensor.out.dtype, tensor.row_elements)
    most_rows = buffer_bytes // max(1, read_row, write_row)
    surveys = [index for index, update in enumerate(tensor.updates) if FAMILIES[update.family].surveys(update)]
    for survey in (*surveys, None):
        for tiles in _grouped(tensor.ranges() if survey is None else _surveyed(tensor), most_rows):
            start, rows = tiles[0].start, tiles[-1].stop - tiles[0].start
            yield Job(
                uri=tensor.source.uri,
                read_offset=tensor.source.offset + start * read_row,
                read_bytes=rows * read_row,
                write_offset=tensor.out.data_offsets[0] + (start - tensor.first_row) * write_row,
                write_bytes=rows * write_row if survey is None else 0,
                tensor=tensor,
                tiles=tiles,
                survey=survey,
            )


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


@dataclass(frozen=True, slots=True)
class Positions:
    """Where in a buffer a job's bytes are read to, worked to, and written from.

    Direct I/O wants bytes at the same place within a page as in the file. What is worked out is put before what is yet
    to be worked on, never over it.
    """

    read: int
    work: int
    write: int


def positions(job: Job, data_start: int) -> Positions:
    """The places of a job in a buffer; ``data_start`` is where the output file's data begins."""
    write = (data_start + job.write_offset) % PAGE
    work, item = write, 1
    if job.tensor is not None:
        item = DTYPE_BITS[job.tensor.source.dtype] // 8
        work = -(-write // 8) * 8  # a float's place is a multiple of its size
    least = work + max(0, job.write_bytes - job.read_bytes)
    read = job.read_offset % PAGE
    if read % item:
        return Positions(aligned(least), work, write)
    return Positions(read + -(-(least - read) // PAGE) * PAGE if least > read else read, work, write)
