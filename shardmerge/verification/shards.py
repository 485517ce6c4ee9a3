"""One pass over a shard of the output: its checksum, and the bytes or the rows of every tensor.

The file is read once, from its first byte to its last. An untouched tensor is compared with the bytes of the base. The
sampled rows of a touched tensor are computed again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.codecs.registry import encoder
from shardmerge.codecs.rounding import NUMBER_DTYPES, half_unit
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, RowRange, SourceFile, TensorInfo
from shardmerge.system.checksums import Checksums
from shardmerge.verification.decoders import bound_of, numbers, output_of
from shardmerge.verification.exact import Exact, is_copied
from shardmerge.verification.findings import CHECKSUMS, TOUCHED, UNTOUCHED, Findings
from shardmerge.verification.reading import CHUNK, Files, StoredWeight, decode, wide
from shardmerge.verification.rounding import is_stochastic, rounded
from shardmerge.verification.rows import all_rows, sampled

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of an output file. ``plan`` says what it must be; it is None where that is not known."""

    name: str
    info: TensorInfo
    plan: TensorPlan | None


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file of the output as it was found, and its recorded checksums."""

    name: str
    file: SourceFile
    data_start: int
    pieces: tuple[Piece, ...]
    #: Checksums by the name of their kind; empty where none were recorded.
    recorded: Mapping[str, str]


class ShardCheck:
    """Verifies one shard after the other. With ``rows`` None, it computes all rows again."""

    def __init__(self, files: Files, exact: Exact | None, findings: Findings, rows: int | None) -> None:
        self._files = files
        self._exact = exact
        self._findings = findings
        self._rows = rows
        self._buffers = bytearray(CHUNK), bytearray(CHUNK)
        self._infos: Mapping[str, TensorInfo] = {}

    def run(self, shard: ShardFile, advance: Advance) -> None:
        """Everything there is to know of a shard. ``advance`` receives the bytes done."""
        before = sum(self._findings.counts.values())
        if self._pass(shard, advance) or sum(self._findings.counts.values()) > before + 1:
            return
        if self._rows is not None and self._exact is not None:
            # Something has changed that the sample has not seen: look for it in every row.
            aside = Findings(self._findings.output, self._findings.seed)
            again = ShardCheck(self._files, self._exact, aside, None)
            again._pass(dataclasses.replace(shard, recorded={}), lambda count: None)
            self._findings.take(aside)

    def _pass(self, shard: ShardFile, advance: Advance) -> bool:
        """Whether the checksums are those recorded, or none are."""
        checksums = Checksums("sha256" in shard.recorded)
        self._infos = {piece.name: piece.info for piece in shard.pieces}
        for offset, size in _chunks(0, shard.data_start):
            self._read(shard, offset, size, checksums)
        end = 0
        for piece in shard.pieces:
            self._tensor(shard, piece, checksums, advance)
            end = piece.info.data_offsets[1]
        for offset, size in _chunks(shard.data_start + end, shard.file.size):
            self._read(shard, offset, size, checksums)
            advance(size)
        return self._agrees(shard, checksums.hex())

    def _agrees(self, shard: ShardFile, found: Mapping[str, str]) -> bool:
        wrong = [kind for kind, value in shard.recorded.items() if found.get(kind) != value]
        if shard.recorded:
            self._findings.checksums += 1
            self._findings.checksum_bytes += shard.file.size
        if wrong:
            kind = wrong[0]
            self._findings.problem(
                CHECKSUMS,
                f"{shard.name}: its {kind} is {found.get(kind)}, but {shard.recorded[kind]} was recorded: the file has "
                "changed since the merge",
                file=shard.name,
                found=found.get(kind),
                expected=shard.recorded[kind],
            )
        return not wrong

    def _read(self, shard: ShardFile, offset: int, size: int, checksums: Checksums) -> bytearray:
        """The next bytes of the file, which its checksums get, too."""
        data = self._buffers[0] if size == CHUNK else bytearray(size)
        self._files.get(shard.file.uri).read_into(offset, memoryview(data))
        checksums.update(memoryview(data))
        return data

    # --- one tensor ---------------------------------------------------------------------------------------------------

    def _tensor(self, shard: ShardFile, piece: Piece, checksums: Checksums, advance: Advance) -> None:
        start, stop = (shard.data_start + offset for offset in piece.info.data_offsets)
        plan = piece.plan
        if plan is not None and not is_copied(plan) and self._exact is not None:
            self._touched(shard, plan, start, self._exact, checksums, advance)
            return
        if plan is not None and is_copied(plan):
            self._findings.untouched += 1
            self._findings.untouched_bytes += piece.info.nbytes
        wrong = False
        for offset, size in _chunks(start, stop):
            data = self._read(shard, offset, size, checksums)
            if plan is not None and is_copied(plan) and not wrong:
                wrong = self._differs(shard, plan, offset - start, data)
            advance(size)

    def _differs(self, shard: ShardFile, plan: TensorPlan, at: int, data: bytearray) -> bool:
        """Whether bytes ``at`` of an untouched tensor are not the source's; says where."""
        source, out = plan.source, plan.out
        width = DTYPE_BITS[out.dtype] // 8 or 1
        if source.dtype == out.dtype:
            expected = self._buffers[1] if len(data) == CHUNK else bytearray(len(data))
            self._files.get(source.uri).read_into(source.offset + at, memoryview(expected))
            if data == expected:
                return False
            index = _first_difference(data, expected) // width
        else:
            stored = self._files.rows(source, RowRange(at // width, (at + len(data)) // width), 1)
            expected = bytearray(len(data))
            # Torch rounds a float64 to 16 bits by way of float32, the merge does so once.
            decode(expected, out.dtype, 1).copy_(rounded(stored, out.dtype) if source.dtype == "F64" else stored)
            if data == expected:
                return False
            wrong = self._unlike(plan, data, expected, stored)
            if not bool(wrong.any()):
                return False
            index = int(wrong.flatten().nonzero()[0])
        row, column = divmod(at // width + index, max(1, math.prod(out.shape[1:])))
        found, wanted = (_shown(of[index * width : (index + 1) * width], out.dtype) for of in (data, expected))
        owner = "the adapter's" if plan.updates else "the base's"
        self._findings.problem(
            UNTOUCHED,
            f"{source.name}, row {row}, column {column}: holds {found}, {owner} is {wanted} ({shard.name})",
            file=shard.name,
            tensor=source.name,
            row=row,
            column=column,
            found=found,
            expected=wanted,
        )
        return True

    def _unlike(self, plan: TensorPlan, found: bytearray, expected: bytearray, stored: Tensor) -> Tensor:
        """Which numbers of another dtype than the source's are not the source's, rounded."""
        numbers, nearest = (decode(of, plan.out.dtype, 1) for of in (found, expected))
        like = (numbers == nearest) | (numbers.isnan() & nearest.isnan())
        if self._is_stochastic(plan):  # both neighbours are right
            exact = stored.double()
            like |= (numbers.double() - exact).abs() <= self._rounding(plan, exact.abs())
        return ~like

    def _is_stochastic(self, plan: TensorPlan) -> bool:
        return self._exact is not None and is_stochastic(plan, self._exact.compute_dtype, plan.out.dtype)

    def _rounding(self, plan: TensorPlan, magnitude: Tensor) -> Tensor:
        """What one rounding may change: half a unit of the last place, or a whole one where it is stochastic."""
        half = half_unit(magnitude, plan.out.dtype)
        return half.mul_(2) if self._is_stochastic(plan) else half

    # --- one touched tensor -------------------------------------------------------------------------------------------

    def _touched(
        self, shard: ShardFile, plan: TensorPlan, start: int, exact: Exact, checksums: Checksums, advance: Advance
    ) -> None:
        findings = self._findings
        together = encoder(plan).row_unit(plan.encoding) if plan.encoding else 1
        windows = all_rows(plan, together) if self._rows is None else sampled(plan, self._rows, findings.seed, together)
        is_plain = encoder(plan).is_plain  # its numbers can be looked at as they come by
        stored = output_of(plan, shard.file, shard.data_start, self._infos)
        exact.begin(plan)
        findings.touched += 1
        findings.rows += sum(map(len, windows))
        findings.all_rows += plan.rows
        row_bytes = plan.write_row
        wrong = stored is None  # a part is missing, which the header says already
        for rows, window in _blocks(windows, plan.rows):
            for offset, size in _chunks(rows.start * row_bytes, rows.stop * row_bytes, None if window else CHUNK):
                data = self._read(shard, start + offset, size, checksums)
                if not wrong and is_plain:
                    wrong = not self._finite(shard, plan, data, offset // row_bytes * plan.row_elements)
                if window and not wrong and stored is not None:
                    if is_plain:
                        found = wide(decode(data, plan.out.dtype, plan.row_elements))
                    else:
                        found = numbers(self._files, stored, rows)
                    wrong = not self._window(shard, stored, plan, rows, found, *exact.rows(rows))
                advance(size)

    def _finite(self, shard: ShardFile, plan: TensorPlan, data: bytearray, at: int) -> bool:
        """Whether elements from the one ``at`` on are numbers, or infinities that the base holds, too."""
        values = decode(data, plan.out.dtype, 1)
        # The sum is the cheapest look; it may be infinite by itself.
        if math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all()):
            return True
        wrong = ~torch.isfinite(values) & ~self._of_the_base(plan, values, at)
        if not bool(wrong.any()):
            return True
        index = int(wrong.nonzero()[0][0])
        row, column = divmod(at + index, plan.row_elements)
        value = float(values[index])
        self._findings.problem(
            TOUCHED,
            f"{plan.source.name}, row {row}, column {column}: holds {value} ({shard.name})",
            file=shard.name,
            tensor=plan.source.name,
            row=row,
            column=column,
            found=str(value),
        )
        return False

    def _of_the_base(self, plan: TensorPlan, values: Tensor, at: int) -> Tensor:
        """Which elements, from the one ``at`` on, are infinities that stand there in the base."""
        base = plan.base or plan.source
        same = torch.zeros_like(values, dtype=torch.bool)
        there = max(0, min(len(values), math.prod(base.shape) - at))
        if there:
            width = 1 if plan.decoding is None else plan.row_elements
            rows = RowRange(at // width, -(-(at + there) // width))
            stored = StoredWeight(base, width, plan.decoding, dict(plan.parts))
            before = numbers(self._files, stored, rows).reshape(-1, 1)[at - rows.start * width :][:there]
            same[:there] = before == values[:there].double()
        return same & torch.isinf(values)

    def _window(
        self,
        shard: ShardFile,
        stored: StoredWeight,
        plan: TensorPlan,
        rows: RowRange,
        found: Tensor,
        value: Tensor,
        error: Tensor,
    ) -> bool:
        """Compare rows as found with W'; says where they are off by more than is allowed."""
        extreme = value + error * value.sign()
        if encoder(plan).is_plain:
            allowed = self._rounding(plan, extreme.abs()) + error
        else:
            allowed = bound_of(self._files, stored, extreme, rows) + error
        difference = (found - value).abs()
        # An infinity that is copied is itself, and minus itself it is NaN.
        ratio = torch.where(found == value, 0.0, difference / allowed)
        worst = int(ratio.argmax()) if ratio.numel() else 0
        largest = float(ratio.flatten()[worst]) if ratio.numel() else 0.0
        if largest <= 1.0:
            if largest > self._findings.worst:
                self._findings.worst, self._findings.worst_tensor = largest, plan.source.name
            return True
        first = int((~(ratio <= 1.0)).flatten().nonzero()[0])
        row, column = divmod(first, plan.row_elements)
        at = {name: float(of[row, column]) for name, of in (("found", found), ("expected", value))}
        off, bound = float(difference[row, column]), float(allowed[row, column])
        self._findings.problem(
            TOUCHED,
            f"{plan.source.name}, row {rows.start + row}, column {column}: holds {at['found']:.9g}, base and adapter "
            f"make {at['expected']:.9g} of it; that is off by {off:.3g}, where {bound:.3g} is allowed ({shard.name})",
            file=shard.name,
            tensor=plan.source.name,
            row=rows.start + row,
            column=column,
            error=off,
            allowed=bound,
            **at,
        )
        return False


def _chunks(start: int, stop: int, size: int | None = CHUNK) -> Iterator[tuple[int, int]]:
    """(offset, size) of parts of a range of bytes; with ``size`` None it is one part."""
    step = size or max(1, stop - start)
    for offset in range(start, stop, step):
        yield offset, min(step, stop - offset)


def _blocks(windows: Sequence[RowRange], rows: int) -> Iterator[tuple[RowRange, bool]]:
    """Windows, and the rows between them, in order."""
    at = 0
    for window in windows:
        if window.start > at:
            yield RowRange(at, window.start), False
        yield window, True
        at = window.stop
    if at < rows:
        yield RowRange(at, rows), False


def _first_difference(one: bytearray, other: bytearray) -> int:
    """The first byte in which two runs of bytes differ."""
    first, second = (torch.frombuffer(of, dtype=torch.uint8) for of in (one, other))
    return int((first != second).nonzero()[0])


def _shown(element: bytearray, dtype: str) -> float | str:
    """An element as a number; in hexadecimal where its dtype is not one of numbers."""
    if dtype not in NUMBER_DTYPES:
        return element.hex()
    value = torch.frombuffer(bytearray(element), dtype=NUMBER_DTYPES[dtype])[0].item()
    return float(value) if math.isfinite(value) else str(value)
