"""The library: ``plan`` and ``merge``.

::

    import shardmerge

    plan = shardmerge.plan("config.yaml")
    report = shardmerge.merge(plan)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.adapters import FAMILIES
from shardmerge.config import MergeConfig
from shardmerge.errors import FormatError, OutputError, SourceError
from shardmerge.planning import make_plan
from shardmerge.report import MergeReport, changing_updates, merged_dtype, peak_memory, record
from shardmerge.spec import MergePlan, Receipt, ShardPlan


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a merge is. Bytes are those of the shards' data as written."""

    done: int
    total: int
    shard: str
    shard_number: int
    shards: int


ConfigLike = MergeConfig | Mapping[str, Any] | str | os.PathLike[str]


def load_config(config: ConfigLike) -> MergeConfig:
    """A `MergeConfig` from itself, a mapping, or the path of a YAML file. Raises `ConfigError`."""
    if isinstance(config, MergeConfig):
        return config
    if isinstance(config, Mapping):
        return MergeConfig.from_dict(config)
    return MergeConfig.from_file(Path(config))


def plan(config: ConfigLike, *, overwrite: bool = False) -> MergePlan:
    """Plan a merge from headers alone; nothing is written and no weight is read.

    ``overwrite`` allows an output directory that already holds a finished merge.
    Raises `ConfigError`, `PlanError` (with every problem), `FormatError` or `SourceError`.
    """
    return make_plan(load_config(config), overwrite)


def merge(
    what: MergePlan | ConfigLike,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Carry out a plan, or plan and carry out a config.

    A merge that was interrupted is taken up: shards that an earlier run finished for the same plan are kept. The output
    is a model only when this returns. ``progress`` is called often, in the calling thread; what it raises stops the
    merge. Raises what `plan` raises, `OutputError`, `NonFiniteError` and `ResumeError`.
    """
    started = time.monotonic()
    of = what if isinstance(what, MergePlan) else plan(what, overwrite=overwrite)
    return _carry_out(of, progress or (lambda _: None), started)


def _carry_out(plan: MergePlan, progress: Callable[[Progress], None], started: float) -> MergeReport:
    # Everything up to here does without torch, which takes a second to import.
    import torch

    from shardmerge.engine import Engine
    from shardmerge.executors import SerialExecutor
    from shardmerge.journal import Journal
    from shardmerge.sinks import SafetensorsSink

    engine = Engine(plan)
    try:
        with Journal(Path(plan.output), plan.digest, plan.overwrite) as journal:
            sink = SafetensorsSink(plan, journal)
            counter = _Counter(plan, progress)

            def merge_shard(shard: ShardPlan) -> Receipt:
                counter.begin(shard)
                with sink.writer(shard) as writer:
                    receipt = engine.merge_shard(shard, writer, counter.advance)
                    writer.commit()
                journal.record(receipt)
                return receipt

            finished = {shard.name: receipt for shard in plan.shards if (receipt := journal.receipt(shard))}
            open_shards = [shard for shard in plan.shards if shard.name not in finished]
            counter.skip(shard for shard in plan.shards if shard.name in finished)
            try:
                receipts = [*finished.values(), *SerialExecutor().map(merge_shard, open_shards)]
                report = _report(plan, sink.files(), receipts, len(finished), started)
                sink.commit(record(plan, report, torch.__version__))
            except FormatError as error:
                # Something in the files themselves: no second run can succeed, so nothing is kept for one.
                journal.discard()
                raise type(error)(f"{error}. Nothing is left of it in {plan.output}") from None
            except (OutputError, SourceError) as error:
                kept = "What was finished is kept; run the same command again to take it up"
                raise type(error)(f"{error}. The output is no model yet. {kept}") from None
            return report
    finally:
        engine.close()


class _Counter:
    """Adds up bytes and tells the caller."""

    def __init__(self, plan: MergePlan, progress: Callable[[Progress], None]) -> None:
        self._numbers = {shard.name: number for number, shard in enumerate(plan.shards, 1)}
        self._total = sum(shard.data_bytes for shard in plan.shards)
        self._done = 0
        self._shard = ""
        self._progress = progress

    def skip(self, shards: Iterable[ShardPlan]) -> None:
        self._done += sum(shard.data_bytes for shard in shards)

    def begin(self, shard: ShardPlan) -> None:
        self._shard = shard.name
        self.advance(0)

    def advance(self, count: int) -> None:
        self._done += count
        number, shards = self._numbers[self._shard], len(self._numbers)
        self._progress(Progress(self._done, self._total, self._shard, number, shards))


def _report(plan: MergePlan, files: list[str], receipts: list[Receipt], reused: int, started: float) -> MergeReport:
    active = {number for receipt in receipts for number in receipt.active_adapters}
    active |= {of.adapter for _, of in changing_updates(plan) if not FAMILIES[of.family].zero_means_nothing}
    idle = [info.location for number, info in enumerate(plan.adapters) if number not in active]
    warnings = [f"adapter {location} changes nothing: every lora_B is zero, as before training" for location in idle]
    return MergeReport(
        output=plan.output,
        files=tuple(files),
        targets=len({tensor.source.name for tensor, _ in changing_updates(plan)}),
        adapter_bytes=sum(info.nbytes for info in plan.adapters),
        base_bytes=plan.base.nbytes,
        merged_bytes=sum(shard.nbytes for shard in plan.shards),
        merged_dtype=merged_dtype(plan),
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        shards_reused=reused,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        warnings=(*plan.warnings, *warnings),
    )
