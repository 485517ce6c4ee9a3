"""The command line: parse, construct, call, print. Results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from shardmerge.errors import ConfigError, PlanError, ShardmergeError
from shardmerge.version import __version__

if TYPE_CHECKING:
    from shardmerge.config import MergeConfig
    from shardmerge.spec import MergePlan

INTERRUPTED = 130
_AS_JSON = "shardmerge.as_json"
Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Turns shardmerge's errors into a message and an exit code, for every command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShardmergeError as error:
            _fail(error, as_json=bool(ctx.meta.get(_AS_JSON)))


def _fail(error: ShardmergeError, *, as_json: bool) -> NoReturn:
    if as_json:
        problems = list(error.problems) if isinstance(error, PlanError) else [str(error)]
        _print_json({"error": type(error).__name__, "exit_code": error.exit_code, "problems": problems})
    click.echo(f"shardmerge: {error}", err=True)
    raise click.exceptions.Exit(error.exit_code)


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    # `meta` is shared with the group's context, which prints the errors.
    ctx.meta[_AS_JSON] = value
    return value


_json_option = click.option("--json", "as_json", is_flag=True, callback=_remember, help="Print the result as JSON.")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shardmerge")
def cli() -> None:
    """Fold a trained adapter (LoRA and its relatives) into a model's weights, streaming.

    Exit codes: 0 done; 1 a bug; 2 usage or config; 3 the plan is refused; 4 a file is malformed; 5 reading or writing
    failed; 6 verification failed; 7 the output belongs to another merge; 130 interrupted.
    """


def _config_options(command: Command) -> Command:
    """What `run` and `plan` share."""
    for decorate in (
        _json_option,
        click.option(
            "--overwrite", is_flag=True, help="Replace a finished merge, or an unfinished one of another config."
        ),
        click.option(
            "-s", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config, by dotted path."
        ),
        click.argument("config", type=click.Path(dir_okay=False, path_type=Path)),
    ):
        command = decorate(command)
    return command


def _load(config: Path, overrides: tuple[str, ...]) -> MergeConfig:
    from shardmerge.config import MergeConfig

    return MergeConfig.from_file(config, overrides)


def _plan(config: Path, overrides: tuple[str, ...], *, overwrite: bool) -> MergePlan:
    from shardmerge.api import plan

    planned = plan(_load(config, overrides), overwrite=overwrite)
    # A plan lives as long as the process; of a large model it is a million objects, not to be searched for garbage.
    gc.freeze()
    return planned


@cli.command()
@_config_options
@click.option("--quiet", is_flag=True, help="No progress and no table; only errors and notes.")
def run(config: Path, overrides: tuple[str, ...], overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Merge as CONFIG says. Run it again to take up an interrupted merge."""
    from shardmerge.api import merge
    from shardmerge.progress import show_progress
    from shardmerge.report import size_table

    planned = _plan(config, overrides, overwrite=overwrite)
    for warning in planned.warnings:
        click.echo(f"note: {warning}", err=True)
    try:
        with show_progress(quiet=quiet) as progress:
            report = merge(planned, progress=progress)
    except KeyboardInterrupt:
        click.echo("\nshardmerge: interrupted; run the same command again to take it up", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    for warning in report.warnings[len(planned.warnings) :]:
        click.echo(f"note: {warning}", err=True)
    if as_json:
        _print_json(report.to_json())
    elif not quiet:
        click.echo(f"{report.output}: {report.targets} weights merged\n\n{size_table(report)}")


@cli.command()
@_config_options
def plan(config: Path, overrides: tuple[str, ...], overwrite: bool, as_json: bool) -> None:
    """Say what `run` would do, and every reason why it would not. Reads headers only."""
    from shardmerge.report import describe_plan, plan_summary

    planned = _plan(config, overrides, overwrite=overwrite)
    if as_json:
        _print_json(plan_summary(planned))
    else:
        click.echo(describe_plan(planned))


@cli.command()
@click.argument("path")
@_json_option
def inspect(path: str, as_json: bool) -> None:
    """Say what PATH is: a checkpoint or an adapter, of what kind, size, dtype, rank and scaling."""
    from shardmerge.inspection import describe, inspect_path

    found = inspect_path(path)
    if as_json:
        _print_json(found)
    else:
        click.echo(describe(found))


@cli.command()
@click.argument("adapter")
@click.option("-o", "target", type=click.Path(path_type=Path), default=Path("config.yaml"), show_default=True)
@_json_option
def init(adapter: str, target: Path, as_json: bool) -> None:
    """Write a commented config for ADAPTER, from its own metadata. `-o -` prints it."""
    from shardmerge.inspection import starter_config

    printed = str(target) == "-"
    text = starter_config(adapter, "config.yaml" if printed else str(target))
    if not printed:
        _write_new(target, text)
    if as_json:
        _print_json({"config": text, "path": None if printed else str(target)})
    elif printed:
        click.echo(text, nl=False)
    else:
        click.echo(f"{target}: written; look it over, then: shardmerge plan {target}", err=True)


@cli.command()
@click.argument("output")
@click.option("--prompt", help="Answer this and leave; - reads it from stdin.")
@click.option("--template", help="Put the prompt where {} stands in this text, instead of the model's chat template.")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
def chat(output: str, prompt: str | None, template: str | None, system: str | None, max_new_tokens: int) -> None:
    """Talk to the model in OUTPUT. Needs the extra: pip install 'shardmerge[hf]'."""
    from shardmerge.chat import load, loop, once

    # The loop outlives Ctrl-C, so that it can stop an answer; it must not take a termination for one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    model = load(output, template)
    if prompt is None:
        loop(model, system=system, max_new_tokens=max_new_tokens)
    else:
        once(model, prompt, system=system, max_new_tokens=max_new_tokens)


def _write_new(target: Path, text: str) -> None:
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{target} exists already; nothing was written. Remove it, or name another with -o") from None
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None


def _on_termination(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGTERM, _on_termination)
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("shardmerge: interrupted", err=True)
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; pointing stdout elsewhere keeps the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
