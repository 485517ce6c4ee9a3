"""Cut a shard into jobs, each of which fits a buffer.

Direct I/O needs bytes at the same offset within a page in memory as in the file. So a job is read at the offset of its
source within a page, and written at that of its output. All positions of a job are computed here, once.
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
from shardmerge.spec.updates import Update
from shardmerge.spec.windows import Position, boundaries, locate, reaching

#: A multiple of every number's size.
_ITEM = 8
Positions = tuple[tuple[Update, Position], ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a weight that are worked on at a time."""

    #: As the source counts them.
    rows: RowRange
    #: The same rows among those of the job.
    here: slice
    #: The updates that reach the rows, in their order, and where.
    positions: Positions


@dataclass(frozen=True, slots=True)
class Job:
    """What is read from where, and what is written to where.

    ``*_offset`` count from the start of the file that is read, and from the start of the data in the file that is
    written; ``*_at`` are offsets in the buffers. ``tensor`` is None for a run of bytes that is copied.
    """

    uri: str
    read_offset: int
    read_bytes: int
    read_at: int
    write_offset: int
    write_bytes: int
    write_at: int
    #: Where numbers are encoded, before they are moved to ``write_at``.
    encode_at: int
    tensor: TensorPlan | None = None
    #: Without tiles, the job writes small parts that were made of all tiles, from byte ``made_offset`` of them.
    tiles: tuple[Tile, ...] = ()
    made_offset: int = 0
    #: Whether the tiles are only shown: to this update, or to the codec if there is none. Nothing is written then.
    is_prepass: bool = False
    shown_to: Update | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether the output takes the buffer of the input.

        Its bytes are still in the core's cache: 2.2 GB in 16 bits take 5 % less time than from one buffer to another.
        """
        is_same_size = self.read_at == self.encode_at and self.read_bytes == self.write_bytes
        return is_same_size and (self.tensor is None or bool(self.tiles))


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
            yield from _tile_jobs(tensor, buffer_bytes, shard.header_bytes)
            yield from _made_jobs(tensor, buffer_bytes, shard.header_bytes)
    if run:
        yield from _chunks(run, buffer_bytes, shard.header_bytes)


def _chunks(run: _Run, buffer_bytes: int, data_start: int) -> Iterator[Job]:
    """A run in pieces that end where a page of the output does, so that whole pages stay whole: they may be shared."""
    done = 0
    while done < run.nbytes:
        read, write = run.read_offset + done, run.write_offset + done
        at = (data_start + write) % PAGE
        size = min(buffer_bytes - at, run.nbytes - done)
        yield Job(run.uri, read, size, read % PAGE, write, size, at, encode_at=at)
        done += size


def _tile_jobs(tensor: TensorPlan, buffer_bytes: int, data_start: int) -> Iterator[Job]:
    """All tiles, as many to a job as a buffer holds.

    Before that comes a pass over the tiles for every update that must see them all before it changes the first, and for
    a codec that must before it encodes the first.
    """
    read_row, write_row = tensor.read_row, tensor.write_row
    most_rows = buffer_bytes // max(1, read_row, write_row)
    item = DTYPE_BITS[tensor.source.dtype] // 8
    passes: list[tuple[bool, Update | None]] = [
        (True, update) for update in tensor.updates if FAMILIES[update.family].needs_prepass(update)
    ]
    if tensor.encoding is not None and encoder(tensor).has_prepass(tensor.encoding):
        passes.append((True, None))
    for is_prepass, shown_to in (*passes, (False, None)):
        for group in _grouped(_located(tensor, shown_to), most_rows):
            start, rows = group[0][0].start, group[-1][0].stop - group[0][0].start
            read = tensor.source.offset + start * read_row
            write = tensor.out.data_offsets[0] + (start - tensor.first_row) * write_row
            write_at = (data_start + write) % PAGE
            yield Job(
                uri=tensor.source.uri,
                read_offset=read,
                read_bytes=rows * read_row,
                read_at=0 if read % item else read % PAGE,  # where a number may be, even if its file has it elsewhere
                write_offset=write,
                write_bytes=0 if is_prepass else rows * write_row,
                write_at=write_at,
                encode_at=-(-write_at // _ITEM) * _ITEM,
                tensor=tensor,
                tiles=tuple(Tile(of, slice(of.start - start, of.stop - start), positions) for of, positions in group),
                is_prepass=is_prepass,
                shown_to=shown_to,
            )


def _made_jobs(tensor: TensorPlan, buffer_bytes: int, data_start: int) -> Iterator[Job]:
    """The small parts of the output, when all tiles have been encoded."""
    start, stop = tensor.out.data_offsets[1], (tensor.made[-1].info if tensor.made else tensor.out).data_offsets[1]
    for offset in range(start, stop, buffer_bytes):
        size = min(buffer_bytes, stop - offset)
        at = (data_start + offset) % PAGE
        encode_at = -(-at // _ITEM) * _ITEM
        yield Job(tensor.source.uri, 0, 0, 0, offset, size, at, encode_at, tensor, made_offset=offset - start)


def _located(tensor: TensorPlan, shown_to: Update | None) -> Iterator[tuple[RowRange, Positions]]:
    """The rows of every tile with the positions of updates in them.

    In a pass for one update, these are the tiles that it reaches, with the updates up to it.
    """
    reach = reaching(tensor)
    for rows in tensor.ranges() if shown_to is None else _with_outside(tensor):
        found = tuple((of, position) for of in reach(rows) if (position := locate(tensor, of, rows)) is not None)
        if shown_to is None:
            yield rows, found
        elif upto := [number for number, (update, _) in enumerate(found, 1) if update is shown_to]:
            yield rows, found[: upto[0]]


def _with_outside(tensor: TensorPlan) -> Iterator[RowRange]:
    """The rows of every tile, and where the output is a part of the source, the rest of it, in no larger pieces."""
    tiles = list(tensor.ranges())
    first, last, most = tiles[0].start, tiles[-1].stop, max(map(len, tiles))
    runs = itertools.pairwise(boundaries(dataclasses.replace(tensor, part=None)))
    outside = [RowRange(*run) for start, stop in runs for run in ((start, min(stop, first)), (max(start, last), stop))]
    pieces = [RowRange(at, min(at + most, run.stop)) for run in outside for at in range(run.start, run.stop, most or 1)]
    yield from sorted([*tiles, *pieces], key=lambda rows: rows.start)


def _grouped(tiles: Iterable[tuple[RowRange, Positions]], most_rows: int) -> Iterator[list[tuple[RowRange, Positions]]]:
    """Tiles that follow each other, in groups of up to ``most_rows`` rows."""
    group: list[tuple[RowRange, Positions]] = []
    for tile in tiles:
        rows = tile[0]
        if group and (rows.start != group[-1][0].stop or rows.stop - group[0][0].start > most_rows):
            yield group
            group = []
        group.append(tile)
    if group:
        yield group
