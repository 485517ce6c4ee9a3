"""Rows of a GGUF file's tensors: where they are stored, and whether they are what base and adapter make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.codecs.registry import encoder
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Encoding, RowRange, SourceFile
from shardmerge.verification.exact import Exact, is_copied
from shardmerge.verification.findings import TOUCHED, UNTOUCHED, Findings
from shardmerge.verification.gguf_blocks import VALUE, Numbers, between, compare
from shardmerge.verification.reading import Files
from shardmerge.verification.rounding import is_stochastic
from shardmerge.verification.rows import all_rows, sampled

#: Of what is made of the config alone, and is in float32 everywhere.
_PLAIN = Encoding("F32")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor of the file that are made of one source.

    ``start`` is where they begin in the file, ``first_row`` which rows of the tensor they are.
    """

    name: str
    start: int
    first_row: int
    plan: TensorPlan


class RowCheck:
    """Looks at rows of one part of a tensor after the other."""

    def __init__(self, files: Files, exact: Exact, name: str, file: SourceFile) -> None:
        self._files = files
        self._exact = exact
        self._name = name
        self._file = file
        self._findings = Findings("", 0)

    def run(
        self, pieces: Sequence[Piece], rows: int | None, findings: Findings, advance: Callable[[int], None]
    ) -> None:
        """``rows`` None looks at all."""
        self._findings = findings
        touched: set[str] = set()
        for piece in pieces:
            if piece.start + piece.plan.out.nbytes <= self._file.size:  # else the file is too short, which is reported
                self._piece(piece, rows)
            advance(piece.plan.out.nbytes)
            touched |= set() if is_copied(piece.plan) else {piece.name}
        findings.touched += len(touched)
        findings.untouched += len({piece.name for piece in pieces} - touched)

    def _piece(self, piece: Piece, count: int | None) -> None:
        plan, findings = piece.plan, self._findings
        windows = all_rows(plan) if count is None else sampled(plan, count, findings.seed)
        # What has to see a whole tensor sees all of it, also where the file holds a part.
        self._exact.begin(dataclasses.replace(plan, part=None))
        looked = sum(map(len, windows))
        if is_copied(plan):
            findings.untouched_bytes += looked * plan.write_row
        else:
            findings.rows += looked
            findings.all_rows += plan.rows
        for rows in windows:
            if not self._window(piece, rows):
                return

    def _window(self, piece: Piece, rows: RowRange) -> bool:
        plan = piece.plan
        places = _places(plan, rows)
        through = encoder(plan).rounds_to(plan)
        addend = (plan.encoding or _PLAIN).setting("addend", 0.0)
        stochastic = is_stochastic(plan, self._exact.compute_dtype, through)
        ends = between(*self._exact.rows(rows), through, addend, stochastic)
        found = compare(self._read(piece, places), plan.out.dtype, *ends)
        return all(self._agree(piece, places, numbers) for numbers in found)

    def _read(self, piece: Piece, places: Tensor) -> Tensor:
        """Rows of the file, in bytes (rows, bytes of a row). Those in between are read, too: there are few."""
        width = piece.plan.write_row
        first, last = int(places.min()), int(places.max())
        data = self._files.read(self._file.uri, piece.start + first * width, (last + 1 - first) * width)
        return torch.frombuffer(data, dtype=torch.uint8).view(-1, width)[places - first]

    def _agree(self, piece: Piece, places: Tensor, numbers: Numbers) -> bool:
        """Whether all are within what is allowed; says where they are not."""
        found, least, largest = numbers.found, numbers.least, numbers.largest
        right = ((least <= found) & (found <= largest)) | (found.isnan() & least.isnan())
        middle, allowed = (least + largest) / 2, (largest - least) / 2
        error = (found - middle).abs()
        if bool(right.all()):
            # Of a block; of other types there is but one number, or two neighbours, of which either is as right.
            if numbers.what == VALUE and numbers.of_blocks and not is_copied(piece.plan):
                worst = float(torch.where(allowed > 0, error / allowed, 0.0).max())
                if worst > self._findings.worst:
                    self._findings.worst, self._findings.worst_tensor = worst, piece.name
            return True
        index, column = (int(of) for of in (~right).nonzero()[0])
        row, column = piece.first_row + int(places[index]), column * numbers.step
        holds, wanted, off, bound = (
            float(of.flatten()[int((~right).flatten().nonzero()[0])]) for of in (found, middle, error, allowed)
        )
        copied = is_copied(piece.plan)
        which = f"column {column}" if numbers.step == 1 else f"columns {column} to {column + numbers.step - 1}"
        maker = "base and adapter make" if piece.plan.updates else "the base makes"
        self._findings.problem(
            UNTOUCHED if copied else TOUCHED,
            f"{piece.name}, row {row}, {which}: the {numbers.what} is {holds:.9g}, {maker} {wanted:.9g} of "
            f"{piece.plan.source.name}; that is off by {off:.3g}, where {bound:.3g} is allowed ({self._name})",
            file=self._name,
            tensor=piece.name,
            row=row,
            column=column,
            found=holds,
            expected=wanted,
            error=off,
            allowed=bound,
        )
        return False


def _places(plan: TensorPlan, rows: RowRange) -> Tensor:
    """Rows of the source → those of the piece. Seen as (g, a, b), the source's are the file's seen as (g, b, a)."""
    index = torch.arange(rows.start, rows.stop) - plan.first_row
    shuffle = (plan.encoding or _PLAIN).setting("shuffle")
    if shuffle is None:
        return index
    a, b = int(shuffle[1]), int(shuffle[2])
    return index // (a * b) * (a * b) + index % b * a + index // b % a
