"""The report of a merge, and its tables: sizes, and how much of the updates the rounding kept."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.codecs import ggml
from shardmerge.reporting.text import human_bytes, human_seconds, notices, table
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import MergePlan, jsonable
from shardmerge.spec.receipts import Fidelity, Receipt
from shardmerge.spec.tensors import DTYPE_NAMES, tensor_nbytes
from shardmerge.spec.words import EXPORT, MERGE

#: Formats of the size table: dtypes of a checkpoint, and quantisations of a GGUF file.
_PLAIN = {"F32": "float32", "BF16": "bfloat16"}
_QUANTIZED = ("Q8_0", "Q4_0")
#: Below this share of the update kept, there is a warning.
_TOO_LITTLE = 0.5


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The report of a merge. ``seconds`` is wall time; ``peak_memory_bytes`` is the process's maximum.

    ``working_set_bytes`` is the memory that the merge added to what was resident before it, to compare with the plan's;
    None where an earlier maximum of the process hides it. Where shards of an earlier run were kept, ``bytes_read`` and
    ``bytes_written`` are of this run alone, without reading those shards to check them.
    """

    output: str
    files: tuple[str, ...]
    targets: int
    adapter_bytes: int
    base_bytes: int
    merged_bytes: int
    merged_dtype: str
    bytes_read: int
    bytes_written: int
    shards_reused: int
    seconds: float
    peak_memory_bytes: int
    working_set_bytes: int | None
    #: Bytes of the merged weights in other formats.
    sizes_bytes: Mapping[str, int]
    #: How much of the updates the rounding kept, by kind of module; see `shardmerge.execution.fidelity`.
    fidelity: Mapping[str, Fidelity]
    warnings: tuple[str, ...]
    #: ``"merge"``, or ``"export"`` where there was no adapter.
    kind: str = "merge"

    def to_json(self) -> dict[str, Any]:
        """Three keys also have an older name, without the unit."""
        result: dict[str, Any] = jsonable(self)
        result |= {name: result[f"{name}_bytes"] for name in ("peak_memory", "working_set", "sizes")}
        result["fidelity"] = {kind: fidelity_json(of) for kind, of in self.fidelity.items()}
        result["notices"] = notices(self.warnings)
        return result


def merged_dtype(plan: MergePlan) -> str:
    """The dtype of most of the output's bytes."""
    sizes: Counter[str] = Counter()
    for dtype, _, nbytes, count in plan.totals.kinds:
        sizes[dtype] += count * nbytes
    code = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "F32"
    return DTYPE_NAMES.get(code, code.lower())


def sizes_by_format(plan: MergePlan) -> dict[str, int]:
    """Bytes of the merged weights in common formats, without headers.

    In a GGUF quantisation, matrices whose rows are not whole blocks are float16, and vectors float32.
    """
    shapes = [(shape, count) for _, shape, _, count in plan.totals.kinds]
    sizes = {name: sum(count * tensor_nbytes(code, shape) for shape, count in shapes) for code, name in _PLAIN.items()}
    return sizes | {
        kind.lower(): sum(count * ggml.size_in(kind, shape) for shape, count in shapes) for kind in _QUANTIZED
    }


def fidelity_by_kind(receipts: Iterable[Receipt]) -> dict[str, Fidelity]:
    """Sums over all tensors whose names end alike."""
    result: dict[str, Fidelity] = {}
    for receipt in receipts:
        for name, of in receipt.fidelity.items():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            result[kind] = result[kind] + of if kind in result else of
    return result


def fidelity_warnings(plan: MergePlan, by_kind: Mapping[str, Fidelity]) -> list[str]:
    """A warning where the rounding lost more than half of the update of a kind of modules."""
    kept = sorted((of.share_kept, kind) for kind, of in by_kind.items() if of.share_kept < _TOO_LITTLE)
    if not kept:
        return []
    shares = ", ".join(f"{1 - share:.0%} of that of {kind}" for share, kind in kept)
    of, keeps = merged_dtype(plan), "output.dtype: float32"
    if plan.config["output"]["quantized"] == "same":
        of, keeps = "the base's own codes", "output.quantized: mixed"
    return [
        Warned(
            f"much of the update is below the resolution of {of} and was lost to rounding: {shares}. {keeps} keeps it; "
            "output.rounding: stochastic keeps it on average"
        )
    ]


def size_table(report: MergeReport) -> str:
    """A table of sizes, time, peak memory, and the share of the update that the rounding kept."""
    is_export = report.kind == EXPORT.noun
    rows = [
        *([] if is_export else [("adapter", human_bytes(report.adapter_bytes))]),
        ("model" if is_export else "base", human_bytes(report.base_bytes)),
        (f"{(EXPORT if is_export else MERGE).done} ({report.merged_dtype})", human_bytes(report.merged_bytes)),
        *(
            (f"  as {name}", human_bytes(size))
            for name, size in report.sizes_bytes.items()
            if name != report.merged_dtype
        ),
        ("time", human_seconds(report.seconds)),
        ("peak memory", human_bytes(report.peak_memory_bytes)),
    ]
    if report.fidelity:
        whole = functools.reduce(operator.add, report.fidelity.values())
        rows.append(("update kept", f"{whole.share_kept:.1%}"))
    return table(rows, right=(1,))


def fidelity_json(of: Fidelity) -> dict[str, float]:
    """The figures with four digits; a sample is not more precise."""
    names = ("relative_update", "share_kept", "share_unchanged")
    return {name: float(f"{getattr(of, name):.4g}") for name in names}
