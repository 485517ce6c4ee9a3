"""Plan a merge again from its record, and compare the plan with the record. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.config.recorded import recorded_config, relocated
from shardmerge.config.schema import MergeConfig
from shardmerge.destinations.record import RECORD_NAME, Record
from shardmerge.errors import ConfigError, PlanError, ShardmergeError, SourceError
from shardmerge.file_formats.checkpoint import Checkpoint, open_checkpoint
from shardmerge.planning.fingerprint import with_contents
from shardmerge.planning.layouts import LAYOUTS
from shardmerge.planning.planner import make_plan
from shardmerge.reporting.origin import open_recorded
from shardmerge.reporting.record import targets
from shardmerge.sources.source import open_source
from shardmerge.spec.notices import Warned
from shardmerge.spec.plans import MergePlan, digest_of
from shardmerge.spec.tensors import SourceFile
from shardmerge.verification.findings import STRUCTURE, TOUCHED, Findings
from shardmerge.verification.scaling import ScaledBy
from shardmerge.version import __version__

#: Changed files that are named one by one.
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Again:
    """The merge planned again; ``config`` has the places of base and adapters.

    ``plan`` is None where one of those is missing; then ``base`` may still be available.
    """

    plan: MergePlan | None = None
    adapters: tuple[ScaledBy, ...] = ()
    base: Checkpoint | None = None
    config: MergeConfig | None = None


def plan_again(record: Record, output: Path, base: str | None, adapters: Sequence[str], findings: Findings) -> Again:
    """Plan the recorded merge from base and adapters as they are now; ``base`` and ``adapters`` are their new places.

    What is missing or has changed goes to ``findings``. `ConfigError` where the number of adapters is another.
    """
    recorded = record.values.get("config")
    try:
        config = recorded_config(recorded, RECORD_NAME)
    except ConfigError as error:
        text = f"the config in {RECORD_NAME} is damaged: {_in_a_line(error)}"
        findings.problem(STRUCTURE, text, file=RECORD_NAME)
        return Again()
    config = _located(config, record, output, base, adapters)
    if missing := list(_missing(config)):
        findings.unverified += missing
        findings.unverified.append("touched tensors: they can only be computed again from base and adapters")
    else:
        try:
            plan = make_plan(config, check_output=False)
        except PlanError as error:
            findings.problem(TOUCHED, f"base and adapters, as they are now, make no such merge: {_in_a_line(error)}")
        except ShardmergeError as error:
            findings.unverified.append(f"touched tensors: base or adapter cannot be read: {error}")
        else:
            _compare(record, plan, findings)
            return Again(plan, tuple(ScaledBy.of(entry) for entry in config.adapters))
    return Again(base=_base_alone(config, findings), config=config)


def _in_a_line(error: ShardmergeError) -> str:
    """The message of an error, which may be a list, in one line."""
    return " ".join(line.strip() for line in str(error).splitlines())


def _located(
    config: MergeConfig, record: Record, output: Path, base: str | None, adapters: Sequence[str]
) -> MergeConfig:
    """The config with the places where the merge found its files, or those given now."""
    config = relocated(config, record.values, base, adapters)
    # Names of files, which depend on the output's name, do not change when its folder is moved.
    output = LAYOUTS[config.output.format].path(output, list(record.shards), config.output)
    changes = {
        "output": config.output.model_copy(update={"path": str(output)}),
        # Limits of memory and threads of the merge's machine do not matter here.
        "compute": config.compute.model_copy(update={"max_memory": "auto", "threads": "auto"}),
    }
    return config.model_copy(update=changes)


def plan_of_base(again: Again, findings: Findings) -> MergePlan | None:
    """A plan to write the base alone, in the merge's format; None where that is not possible."""
    if again.config is None or again.base is None:
        return None
    try:
        return make_plan(again.config.model_copy(update={"adapters": ()}), check_output=False)
    except ShardmergeError as error:
        findings.unverified.append(f"untouched tensors: the base alone makes no such output: {error}")
        return None


def _missing(config: MergeConfig) -> Iterator[str]:
    """A message for the base and each adapter that cannot be opened."""
    places = [("base", "base", config.base), *(("adapter", "adapters", entry.path) for entry in config.adapters)]
    for place in places:
        try:
            open_recorded(*place)
        except SourceError as error:
            yield str(error)


def _base_alone(config: MergeConfig, findings: Findings) -> Checkpoint | None:
    try:
        return open_checkpoint(open_source(config.base))
    except ShardmergeError:
        findings.unverified.append("untouched tensors: there is no base to compare them with")
        return None


def _compare(record: Record, plan: MergePlan, findings: Findings) -> None:
    problems = [*_shard_differences(record, plan), *_target_differences(record, plan)]
    for kind, text in problems:
        findings.problem(kind, text)
    notes = list(_source_differences(record, plan))
    findings.notes += notes or ([] if problems else _digest_difference(record, plan))


def _digest_difference(record: Record, plan: MergePlan) -> Iterator[str]:
    """A note where only the digest is another: sizes, times, targets and shards are the same."""
    now = with_contents(plan, str(record.values.get("torch")))
    if digest_of(now) == record.values.get("digest"):
        return
    before = record.values.get("fingerprint")
    parts = [
        f"{part} ({name})"
        for part, values in (before.items() if isinstance(before, dict) else ())
        for name in sorted({*values, *now.get(part, {})})
        if values.get(name) != now.get(part, {}).get(name)
    ]
    what = f"different are: {', '.join(parts[:_SHOWN])}" if parts else "an adapter's bytes, or files beside the weights"
    yield Warned(f"base and adapters have the sizes and times of the merge's, but its digest is another: {what}")


def _source_differences(record: Record, plan: MergePlan) -> Iterator[str]:
    """Notes on files that have changed since the merge, and on the version of this program."""
    infos = record.values.get("adapters")
    recorded = [record.values.get("base"), *(infos if isinstance(infos, list) else [])]
    now = [plan.base.files, *(info.files for info in plan.adapters)]
    names = ["the base", *(f"adapter {info.location}" for info in plan.adapters)]
    for name, before, files in zip(names, recorded, now, strict=False):
        if texts := list(_file_differences(before, files)):
            more = f", and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
            yield Warned(f"{name} is not as the merge found it: {', '.join(texts[:_SHOWN])}{more}")
    if record.version != __version__:
        yield f"it was merged by shardmerge {record.version}; this is {__version__}"


def _shard_differences(record: Record, plan: MergePlan) -> Iterator[tuple[str, str]]:
    planned = {shard.name: shard.nbytes for shard in plan.shards}
    before = {name: size for name, (size, _) in record.shards.items()}
    if planned != before:
        other = sorted(name for name in {*planned, *before} if planned.get(name) != before.get(name))
        shown = ", ".join(f"{name} ({before.get(name)}, now {planned.get(name)} bytes)" for name in other[:3])
        yield STRUCTURE, f"base and adapters, as they are now, make other shards than were recorded: {shown}"


def _target_differences(record: Record, plan: MergePlan) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    another = "the adapter or the config is another"
    before = dict(record.targets.items())
    compared: set[str] = set()
    for name, now in targets(plan):
        if name in compared:
            continue
        compared.add(name)
        if name not in before:
            found.append((name, f"would now be updated, but was not by the merge: {another}"))
        elif (then := before.pop(name)) != now:
            change = next((_change(*pair) for pair in zip(_entries(then), now, strict=False)), "") or "their number"
            found.append((f"{name}:", f"its updates are not those recorded ({change}): the adapter is another"))
    found += [(name, f"was updated by the merge, but would not be now: {another}") for name in before]
    return [(TOUCHED, f"{name} {text}") for name, text in sorted(found)]


def _entries(value: Any) -> list[Mapping[str, Any]]:
    return [entry if isinstance(entry, dict) else {} for entry in value] if isinstance(value, list) else []


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = (key for key in now if now[key] != before.get(key))
    return ", ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in keys)


def _file_differences(info: Any, files: Sequence[SourceFile]) -> Iterator[str]:
    entries = _entries(info.get("files") if isinstance(info, dict) else None)
    before = {str(entry.get("uri")).rpartition("/")[2]: entry for entry in entries}
    now = {file.uri.rpartition("/")[2]: file for file in files}
    for name in sorted({*before, *now}):
        if name not in before or name not in now:
            yield f"{name} is {'new' if name in now else 'gone'}"
        elif before[name].get("size") != now[name].size:
            yield f"{name} was {before[name].get('size')} bytes, is {now[name].size}"
        elif before[name].get("uri") == now[name].uri and before[name].get("mtime_ns") != now[name].mtime_ns:
            yield f"{name} was written again"
        elif before[name].get("uri") != now[name].uri:
            yield f"{name} is read from {now[name].uri}"


def files_of(again: Again) -> list[SourceFile]:
    """Every file of the base and the adapters that may be read."""
    if again.plan is not None:
        return [*again.plan.base.files, *(file for info in again.plan.adapters for file in info.files)]
    return [] if again.base is None else [shard.file for shard in again.base.shards]
