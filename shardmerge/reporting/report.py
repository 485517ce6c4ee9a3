"""Say what will happen and what has happened: the plan's table, the merge's record, the table of sizes."""

from __future__ import annotations

import functools
import math
import operator
import resource
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.adapters.registry import FAMILIES
from shardmerge.spec import (
    BLOCKS,
    DTYPE_NAMES,
    Fidelity,
    MergePlan,
    Receipt,
    TensorPlan,
    Update,
    jsonable,
    row_nbytes,
    tensor_nbytes,
)
from shardmerge.spec.notices import Warned, severity
from shardmerge.spec.words import EXPORT, MERGE
from shardmerge.system.aligned_memory import resident
from shardmerge.system.terminal_text import one_line
from shardmerge.version import __version__

#: Formats of the size table: dtypes of a checkpoint, and quantisations of a GGUF file.
_PLAIN = {"F32": "float32", "BF16": "bfloat16"}
_QUANTIZED = ("Q8_0", "Q4_0")
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. Sizes are bytes; ``seconds`` is wall time; ``peak_memory`` is the process's maximum.

    ``working_set`` is what the merge took above what was resident before it, to compare with the plan's; None where an
    earlier maximum of the process hides it. Where shards of an earlier run were taken up, ``bytes_read``,
    ``bytes_written`` and ``seconds`` are of this run alone; that it has read those shards to check them is not counted.
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
    peak_memory: int
    working_set: int | None
    #: What the merged weights would take in other formats, in bytes.
    sizes: Mapping[str, int]
    #: How the updates came through the rounding, by kind of module; see `shardmerge.execution.fidelity`.
    fidelity: Mapping[str, Fidelity]
    warnings: tuple[str, ...]
    #: ``"merge"``, or ``"export"`` where there was no adapter.
    kind: str = "merge"

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = jsonable(self)
        result["fidelity"] = {kind: fidelity_json(of) for kind, of in self.fidelity.items()}
        result["notices"] = notices(self.warnings)
        return result


def peak_memory() -> int:
    """The most memory this process has had resident, in bytes."""
    # getrusage would do, but on Linux a child starts with its parent's maximum.
    if (peak := _status("VmHWM")) is not None:
        return peak
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


class WorkingSet:
    """Measures what a merge takes, buffers included, above the interpreter with all modules in it."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        """``buffers`` are as `shardmerge.system.aligned_memory.pages` makes them."""
        self._buffers = buffers
        self._peak = peak_memory()
        self.begin()

    def begin(self) -> None:
        """Measure from what is resident now, without the buffers, which are in use already."""
        filled, now = -1, self._filled()
        while now != filled:  # another thread may be reading into them, but not for ever
            filled, whole = now, _status("VmRSS")
            now = self._filled()
        self._resident = None if whole is None else whole - filled

    def _filled(self) -> int:
        return sum(map(resident, self._buffers))

    def grown(self) -> int | None:
        """The most that was resident above what was at the beginning; None where that cannot be told."""
        peak = peak_memory()
        return None if self._resident is None or peak <= self._peak else peak - self._resident


def _status(name: str) -> int | None:
    """Bytes by name from what Linux tells of this process; None elsewhere."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


# --- text -------------------------------------------------------------------------------------------------------------


def human_bytes(count: float) -> str:
    """``"269.1 MB"``, in powers of 1000 like the Hub and ``ls --si``."""
    unit = 0
    while abs(count) >= 999.95 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def human_seconds(seconds: float) -> str:
    """``"7.3 s"`` or ``"3 min 20 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns padded with spaces; those in ``right`` are aligned to the right."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = set(right)
    lines = (
        "  ".join(
            cell.rjust(width) if column in to_the_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def labelled(notice: str) -> str:
    """The line for a warning or a note."""
    return f"{severity(notice)}: {one_line(notice)}"


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def changing_updates(plan: MergePlan) -> Iterator[tuple[TensorPlan, Update]]:
    """The updates that alter weights."""
    return ((tensor, update) for tensor, update in plan.updates() if FAMILIES[update.family].changes_weight)


def target_rows(plan: MergePlan) -> list[dict[str, Any]]:
    """Targets by kind of module: the last part of its name, with shape, rank, scaling, family and adapter.

    ``scaling`` is empty where the family does not add, and ``rank`` 0 where it has none.
    """
    groups: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for _, update in changing_updates(plan):
        kind = update.module.rpartition(".")[2] + ("" if update.parameter == "weight" else f".{update.parameter}")
        # A module of experts may be stored as many tensors.
        groups[kind, update.shape, update.family, update.rank, update.adapter][update.module] = update.scaling
    return [
        {
            "module": kind,
            "count": len(modules),
            "shape": list(shape),
            "family": family,
            "rank": rank,
            "scaling": sorted(set(modules.values())) if FAMILIES[family].adds else [],
            "adapter": adapter,
        }
        for (kind, shape, family, rank, adapter), modules in groups.items()
    ]


def describe_plan(plan: MergePlan) -> str:
    """The plan as a person reads it."""
    parts = [_describe_sources(plan), _describe_targets(plan), _describe_output(plan)]
    if plan.warnings:
        parts.append("\n".join(map(labelled, plan.warnings)))
    return "\n\n".join(parts)


def _at(location: str, revision: str | None) -> str:
    return f"{location}@{revision}" if revision else location


def _describe_sources(plan: MergePlan) -> str:
    base = plan.base
    rows = [
        (
            "base",
            _at(base.location, base.revision),
            f"{human_bytes(base.nbytes)}, {base.shards} shards, {base.tensors} tensors",
        )
    ]
    for info in plan.adapters:
        weight = "" if info.weight == 1 else f", weight {info.weight:g}"
        what = f"{human_bytes(info.nbytes)}, {info.family} ({info.format}), {info.tensors} tensors{weight}"
        rows.append(("adapter", _at(info.location, info.revision), what))
    return table(rows)


def _describe_targets(plan: MergePlan) -> str:
    several = len(plan.adapters) > 1
    rows = [("targets", "count", "shape", "update", "rank", "scaling", *(("adapter",) if several else ()))]
    found = target_rows(plan)
    for row in found:
        scaling = ", ".join(f"{value:.6g}" for value in row["scaling"])
        adapter = (str(row["adapter"] + 1),) if several else ()
        rank = str(row["rank"] or "")
        rows.append((row["module"], str(row["count"]), _shape(row["shape"]), row["family"], rank, scaling, *adapter))
    text = table(rows, right=(1, 4))
    if several:
        text += "\nweights that several adapters update get them in this order, and are rounded once"
    if several and (bound := sorted({row["family"] for row in found if not FAMILIES[row["family"]].adds})):
        text += f"\nthe order matters: {', '.join(bound)} changes what the adapters before it have made of a weight"
    scalings = sorted({value for row in found for value in row["scaling"]})
    return f"{text}\nscalings: {', '.join(f'{value:.6g}' for value in scalings)}" if scalings else text


def _describe_output(plan: MergePlan) -> str:
    memory = plan.memory
    shards = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} shards"
    rows = [
        ("output", plan.output),
        ("", f"{shards}, dtype {merged_dtype(plan)}, {len(plan.aux)} other files"),
        ("reads", human_bytes(plan.bytes_read)),
        ("writes", human_bytes(plan.bytes_written)),
        ("computes in", f"{plan.compute_dtype} on {'cpu' if plan.compute_device == 'auto' else plan.compute_device}"),
        ("memory", f"{human_bytes(memory.total)} above the interpreter with torch and this plan in it"),
    ]
    return table(rows)


def merged_dtype(plan: MergePlan) -> str:
    """The dtype most of the output's bytes are in."""
    sizes: dict[str, int] = defaultdict(int)
    for shard in plan.shards:
        for tensor in shard.tensors:
            sizes[tensor.out.dtype] += tensor.out.nbytes
    code = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "F32"
    return DTYPE_NAMES.get(code, code.lower())


def next_steps(plan: MergePlan) -> str:
    """What to run now, where the output is not simply loaded."""
    if not plan.is_gguf:
        return ""
    name = shlex.quote(Path(plan.output).name.lower())
    return (
        f"\n\nwith Ollama:\n  cd {shlex.quote(plan.output)} && ollama create {name} -f Modelfile\n  ollama run {name}"
    )


def sizes_by_format(plan: MergePlan) -> dict[str, int]:
    """Bytes of the merged weights in formats that people choose between, headers left out.

    Of a GGUF quantisation: matrices whose rows are whole blocks in it, others in float16, vectors in float32.
    """
    shapes = [tensor.out.shape for shard in plan.shards for tensor in shard.tensors]
    sizes = {name: sum(tensor_nbytes(code, shape) for shape in shapes) for code, name in _PLAIN.items()}
    for kind in _QUANTIZED:
        block = BLOCKS[kind][0]
        sizes[kind.lower()] = sum(
            tensor_nbytes("F32", shape)
            if len(shape) < 2
            else row_nbytes(kind if shape[-1] % block == 0 else "F16", math.prod(shape))
            for shape in shapes
        )
    return sizes


#: Less than this of an update left is worth a warning: what is merged is hardly what was trained.
_TOO_LITTLE = 0.5


def fidelity_by_kind(receipts: Iterable[Receipt]) -> dict[str, Fidelity]:
    """Sums over all tensors whose names end alike."""
    result: dict[str, Fidelity] = {}
    for receipt in receipts:
        for name, of in receipt.fidelity.items():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            result[kind] = result[kind] + of if kind in result else of
    return result


def fidelity_warnings(plan: MergePlan, by_kind: Mapping[str, Fidelity]) -> list[str]:
    """Where the output's dtype cannot tell most of an update from nothing."""
    kept = sorted((of.share_kept, kind) for kind, of in by_kind.items() if of.share_kept < _TOO_LITTLE)
    if not kept:
        return []
    shares = ", ".join(f"{1 - share:.0%} of that of {kind}" for share, kind in kept)
    return [
        Warned(
            f"much of the update is below the resolution of {merged_dtype(plan)} and was lost to rounding: {shares}. "
            "output.dtype: float32 keeps it; output.rounding: stochastic keeps it on average"
        )
    ]


def size_table(report: MergeReport) -> str:
    """Adapter, base, merged, time, peak memory, and how much of the update the rounding kept."""
    rows = [
        *([] if report.kind == EXPORT.noun else [("adapter", human_bytes(report.adapter_bytes))]),
        ("model" if report.kind == EXPORT.noun else "base", human_bytes(report.base_bytes)),
        (
            f"{EXPORT.done if report.kind == EXPORT.noun else MERGE.done} ({report.merged_dtype})",
            human_bytes(report.merged_bytes),
        ),
        *((f"  as {name}", human_bytes(size)) for name, size in report.sizes.items() if name != report.merged_dtype),
        ("time", human_seconds(report.seconds)),
        ("peak memory", human_bytes(report.peak_memory)),
    ]
    if report.fidelity:
        whole = functools.reduce(operator.add, report.fidelity.values())
        rows.append(("update kept", f"{whole.share_kept:.1%}"))
    return table(rows, right=(1,))


# --- data -------------------------------------------------------------------------------------------------------------


def fidelity_json(of: Fidelity) -> dict[str, float]:
    """Four digits of each, which is what a sample is good for."""
    figures = {
        "relative_update": of.relative_update,
        "share_kept": of.share_kept,
        "share_unchanged": of.share_unchanged,
    }
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def plan_summary(plan: MergePlan) -> dict[str, Any]:
    """The plan as JSON, without a line for every tensor.

    ``digest`` is that of all that the output's bytes depend on, as far as headers tell it: plans with the same make the
    same. (A record's digest has seen the adapters' bytes, too, and so is another.)
    """
    targets = target_rows(plan)
    return {
        "base": jsonable(plan.base),
        "adapters": jsonable(plan.adapters),
        "output": plan.output,
        "output_dtype": merged_dtype(plan),
        "compute": {"dtype": plan.compute_dtype, "device": plan.compute_device},
        "targets": targets,
        "scalings": sorted({value for row in targets for value in row["scaling"]}),
        "shards": [{"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.tensors)} for shard in plan.shards],
        "index": plan.index_name,
        "aux": [aux.name for aux in plan.aux],
        "memory": {**jsonable(plan.memory), "total": plan.memory.total},
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "warnings": list(plan.warnings),
        "notices": notices(plan.warnings),
        "digest": plan.digest,
    }


def notices(warnings: Sequence[str]) -> list[dict[str, str]]:
    """The same texts, each with its severity: ``warning`` or ``note``."""
    return [{"severity": severity(text), "text": text} for text in warnings]


def record(
    plan: MergePlan, report: MergeReport, receipts: Sequence[Receipt], digest: str, torch_version: str
) -> dict[str, Any]:
    """What ``shardmerge.json`` in the output says.

    ``digest`` is that of base, adapters and config, the adapters' bytes in it. The checksums are of whole files.
    """
    return {
        "shardmerge": __version__,
        "torch": torch_version,
        "python": sys.version.split()[0],
        "platform": sys.platform,
        "config": jsonable(plan.config),
        "digest": digest,
        "base": jsonable(plan.base),
        "adapters": jsonable(plan.adapters),
        "targets": {
            tensor.source.name: [
                {
                    "adapter": update.adapter,
                    "module": f"{update.module}.{update.parameter}",
                    "family": update.family,
                    "rank": update.rank,
                    "scaling": update.scaling,
                }
                for update in tensor.updates
            ]
            for shard in plan.shards
            for tensor in shard.tensors
            if tensor.updates
        },
        "shards": {receipt.shard: receipt.entry() for receipt in receipts},
        "fidelity": {name: fidelity_json(of) for receipt in receipts for name, of in receipt.fidelity.items()},
        "memory": {
            "predicted_working_set": plan.memory.total,
            "working_set": report.working_set,
            "peak": report.peak_memory,
        },
        "seconds": round(report.seconds, 3),
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "shards_reused": report.shards_reused,
        "warnings": list(report.warnings),
        "files": list(report.files),
    }
