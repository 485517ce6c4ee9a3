"""Verify a shard of the output in one pass: its checksum, and the bytes or the rows of every tensor.

The file is read once, from its first byte to its last. An untouched tensor is compared with the bytes of the base. The
sampled rows of a touched tensor are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardmerge.codecs.registry import encoder
from shardmerge.codecs.rounding import NUMBER_DTYPES, half_unit
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import DTYPE_BITS, RowRange, TensorInfo
from shardmerge.system.checksums import Checksums
from shardmerge.verification.decoders import bound_of, is_stochastic, numbers, output_of, rounded
from shardmerge.verification.exact import Exact, is_copied
from shardmerge.verification.findings import CHECKSUMS, TOUCHED, UNTOUCHED, Findings, Problem
from shardmerge.verification.reading import CHUNK, Files, StoredWeight, decode, wide
from shardmerge.verification.rows import all_rows, sampled
from shardmerge.verification.structure import Stored

Advance = Callable[[int], None]


class ShardCheck:
    """Verify one shard after the other. With ``rows`` None, all rows are computed again."""

    def __init__(self, files: Files, exact: Exact | None, findings: Findings, rows: int | None) -> None:
        self._files = files
        self._exact = exact
        self._findings = findings
        self._rows = rows
        self._buffers = bytearray(CHUNK), bytearray(CHUNK)

    def run(
        self, shard: Stored, plans: Mapping[str, TensorPlan], recorded: Mapping[str, str], advance: Advance
    ) -> None:
        """Verify a shard.

        ``plans`` say what its tensors must be, by name; of others only the checksum is compared. ``recorded`` are the
        shard's checksums by kind, empty where none were recorded. ``advance`` receives the bytes done.
        """
        before = sum(self._findings.counts.values())
        if self._pass(shard, plans, recorded, advance) or sum(self._findings.counts.values()) > before + 1:
            return
        if self._rows is not None and self._exact is not None:
            # Only the checksum is wrong: the change is in a row outside the sample, so search all rows for it.
            aside = Findings(self._findings.output, self._findings.seed)
            ShardCheck(self._files, self._exact, aside, None)._pass(shard, plans, {}, lambda count: None)
            self._findings.take(aside)

    def _pass(
        self, shard: Stored, plans: Mapping[str, TensorPlan], recorded: Mapping[str, str], advance: Advance
    ) -> bool:
        """Whether the checksums are those recorded, or none are."""
        checksums = Checksums("sha256" in recorded)
        for offset, size in _chunks(0, shard.data_start):
            self._read(shard, offset, size, checksums)
        end = 0
        for name, info in shard.tensors.items():
            self._tensor(shard, info, plans.get(name), checksums, advance)
            end = info.data_offsets[1]
        for offset, size in _chunks(shard.data_start + end, shard.file.size):
            self._read(shard, offset, size, checksums)
            advance(size)
        if recorded:
            self._findings.checksums += 1
            self._findings.checksum_bytes += shard.file.size
        found = checksums.hex()
        wrong = next((kind for kind, value in recorded.items() if found.get(kind) != value), None)
        if wrong is not None:
            self._findings.problem(
                CHECKSUMS,
                f"{shard.name}: its {wrong} is {found.get(wrong)}, but {recorded[wrong]} was recorded: the file has "
                "changed since the merge",
                file=shard.name,
                found=found.get(wrong),
                expected=recorded[wrong],
            )
        return wrong is None

    def _read(self, shard: Stored, offset: int, size: int, checksums: Checksums) -> bytearray:
        """Read the next bytes of the file, and add them to its checksums."""
        data = self._buffers[0] if size == CHUNK else bytearray(size)
        self._files.get(shard.file.uri).read_into(offset, memoryview(data))
        checksums.update(memoryview(data))
        return data

    def _tensor(
        self, shard: Stored, info: TensorInfo, plan: TensorPlan | None, checksums: Checksums, advance: Advance
    ) -> None:
        start, stop = (shard.data_start + offset for offset in info.data_offsets)
        copied = None if plan is None or not is_copied(plan) else plan
        if plan is not None and copied is None and self._exact is not None:
            self._touched(shard, plan, start, self._exact, checksums, advance)
            return
        if copied is not None:
            self._findings.untouched += 1
            self._findings.untouched_bytes += info.nbytes
        wrong = False
        for offset, size in _chunks(start, stop):
            data = self._read(shard, offset, size, checksums)
            if copied is not None and not wrong:
                wrong = self._differs(shard, copied, offset - start, data)
            advance(size)

    def _differs(self, shard: Stored, plan: TensorPlan, at: int, data: bytearray) -> bool:
        """Report the first byte of ``data``, at byte ``at`` of an untouched tensor, that is not the source's."""
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
            # torch rounds float64 to 16 bits in two steps, through float32; the merge rounds once.
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
        text = f"holds {found}, {owner} is {wanted}"
        self._findings.wrong_value(Problem(UNTOUCHED, text, shard.name, source.name, row, column, found, wanted))
        return True

    def _unlike(self, plan: TensorPlan, found: bytearray, expected: bytearray, stored: Tensor) -> Tensor:
        """Which numbers are not the source's rounded to the output's dtype."""
        numbers, nearest = (decode(of, plan.out.dtype, 1) for of in (found, expected))
        like = (numbers == nearest) | (numbers.isnan() & nearest.isnan())
        if self._is_stochastic(plan):  # both neighbours are correct
            exact = stored.double()
            like |= (numbers.double() - exact).abs() <= self._rounding(plan, exact.abs())
        return ~like

    def _is_stochastic(self, plan: TensorPlan) -> bool:
        return self._exact is not None and is_stochastic(plan, self._exact.compute_dtype, plan.out.dtype)

    def _rounding(self, plan: TensorPlan, magnitude: Tensor) -> Tensor:
        """The most that one rounding moves: half a unit in the last place, or a whole one if stochastic."""
        half = half_unit(magnitude, plan.out.dtype)
        return half.mul_(2) if self._is_stochastic(plan) else half

    def _touched(
        self, shard: Stored, plan: TensorPlan, start: int, exact: Exact, checksums: Checksums, advance: Advance
    ) -> None:
        findings = self._findings
        together = encoder(plan).row_unit(plan.encoding) if plan.encoding else 1
        windows = all_rows(plan, together) if self._rows is None else sampled(plan, self._rows, findings.seed, together)
        is_plain = encoder(plan).is_plain  # its numbers are in the bytes of this pass
        stored = output_of(plan, shard.file, shard.data_start, shard.tensors)
        exact.begin(plan)
        findings.touched += 1
        findings.rows += sum(map(len, windows))
        findings.all_rows += plan.rows
        row_bytes = plan.write_row
        wrong = stored is None  # a missing part is already reported from the header
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

    def _finite(self, shard: Stored, plan: TensorPlan, data: bytearray, at: int) -> bool:
        """Whether the elements from ``at`` on are finite, or infinities that the base holds too."""
        values = decode(data, plan.out.dtype, 1)
        # The sum is the cheapest test, but finite numbers may have an infinite sum.
        if math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all()):
            return True
        wrong = ~torch.isfinite(values) & ~self._of_the_base(plan, values, at)
        if not bool(wrong.any()):
            return True
        index = int(wrong.nonzero()[0][0])
        row, column = divmod(at + index, plan.row_elements)
        value = float(values[index])
        problem = Problem(TOUCHED, f"holds {value}", shard.name, plan.source.name, row, column, str(value))
        self._findings.wrong_value(problem)
        return False

    def _of_the_base(self, plan: TensorPlan, values: Tensor, at: int) -> Tensor:
        """Which elements, from ``at`` on, are infinities that the base holds at the same place."""
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
        shard: Stored,
        stored: StoredWeight,
        plan: TensorPlan,
        rows: RowRange,
        found: Tensor,
        value: Tensor,
        error: Tensor,
    ) -> bool:
        """Whether rows as found are W' within what is allowed; the first value that is not is reported."""
        extreme = value + error * value.sign()
        if encoder(plan).is_plain:
            allowed = self._rounding(plan, extreme.abs()) + error
        else:
            allowed = bound_of(self._files, stored, extreme, rows) + error
        difference = (found - value).abs()
        # The difference of two equal infinities is NaN.
        ratio = torch.where(found == value, 0.0, difference / allowed)
        worst = int(ratio.argmax()) if ratio.numel() else 0
        largest = float(ratio.flatten()[worst]) if ratio.numel() else 0.0
        if largest <= 1.0:
            if largest > self._findings.worst:
                self._findings.worst, self._findings.worst_tensor = largest, plan.source.name
            return True
        first = int((~(ratio <= 1.0)).flatten().nonzero()[0])
        row, column = divmod(first, plan.row_elements)
        holds, wanted, off, bound = (float(of[row, column]) for of in (found, value, difference, allowed))
        text = f"holds {holds:.9g}, base and adapter make {wanted:.9g} of it"
        place = (shard.name, plan.source.name, rows.start + row, column)
        self._findings.wrong_value(Problem(TOUCHED, text, *place, holds, wanted, off, bound))
        return False


def _chunks(start: int, stop: int, size: int | None = CHUNK) -> Iterator[tuple[int, int]]:
    """(offset, size) of parts of a range of bytes; one part with ``size`` None."""
    step = size or max(1, stop - start)
    for offset in range(start, stop, step):
        yield offset, min(step, stop - offset)


def _blocks(windows: Sequence[RowRange], rows: int) -> Iterator[tuple[RowRange, bool]]:
    """The windows and the rows between them, in order, each with whether it is a window."""
    at = 0
    for window in windows:
        if window.start > at:
            yield RowRange(at, window.start), False
        yield window, True
        at = window.stop
    if at < rows:
        yield RowRange(at, rows), False


def _first_difference(one: bytearray, other: bytearray) -> int:
    first, second = (torch.frombuffer(of, dtype=torch.uint8) for of in (one, other))
    return int((first != second).nonzero()[0])


def _shown(element: bytearray, dtype: str) -> float | str:
    """An element as a number, or in hexadecimal where torch has no such dtype."""
    if dtype not in NUMBER_DTYPES:
        return element.hex()
    value = torch.frombuffer(bytearray(element), dtype=NUMBER_DTYPES[dtype])[0].item()
    return float(value) if math.isfinite(value) else str(value)
