"""``run``, ``plan`` and ``export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from shardmerge.cli import environment
from shardmerge.cli.logs import keep_log_out_of, logged
from shardmerge.cli.printing import Command, json_option, print_json, say
from shardmerge.config.choices import Format, OutputDtype, Quantization
from shardmerge.errors import ConfigError
from shardmerge.system.garbage import no_garbage_collection
from shardmerge.system.installation import first_time, needless_cuda
from shardmerge.system.interrupt import ADVICE, INTERRUPTED, stopping_in_time

if TYPE_CHECKING:
    from shardmerge.config.schema import MergeConfig
    from shardmerge.spec.plans import MergePlan


def _config_options(command: Command) -> Command:
    """What `run` and `plan` share."""
    for decorate in (
        json_option,
        click.option(
            "--overwrite", is_flag=True, help="Replace a finished merge, or an unfinished one of another config."
        ),
        click.option(
            "--allow-config-loss",
            is_flag=True,
            help="Write a GGUF file also where llama.cpp does not know a setting of config.json.",
        ),
        click.option(
            "-s", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config, by dotted path."
        ),
        click.argument("config", type=click.Path(dir_okay=False, path_type=Path)),
    ):
        command = decorate(command)
    return command


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
    """No more of it than shows that it is too long."""
    from shardmerge.config.schema import MAX_CONFIG_BYTES

    if sys.stdin is None:  # as in a process that was started without
        raise ConfigError("the config is to come from stdin, which is closed")
    try:
        return sys.stdin.buffer.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the config on stdin cannot be read: {error.strerror}") from None


def _plan(config: Path, overrides: tuple[str, ...], *, overwrite: bool, allow_config_loss: bool) -> MergePlan:
    if allow_config_loss:
        overrides = (*overrides, "output.allow_config_loss=true")
    with no_garbage_collection():  # the modules are many objects, too
        from shardmerge.api.library import plan

        return plan(_load(config, overrides), overwrite=overwrite)


@click.command()
@_config_options
@environment.quiet_option("No progress and no table; only errors, warnings and notes.")
@logged
def run(
    config: Path, overrides: tuple[str, ...], allow_config_loss: bool, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Merge as CONFIG says, a YAML file or - for stdin. Run it again to take up an interrupted merge."""
    planned = _plan(config, overrides, overwrite=overwrite, allow_config_loss=allow_config_loss)
    _carry_out(planned, as_json=as_json, quiet=quiet)


def _carry_out(planned: MergePlan, *, as_json: bool, quiet: bool) -> None:
    """Merge, with progress and notes on stderr and the result on stdout."""
    from shardmerge.api.library import merge
    from shardmerge.cli.progress import show_progress
    from shardmerge.reporting.merge_report import size_table
    from shardmerge.reporting.plan_text import next_steps
    from shardmerge.reporting.text import labelled

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
        done = f"{report.targets} weights merged" if planned.adapters else "exported"
        say(f"{report.output}: {done}\n\n{size_table(report)}{next_steps(planned)}")


@click.command()
@_config_options
@logged
def plan(config: Path, overrides: tuple[str, ...], allow_config_loss: bool, overwrite: bool, as_json: bool) -> None:
    """Say what `run` would do, and every reason why it would not. Reads headers only. CONFIG may be - for stdin."""
    from shardmerge.reporting.plan_text import describe_plan, plan_summary

    planned = _plan(config, overrides, overwrite=overwrite, allow_config_loss=allow_config_loss)
    if as_json:
        print_json(plan_summary(planned))
    else:
        say(describe_plan(planned))


@click.command()
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where to; a directory that is empty or not there.")
@click.option("--format", "format_", type=click.Choice(get_args(Format)), default="safetensors", show_default=True)
@click.option("--quantization", type=click.Choice(get_args(Quantization)), help="Of a GGUF file.  [default: q8_0]")
@click.option("--allow-config-loss", is_flag=True, help="Of a GGUF file: though llama.cpp does not know a setting.")
@click.option("--dtype", type=click.Choice(get_args(OutputDtype)), default="same", show_default=True)
@click.option("--max-shard-size", metavar="SIZE", default="same", show_default=True, help="For example 5GB.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run has written there.")
@environment.quiet_option("No progress and no table; only errors, warnings and notes.")
@json_option
@logged
def export(
    model: str,
    output: str,
    format_: str,
    quantization: str | None,
    allow_config_loss: bool,
    dtype: str,
    max_shard_size: str,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL, a finished merge or any checkpoint, in another format, dtype or shards. Streams like a merge."""
    from shardmerge.api.library import plan
    from shardmerge.config.schema import ExportConfig

    if quantization and format_ != "gguf":
        raise ConfigError("--quantization is for --format gguf")
    if allow_config_loss and format_ != "gguf":
        raise ConfigError("--allow-config-loss is for --format gguf")
    place: dict[str, Any] = {"path": output, "format": format_, "dtype": dtype, "max_shard_size": max_shard_size}
    if allow_config_loss:
        place["allow_config_loss"] = True
    if quantization:
        place["quantization"] = quantization
    keep_log_out_of(output)
    compute = environment.compute_defaults()
    config = ExportConfig.from_dict({"base": model, "output": place, "compute": compute}, "export")
    _carry_out(plan(config, overwrite=overwrite), as_json=as_json, quiet=quiet)
