"""``run``, ``merge``, ``plan`` and ``export``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardmerge.cli import environment, options
from shardmerge.cli.logs import keep_log_out_of, logged
from shardmerge.cli.printing import examples, print_json, say
from shardmerge.errors import ConfigError
from shardmerge.system.garbage import no_garbage_collection
from shardmerge.system.installation import first_time, needless_cuda
from shardmerge.system.interrupt import ADVICE, INTERRUPTED, stopping_in_time

if TYPE_CHECKING:
    from shardmerge.config.schema import MergeConfig
    from shardmerge.spec.plans import MergePlan


@click.command(
    short_help="Merge as a config says.",
    epilog=examples("run config.yaml", "run config.yaml -s output.dtype=float32", "run - --json < config.yaml"),
)
@options.config
@options.quiet
@logged
def run(
    config: Path, overrides: tuple[str, ...], allow_config_loss: bool, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Merge as CONFIG says: a YAML file, or - for stdin. Run the same command again to resume an interrupted merge."""
    planned = _plan(config, overrides, overwrite=overwrite, allow_config_loss=allow_config_loss)
    _carry_out(planned, as_json=as_json, quiet=quiet)


@click.command(
    short_help="Merge without a config file.",
    epilog=examples(
        "merge org/model output/sft -o output/merged",
        "merge base first second -o merged -s adapters.1.weight=0.5",
        "merge base sft -o merged --format gguf --quantization q4_0",
    ),
)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@options.output
@options.overrides
@logged
def merge(
    base: str,
    adapters: tuple[str, ...],
    overrides: tuple[str, ...],
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **output: Any,
) -> None:
    """Merge every ADAPTER into BASE, in this order. Each is a directory, a file or a Hub id."""
    given = {"base": base, "adapters": list(adapters), "output": _output(output)}

    def config() -> MergeConfig:
        from shardmerge.config.schema import MergeConfig

        return MergeConfig.from_dict(given, "merge", overrides, environment.compute_defaults())

    _carry_out(_planned(config, overwrite), as_json=as_json, quiet=quiet)


@click.command(
    short_help="Say what run would do, or why not.", epilog=examples("plan config.yaml", "plan config.yaml --json")
)
@options.config
@options.quiet
@logged
def plan(
    config: Path, overrides: tuple[str, ...], allow_config_loss: bool, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Say what `run` would do, and every reason why it would not. Reads headers only. CONFIG may be - for stdin."""
    from shardmerge.reporting.plan_text import describe_plan, plan_summary

    planned = _plan(config, overrides, overwrite=overwrite, allow_config_loss=allow_config_loss)
    if as_json:
        print_json(plan_summary(planned))
    elif not quiet:
        say(describe_plan(planned))


@click.command(
    short_help="Write a model in another format or dtype.",
    epilog=examples(
        "export output/merged -o output/gguf --format gguf", "export org/model -o output/bf16 --dtype bfloat16"
    ),
)
@click.argument("model")
@options.output
@logged
def export(model: str, overwrite: bool, quiet: bool, as_json: bool, **output: Any) -> None:
    """Write MODEL, a finished merge or any checkpoint, in another format, dtype or shards. Streams like a merge."""
    from shardmerge.api.library import export_config, plan

    config = export_config(model, _output(output), environment.compute_defaults())
    _carry_out(plan(config, overwrite=overwrite), as_json=as_json, quiet=quiet)


# --- planning ---------------------------------------------------------------------------------------------------------


def _plan(config: Path, overrides: tuple[str, ...], *, overwrite: bool, allow_config_loss: bool) -> MergePlan:
    if allow_config_loss:
        overrides = (*overrides, "output.allow_config_loss=true")
    return _planned(lambda: _load(config, overrides), overwrite)


def _planned(config: Callable[[], MergeConfig], overwrite: bool) -> MergePlan:
    with no_garbage_collection():  # the modules are many objects, too
        from shardmerge.api.library import plan

        return plan(config(), overwrite=overwrite)


def _output(given: Mapping[str, Any]) -> dict[str, Any]:
    keep_log_out_of(given["output"])
    return options.output_section(given["output"], **{key: value for key, value in given.items() if key != "output"})


def _load(config: Path, overrides: tuple[str, ...]) -> MergeConfig:
    from shardmerge.config.schema import MergeConfig

    defaults = environment.compute_defaults()
    if str(config) == "-":
        loaded = MergeConfig.from_text(_stdin(), overrides, defaults, "the config on stdin")
    else:
        loaded = MergeConfig.from_file(config, overrides, defaults)
    keep_log_out_of(loaded.output.path)
    return loaded


def _stdin() -> bytes:
    """Read stdin, up to one byte more than a config may have."""
    from shardmerge.config.yaml_text import MAX_CONFIG_BYTES

    if sys.stdin is None:  # as in a process that was started without
        raise ConfigError("the config is to come from stdin, which is closed")
    try:
        return sys.stdin.buffer.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the config on stdin cannot be read: {error.strerror}") from None


# --- merging ----------------------------------------------------------------------------------------------------------


def _carry_out(planned: MergePlan, *, as_json: bool, quiet: bool) -> None:
    """Merge, with progress and notes on stderr and the result on stdout."""
    from shardmerge.api.library import merge
    from shardmerge.cli.progress import show_progress
    from shardmerge.planning.layouts import LAYOUTS
    from shardmerge.reporting.merge_report import size_table
    from shardmerge.reporting.text import count, labelled

    if (note := needless_cuda()) and first_time(note):
        say(labelled(note), err=True)
    for notice in planned.warnings:
        say(labelled(notice), err=True)
    try:
        with stopping_in_time(), show_progress(quiet=quiet) as progress:
            report = merge(planned, progress=progress)
    except KeyboardInterrupt:
        click.echo(f"\nshardmerge: {ADVICE}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    for notice in report.warnings[len(planned.warnings) :]:
        say(labelled(notice), err=True)
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        done = f"{count(report.targets, 'weight')} merged" if planned.adapters else "exported"
        say(f"{report.output}: {done}\n\n{size_table(report)}{LAYOUTS[planned.format].next_steps(planned)}")
