"""Verify a GGUF output: its header, its checksum, and sampled rows of every tensor.

- *Structure*: an independent reader parses the header. Tensors (shapes, types, offsets) and key-values must be those of
  the plan. Each tensor follows the one before at the next multiple of the alignment, with zeros between them, and the
  file ends after the last. Key-values that state shapes must fit the tensors and config.json.
- *Rows* of every tensor, touched or not, since the base stores none of them in the same way: a seeded sample, or all
  rows. A row of the source is computed again in float64. Its place in the file follows from the permutation of heads
  and the stacking of parts. `shardmerge.verification.gguf_blocks` states the bound.

The plan decides, as in the merge, which tensor of the file a stored tensor becomes, and how its rows are permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardmerge.destinations.record import RECORD_NAME, Record
from shardmerge.errors import FormatError
from shardmerge.spec.plans import MergePlan
from shardmerge.spec.tensors import SourceFile
from shardmerge.system import json_text
from shardmerge.verification.exact import Exact
from shardmerge.verification.files import check_added, check_files, find_weights
from shardmerge.verification.findings import CHECKSUMS, STRUCTURE, Advanced, Findings
from shardmerge.verification.gguf_header import GgufHeader, contradictions, read_header
from shardmerge.verification.gguf_rows import Piece, RowCheck
from shardmerge.verification.reading import Files, threads
from shardmerge.verification.record import Again, files_of, plan_of_base
from shardmerge.verification.shards import ShardCheck
from shardmerge.verification.structure import Stored, tensor_differences


def check(output: Path, record: Record, again: Again, findings: Findings, rows: int | None, progress: Advanced) -> None:
    """Verify the whole output; problems go to ``findings``. ``rows`` None computes all rows again."""
    check_files(output, record, again.plan, findings)
    _check_file(output, record, again, findings, rows, progress)
    check_added(output, record, findings)


def _check_file(
    output: Path, record: Record, again: Again, findings: Findings, rows: int | None, progress: Advanced
) -> None:
    name, (size, recorded) = next(iter(record.shards.items()))
    file = find_weights(output, name, size, findings)
    if file is None:
        return
    if len(record.shards) > 1:
        findings.problem(STRUCTURE, f"{RECORD_NAME} has several shards, but a GGUF file is one", file=RECORD_NAME)
    if not recorded:
        findings.unverified.append(f"{name}: its checksum was not recorded")
    plan = again.plan or plan_of_base(again, findings)
    with Files([*files_of(again), file]) as files:
        header = _header(name, file, files, findings)
        pieces: list[Piece] = []
        if header is not None:
            check_places(name, file, header, files, findings)
            _check_values(name, header, plan, files, findings)
            if again.plan is not None:
                _check_header(name, file, header, again.plan, files, findings)
            if plan is not None:
                left_out = {*record.targets} if again.plan is None else set()
                pieces = [piece for piece in _pieces(header, plan) if piece.plan.source.name not in left_out]
        total, done = file.size + sum(piece.plan.out.nbytes for piece in pieces), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total, name, 1, 1)

        advance(0)
        exact = None if plan is None else Exact(files, plan, again.adapters)
        with threads(1):
            before = findings.counts[CHECKSUMS]
            ShardCheck(files, None, findings, None).run(Stored(name, file, 0, (), {}), {}, recorded, advance)
            changed = findings.counts[CHECKSUMS] > before
            if plan is not None and exact is not None:
                row_check = RowCheck(files, exact, name, file)
                row_check.run(pieces, rows, findings, advance)
                if changed and rows is not None and set(findings.counts) == {CHECKSUMS}:
                    # Only the checksum is wrong: the change is in a row outside the sample, so search all rows for it.
                    aside = Findings(findings.output, findings.seed)
                    row_check.run(pieces, None, aside, lambda count: None)
                    findings.take(aside)
    if again.plan is None and plan is not None:
        findings.notes.append("what was not merged was compared with the base, as far as it keeps its place and type")


def _header(name: str, file: SourceFile, files: Files, findings: Findings) -> GgufHeader | None:
    try:
        found = read_header(lambda at, size: bytes(files.read(file.uri, at, size)), file.size, name)
    except FormatError as error:
        findings.problem(STRUCTURE, str(error), file=name)
        return None
    findings.tensors += len(found.tensors)
    return found


def _planned(plan: MergePlan) -> GgufHeader:
    shard = plan.shards[0]
    # The reader never looks at data, so zeros will do.
    return read_header(lambda at, size: shard.head[at : at + size].ljust(size, b"\0"), shard.nbytes, "the plan")


def _check_header(
    name: str, file: SourceFile, found: GgufHeader, plan: MergePlan, files: Files, findings: Findings
) -> None:
    head = plan.shards[0].head
    if found.data_start == len(head) and files.read(file.uri, 0, len(head)) == head:
        return
    for text in list(_differences(found, _planned(plan))) or ["its header has the same content in another order"]:
        findings.problem(STRUCTURE, f"{name}: {text}", file=name)


def _differences(found: GgufHeader, wanted: GgufHeader) -> Iterator[str]:
    yield from tensor_differences(found.tensors, wanted.tensors)
    for key in sorted({*found.values, *wanted.values}):
        value, other = found.values.get(key), wanted.values.get(key)
        if value is None or other is None:
            yield f"the key {key} is {'missing' if value is None else 'not expected there'}"
        elif value != other:
            yield f"{key} is {value[1]!s:.60}, expected {other[1]!s:.60}"


def check_places(name: str, file: SourceFile, header: GgufHeader, files: Files, findings: Findings) -> None:
    """Check that tensors follow each other with zeros between them, and that the file ends after the last."""
    end = 0
    for tensor, info in sorted(header.tensors.items(), key=lambda entry: entry[1].data_offsets):
        start, stop = info.data_offsets
        if start != end:
            text = f"{name}: {tensor} begins at {start} of the data, where {end} is expected"
            findings.problem(STRUCTURE, text, file=name, tensor=tensor)
            return
        end = stop + -stop % header.alignment
        at, count = header.data_start + stop, end - stop
        if at + count <= file.size and any(files.read(file.uri, at, count)):
            text = f"{name}: the padding after {tensor} is not zero"
            findings.problem(STRUCTURE, text, file=name, tensor=tensor)
    if header.data_start + end != file.size:
        text = f"{name}: its tensors end at byte {header.data_start + end}, the file at {file.size}"
        findings.problem(STRUCTURE, text, file=name)


def _check_values(name: str, header: GgufHeader, plan: MergePlan | None, files: Files, findings: Findings) -> None:
    config: dict[str, Any] = {}
    if plan is not None:
        source = next(aux.source for aux in plan.aux)
        files.add(source)
        config = json_text.parse_object(files.read(source.uri, 0, source.size))
    for text in contradictions(header, config):
        findings.problem(STRUCTURE, f"{name}: {text}", file=name)


def _pieces(header: GgufHeader, plan: MergePlan) -> list[Piece]:
    """The parts of every tensor, located in the file; tensors of another shape or type than planned are left out."""
    planned = _planned(plan)
    starts = {info.data_offsets[0]: name for name, info in planned.tensors.items()}
    pieces, name = [], ""
    for tensor in plan.shards[0].tensors:
        at = tensor.out.data_offsets[0]
        name = starts.get(at, name)  # else it is another part of the same tensor
        found, wanted = header.tensors.get(name), planned.tensors[name]
        if found is not None and (found.dtype, found.shape) == (wanted.dtype, wanted.shape):
            before = at - wanted.data_offsets[0]
            first_row = before // tensor.write_row
            pieces.append(Piece(name, header.data_start + found.data_offsets[0] + before, first_row, tensor))
    return pieces
