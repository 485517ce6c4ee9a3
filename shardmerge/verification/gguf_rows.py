"""Compare rows of a GGUF file's tensors with what base and adapter make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardmerge.codecs.registry import encoder
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Encoding, RowRange, SourceFile
from shardmerge.verification.decoders import is_stochastic
from shardmerge.verification.exact import Exact, is_copied
from shardmerge.verification.findings import TOUCHED, UNTOUCHED, Findings, Problem
from shardmerge.verification.gguf_blocks import VALUE, Numbers, between, compare
from shardmerge.verification.reading import Files
from shardmerge.verification.rows import all_rows, sampled

#: The encoding of tensors that are made from the config alone, as float32.
_PLAIN = Encoding("F32")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor of the file that are made from one source.

    ``start`` is their offset in the file, ``first_row`` the first of them in the tensor.
    """

    name: str
    start: int
    first_row: int
    plan: TensorPlan


class RowCheck:
    """Verify pieces of tensors, one after the other."""

    def __init__(self, files: Files, exact: Exact, name: str, file: SourceFile) -> None:
        self._files = files
        self._exact = exact
        self._name = name
        self._file = file
        self._findings = Findings("", 0)

    def run(
        self, pieces: Sequence[Piece], rows: int | None, findings: Findings, advance: Callable[[int], None]
    ) -> None:
        """Verify ``rows`` rows of each piece, or all if None."""
        self._findings = findings
        touched: set[str] = set()
        for piece in pieces:
            if piece.start + piece.plan.out.nbytes <= self._file.size:  # a shorter file is reported elsewhere
                self._piece(piece, rows)
            advance(piece.plan.out.nbytes)
            touched |= set() if is_copied(piece.plan) else {piece.name}
        findings.touched += len(touched)
        findings.untouched += len({piece.name for piece in pieces} - touched)

    def _piece(self, piece: Piece, count: int | None) -> None:
        plan, findings = piece.plan, self._findings
        windows = all_rows(plan) if count is None else sampled(plan, count, findings.seed)
        # A prepass sees the whole tensor, also where the piece is a part of it.
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
        """Rows of the file as bytes, (rows, bytes of a row). The few rows between them are read too."""
        width = piece.plan.write_row
        first, last = int(places.min()), int(places.max())
        data = self._files.read(self._file.uri, piece.start + first * width, (last + 1 - first) * width)
        return torch.frombuffer(data, dtype=torch.uint8).view(-1, width)[places - first]

    def _agree(self, piece: Piece, places: Tensor, numbers: Numbers) -> bool:
        """Whether all numbers are allowed; the first that is not is reported."""
        found, least, largest = numbers.found, numbers.least, numbers.largest
        right = ((least <= found) & (found <= largest)) | (found.isnan() & least.isnan())
        middle, allowed = (least + largest) / 2, (largest - least) / 2
        error = (found - middle).abs()
        if bool(right.all()):
            # Only blocks have a range of allowed values; other types have one number, or two neighbours.
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
        maker = "base and adapter make" if piece.plan.updates else "the base makes"
        text = f"the {numbers.what} is {holds:.9g}, {maker} {wanted:.9g} of {piece.plan.source.name}"
        place = (self._name, piece.name, row, column)
        columns = "" if numbers.step == 1 else f"columns {column} to {column + numbers.step - 1}"
        kind = UNTOUCHED if is_copied(piece.plan) else TOUCHED
        self._findings.wrong_value(Problem(kind, text, *place, holds, wanted, off, bound), columns)
        return False


def _places(plan: TensorPlan, rows: RowRange) -> Tensor:
    """Rows of the source → rows of the piece. The source's, viewed as (g, a, b), are the file's as (g, b, a)."""
    index = torch.arange(rows.start, rows.stop) - plan.first_row
    shuffle = (plan.encoding or _PLAIN).setting("shuffle")
    if shuffle is None:
        return index
    a, b = int(shuffle[1]), int(shuffle[2])
    return index // (a * b) * (a * b) + index % b * a + index // b % a
