"""The library: ``plan``, ``merge`` and ``verify``.

::

    import shardmerge

    plan = shardmerge.plan("config.yaml")
    report = shardmerge.merge(plan)
    shardmerge.verify(report.output)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardmerge.config.schema import MergeConfig
from shardmerge.errors import (
    VerifyError,
)
from shardmerge.planning.planner import make_plan
from shardmerge.reporting.merge_report import (
    MergeReport,
)
from shardmerge.spec.plans import MergePlan
from shardmerge.system import limits
from shardmerge.system.events import notices

if TYPE_CHECKING:
    from shardmerge.verification.findings import VerifyReport
from shardmerge.api.limits import within_limits
from shardmerge.api.merging import carry_out
from shardmerge.api.progress import Progress

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
    with within_limits("Nothing was written"):
        made = make_plan(load_config(config), overwrite)
    notices(made.warnings)
    return made


def merge(
    what: MergePlan | ConfigLike,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Carry out a plan, or plan and carry out a config.

    A merge that was interrupted is taken up: shards that an earlier run finished for the same base, adapters and config
    are kept, where they still have their checksums. The output is a model only when this returns. ``progress`` is
    called often, in the calling thread; what it raises stops the merge. Raises what `plan` raises, `OutputError`,
    `ChangedError` (a `SourceError`), `NonFiniteError` and `ResumeError`.
    """
    started = time.monotonic()
    of = what if isinstance(what, MergePlan) else plan(what, overwrite=overwrite)
    with within_limits(
        "An unfinished merge is no model; what was finished of it is kept: run the same command again to take it up"
    ):
        limits.check_room_for_torch(of.memory.total)
        return carry_out(of, progress or (lambda _: None), started)


def verify(
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    rows: int | None = 16,
    seed: int = 0,
    partial: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Prove a finished merge from its record, base and adapters; see `verification.verifier`. Nothing is written.

    ``base`` and ``adapters`` (all of them, in their order) say where those are now, if they were moved. Of every
    touched tensor ``rows`` rows are computed again, chosen by ``seed``; None computes all. Raises `VerifyError`, with
    the report, if anything is not as it must be, or if something could not be verified (``report.unverified``), as
    where base or adapter are gone: with ``partial``, what could be verified is enough. `SourceError` where reading
    fails, `ConfigError` for wrong arguments.
    """
    with within_limits("Nothing was written"):
        limits.check_room_for_torch()
        from shardmerge.reporting.steps import verified
        from shardmerge.verification.findings import summary
        from shardmerge.verification.verifier import verify_output

    tell = progress or (lambda _: None)

    def told(done: int, total: int, shard: str, number: int, shards: int) -> None:
        tell(Progress(done, total, shard, number, shards, "verifying"))

    with within_limits("Nothing was written"):
        report = verify_output(Path(output), base=base, adapters=adapters, rows=rows, seed=seed, told=told)
    verified(report)
    if not report.ok or not (report.complete or partial):
        error = VerifyError(summary(report))
        error.report = report
        raise error
    return report
