"""The library: ``plan``, ``merge``, ``export``, ``verify``, ``compare``, ``inspect`` and ``init``.

::

    import shardmerge

    report = shardmerge.merge(base="org/model", adapter="output/sft", output="output/merged")
    shardmerge.verify(report.output).raise_for_status()

Each function does what the command of its name does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardmerge.api.progress import Progress
from shardmerge.config.schema import ExportConfig, MergeConfig
from shardmerge.errors import ConfigError, SourceError
from shardmerge.planning.planner import make_plan
from shardmerge.reporting.merge_report import MergeReport
from shardmerge.reporting.text import count
from shardmerge.spec.plans import MergePlan
from shardmerge.system import limits
from shardmerge.system.events import event, notices

if TYPE_CHECKING:
    from shardmerge.execution.executors import Executor
    from shardmerge.inference.comparison.figures import Comparison
    from shardmerge.verification.findings import VerifyReport

Location = str | os.PathLike[str]
#: A path, or a section of the config as a mapping.
Section = Location | Mapping[str, Any]
ConfigLike = MergeConfig | Mapping[str, Any] | Location

_UNTOUCHED = "Nothing was written"
_RESUMABLE = (
    "An unfinished merge is not a model. The finished part of it is kept: run the same merge again to resume it"
)


def load_config(config: ConfigLike) -> MergeConfig:
    """A `MergeConfig` from itself, a mapping, or the path of a YAML file. Raises `ConfigError`."""
    if isinstance(config, MergeConfig):
        return config
    if isinstance(config, Mapping):
        return MergeConfig.from_dict(config)
    return MergeConfig.from_file(Path(config))


def plan(
    config: ConfigLike | None = None,
    *,
    base: Location | None = None,
    adapter: Section | Sequence[Section] | None = None,
    output: Section | None = None,
    compute: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> MergePlan:
    """Plan a merge from headers alone. Nothing is written, and no weight is read.

    Give a ``config``, or ``base``, ``adapter`` (one or several, in their order) and ``output``: each is a path, or a
    mapping as in the config (``output={"path": "merged", "dtype": "float32"}``). ``overwrite`` allows an output
    directory that holds a finished merge. Raises `ConfigError`, `PlanError` (with every problem), `FormatError` or
    `SourceError`.
    """
    parts = {"base": base, "adapters": adapter, "output": output, "compute": compute}
    with limits.within(_UNTOUCHED):
        try:
            made = make_plan(_config(config, parts), overwrite)
        except SourceError as error:
            raise error if _UNTOUCHED in str(error) else type(error)(f"{error}. {_UNTOUCHED}") from None
    notices(made.warnings)
    return made


def merge(
    what: MergePlan | ConfigLike | None = None,
    *,
    base: Location | None = None,
    adapter: Section | Sequence[Section] | None = None,
    output: Section | None = None,
    compute: Mapping[str, Any] | None = None,
    overwrite: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
    executor: Executor | None = None,
) -> MergeReport:
    """Carry out a plan; or plan a merge, given as for `plan`, and carry it out.

    An interrupted merge is resumed: shards that an earlier run finished for the same base, adapters and config are kept
    if they still have their checksums. The output is a model only when this function returns. ``overwrite`` replaces a
    finished merge; None takes the plan's setting, or False without a plan. ``progress`` is called often, in the calling
    thread; an exception that it raises stops the merge. ``executor`` runs the shards (see `execution.executors`); None
    merges them in this process, one after the other. Raises what `plan` raises, and `OutputError`, `ChangedError`,
    `NonFiniteError`, `ResumeError` and `LimitError`.
    """
    started = time.monotonic()
    if isinstance(what, MergePlan):
        if any(part is not None for part in (base, adapter, output, compute)):
            raise ConfigError("a plan says already what is merged; give base, adapter, output or compute to `plan`")
        planned = what if overwrite is None else dataclasses.replace(what, overwrite=overwrite)
    else:
        parts = {"base": base, "adapter": adapter, "output": output, "compute": compute}
        planned = plan(what, **parts, overwrite=bool(overwrite))  # type: ignore[arg-type]
    return _merge(planned, progress, started, executor)


def export(
    model: Location,
    output: Section,
    *,
    compute: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Write a checkpoint again: in another dtype, in other shards, or as a GGUF file. It streams like a merge.

    ``output`` is a path, or a mapping as in the config. Raises what `merge` raises.
    """
    started = time.monotonic()
    return _merge(plan(export_config(model, output, compute), overwrite=overwrite), progress, started)


def export_config(model: Location, output: Section, compute: Mapping[str, Any] | None = None) -> ExportConfig:
    """The config of an export. Raises `ConfigError`."""
    parts = {"base": os.fspath(model), "output": _section(output), "compute": dict(compute or {})}
    return ExportConfig.from_dict(parts, "export")


def verify(
    output: Location,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    rows: int | None = 16,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Verify a finished merge against its record, base and adapters; see `verification.verifier`. Nothing is written.

    ``base`` and ``adapters`` (all of them, in their order) are where those are now, if they were moved. Of every
    updated tensor ``rows`` rows, chosen by ``seed``, are computed again; None computes all. The report has every
    problem; ``report.raise_for_status()`` raises `VerifyError` if there is one, or if something could not be verified.
    Raises `SourceError` where reading fails, `ConfigError` for wrong arguments, and `VerifyError` where ``output`` has
    no record to verify.
    """
    with limits.within(_UNTOUCHED):
        limits.check_room_for_torch()
        from shardmerge.verification.verifier import verify_output

        report_progress = progress or (lambda _: None)

        def advance(done: int, total: int, shard: str, number: int, shards: int) -> None:
            report_progress(Progress(done, total, shard, number, shards, "verifying"))

        report = verify_output(Path(output), base=base, adapters=adapters, rows=rows, seed=seed, progress=advance)
    notices(report.notes)
    event(
        "verified",
        f"{report.output}: {count(sum(report.counts.values()), 'problem')}, "
        f"{count(len(report.unverified), 'remark')} on what could not be verified",
        level=logging.INFO if report.ok else logging.ERROR,
        output=report.output,
        ok=report.ok,
        complete=report.complete,
        counts=report.counts,
        problems=[problem.text for problem in report.problems],
        unverified=list(report.unverified),
        seconds=round(report.seconds, 3),
        peak_memory=report.peak_memory_bytes,
    )
    return report


def compare(
    output: Location,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    prompts: Sequence[str] | None = None,
    template: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    max_new_tokens: int = 32,
) -> Comparison:
    """Compare the answers of a merged model with those of its base + adapter; see `inference.comparison.comparing`.

    Loads one model after the other, with transformers and PEFT. ``prompts`` None uses the built-in prompts.
    """
    with limits.within(_UNTOUCHED):
        limits.check_room_for_torch()
        from shardmerge.inference.comparison import comparing

        return comparing.compare(
            Path(output),
            base=base,
            adapters=adapters,
            prompts=comparing.PROMPTS if prompts is None else prompts,
            template=template,
            dtype=dtype,
            device=device,
            max_new_tokens=max_new_tokens,
        )


def inspect(path: Location) -> dict[str, Any]:
    """Describe a checkpoint, an adapter, a merge or a GGUF file, from its headers, as a dictionary for JSON.

    Raises `SourceError` or `FormatError`.
    """
    from shardmerge.reporting.inspection import inspect_path

    with limits.within(_UNTOUCHED):
        return inspect_path(os.fspath(path))


def init(
    adapter: Location, *, base: Location | None = None, output: Location | None = None, name: str = "config.yaml"
) -> str:
    """The text of a commented config for an adapter, from the adapter's own metadata. Nothing is written.

    ``name`` is the file name in its comments. Raises `SourceError` or `FormatError`.
    """
    from shardmerge.reporting.starter import starter_config

    with limits.within(_UNTOUCHED):
        return starter_config(os.fspath(adapter), name, _text(base), _text(output))


def _merge(
    planned: MergePlan,
    progress: Callable[[Progress], None] | None,
    started: float,
    executor: Executor | None = None,
) -> MergeReport:
    with limits.within(_RESUMABLE):
        limits.check_room_for_torch(planned.memory.total)
        from shardmerge.api.merging import carry_out
        from shardmerge.execution.executors import SerialExecutor

        return carry_out(planned, executor or SerialExecutor(), progress or (lambda _: None), started)


def _config(config: ConfigLike | None, parts: Mapping[str, Any]) -> MergeConfig:
    """The config, or one of its parts: ``base``, ``adapters``, ``output`` and ``compute``."""
    given = {name: value for name, value in parts.items() if value is not None}
    if config is not None:
        if given:
            raise ConfigError(f"give a config, or base, adapter and output, but not both ({', '.join(given)})")
        return load_config(config)
    if "base" in given:
        given["base"] = os.fspath(given["base"])
    if adapters := given.pop("adapters", ()):
        several = isinstance(adapters, Sequence) and not isinstance(adapters, str)
        given["adapters"] = [_section(one) for one in (adapters if several else [adapters])]
    if "output" in given:
        given["output"] = _section(given["output"])
    return MergeConfig.from_dict(given, "merge")


def _section(value: Section) -> dict[str, Any]:
    found = value if isinstance(value, Mapping) else {"path": value}
    return {name: os.fspath(of) if isinstance(of, os.PathLike) else of for name, of in found.items()}


def _text(path: Location | None) -> str | None:
    return None if path is None else os.fspath(path)
