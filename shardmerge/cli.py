"""The command line: parse, construct, call, print. Results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

import click

from shardmerge.choices import Format, OutputDtype, Quantization
from shardmerge.errors import ConfigError, PlanError, ShardmergeError, VerifyError
from shardmerge.garbage import no_garbage_collection, process_is_ours
from shardmerge.interrupt import ADVICE, INTERRUPTED, stopping_in_time
from shardmerge.shown import one_line, shown, shown_json
from shardmerge.version import __version__

if TYPE_CHECKING:
    from shardmerge.config import MergeConfig
    from shardmerge.spec import MergePlan

_AS_JSON = "shardmerge.as_json"
Command = TypeVar("Command", bound=Callable[..., Any])


class _Group(click.Group):
    """Turns shardmerge's errors into a message and an exit code, for every command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Looked for by hand, since a command line that is wrong is not parsed to its end.
        ctx.meta[_AS_JSON] = "--json" in args
        with _told(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _told(ctx):
            return super().invoke(ctx)


@contextmanager
def _told(ctx: click.Context) -> Iterator[None]:
    """Whatever goes wrong within the block is told, as JSON too where that is wanted."""
    try:
        yield
    except ShardmergeError as error:
        if ctx.meta[_AS_JSON]:
            problems = error.problems if isinstance(error, PlanError) else [str(error)]
            _print_error(type(error).__name__, error.exit_code, problems)
        _say(f"shardmerge: {_message(error)}", err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    except click.UsageError as error:
        if ctx.meta[_AS_JSON]:
            _print_error("UsageError", error.exit_code, [error.format_message()])
        raise


def _message(error: ShardmergeError) -> str:
    """What an error says, with lines only where it has them by itself."""
    if isinstance(error, PlanError):
        return "\n".join([str(error).partition("\n")[0], *(f"  - {one_line(text)}" for text in error.problems)])
    # Of these two, lists are of what stands in the user's own config, and of what was made one line each.
    return str(error) if isinstance(error, (ConfigError, VerifyError)) else one_line(str(error))


def _print_error(name: str, exit_code: int, problems: Sequence[str]) -> None:
    _print_json({"error": name, "exit_code": exit_code, "problems": list(problems)})


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    # `meta` is shared with the group's context, which tells the errors.
    ctx.meta[_AS_JSON] = value
    return value


_json_option = click.option("--json", "as_json", is_flag=True, callback=_remember, help="Print the result as JSON.")


def _say(text: str, *, err: bool = False) -> None:
    """Print what may hold a stranger's words: none of them reaches the terminal as a command."""
    click.echo(shown(text), err=err)


def _print_json(value: Any) -> None:
    click.echo(shown_json(json.dumps(value, indent=2, ensure_ascii=False)))


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
    from shardmerge.config import MergeConfig

    return MergeConfig.from_file(config, overrides)


def _plan(config: Path, overrides: tuple[str, ...], *, overwrite: bool, allow_config_loss: bool) -> MergePlan:
    if allow_config_loss:
        overrides = (*overrides, "output.allow_config_loss=true")
    with no_garbage_collection():  # the modules are many objects, too
        from shardmerge.api import plan

        return plan(_load(config, overrides), overwrite=overwrite)


@cli.command()
@_config_options
@click.option("--quiet", is_flag=True, help="No progress and no table; only errors and notes.")
def run(
    config: Path, overrides: tuple[str, ...], allow_config_loss: bool, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Merge as CONFIG says. Run it again to take up an interrupted merge."""
    planned = _plan(config, overrides, overwrite=overwrite, allow_config_loss=allow_config_loss)
    _carry_out(planned, as_json=as_json, quiet=quiet)


def _carry_out(planned: MergePlan, *, as_json: bool, quiet: bool) -> None:
    """Merge, with progress and notes on stderr and the result on stdout."""
    from shardmerge.api import merge
    from shardmerge.progress import show_progress
    from shardmerge.report import next_steps, size_table

    for warning in planned.warnings:
        _say(f"note: {one_line(warning)}", err=True)
    try:
        with stopping_in_time(), show_progress(quiet=quiet) as progress:
            report = merge(planned, progress=progress)
    except KeyboardInterrupt:
        click.echo(f"\nshardmerge: {ADVICE}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    for warning in report.warnings[len(planned.warnings) :]:
        _say(f"note: {one_line(warning)}", err=True)
    if as_json:
        _print_json(report.to_json())
    elif not quiet:
        done = f"{report.targets} weights merged" if planned.adapters else "written"
        _say(f"{report.output}: {done}\n\n{size_table(report)}{next_steps(planned)}")


@cli.command()
@_config_options
def plan(config: Path, overrides: tuple[str, ...], allow_config_loss: bool, overwrite: bool, as_json: bool) -> None:
    """Say what `run` would do, and every reason why it would not. Reads headers only."""
    from shardmerge.report import describe_plan, plan_summary

    planned = _plan(config, overrides, overwrite=overwrite, allow_config_loss=allow_config_loss)
    if as_json:
        _print_json(plan_summary(planned))
    else:
        _say(describe_plan(planned))


@cli.command()
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where to; a directory that is empty or not there.")
@click.option("--format", "format_", type=click.Choice(get_args(Format)), default="safetensors", show_default=True)
@click.option("--quantization", type=click.Choice(get_args(Quantization)), help="Of a GGUF file.  [default: q8_0]")
@click.option("--allow-config-loss", is_flag=True, help="Of a GGUF file: though llama.cpp does not know a setting.")
@click.option("--dtype", type=click.Choice(get_args(OutputDtype)), default="same", show_default=True)
@click.option("--max-shard-size", metavar="SIZE", default="same", show_default=True, help="For example 5GB.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run has written there.")
@click.option("--quiet", is_flag=True, help="No progress and no table; only errors and notes.")
@_json_option
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
    from shardmerge.api import plan
    from shardmerge.config import ExportConfig

    if quantization and format_ != "gguf":
        raise ConfigError("--quantization is for --format gguf")
    if allow_config_loss and format_ != "gguf":
        raise ConfigError("--allow-config-loss is for --format gguf")
    place: dict[str, Any] = {"path": output, "format": format_, "dtype": dtype, "max_shard_size": max_shard_size}
    if allow_config_loss:
        place["allow_config_loss"] = True
    if quantization:
        place["quantization"] = quantization
    config = ExportConfig.from_dict({"base": model, "output": place}, "export")
    _carry_out(plan(config, overwrite=overwrite), as_json=as_json, quiet=quiet)


@cli.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--base", metavar="PLACE", help="Where the base is now, if not where the merge found it.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PLACE", help="The same of the adapters, each in its turn."
)
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Rows of a merged tensor.")
@click.option("--all", "all_rows", is_flag=True, help="Compute all rows of every merged tensor again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the rows.")
@click.option("--quiet", is_flag=True, help="No progress and no table.")
@_json_option
def verify(
    output: Path,
    base: str | None,
    adapters: tuple[str, ...],
    rows: int,
    all_rows: bool,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Prove that OUTPUT is what its record, the base and the adapters make. Nothing is written."""
    from shardmerge import api
    from shardmerge.progress import show_progress
    from shardmerge.verification import describe

    failure: VerifyError | None = None
    with show_progress(quiet=quiet) as progress:
        of_tensor = None if all_rows else rows
        try:
            report = api.verify(output, base=base, adapters=adapters, rows=of_tensor, seed=seed, progress=progress)
        except VerifyError as error:
            if error.report is None:
                raise
            report, failure = error.report, error
    if as_json:
        _print_json(report.to_json())
    elif not quiet:
        _say(describe(report))
    if failure is not None:
        _say(f"shardmerge: {failure}", err=True)
        raise click.exceptions.Exit(failure.exit_code)


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
        _say(describe({**found, "problems": [one_line(text) for text in found.get("problems", [])]}))


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
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="Ask this instead of the built-in prompts; may be repeated.")
@click.option("--template", help="Put the prompt where {} stands in this text, instead of the model's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What both models compute in.",
)
@click.option("--device", metavar="DEVICE", default="auto", show_default=True, help="cpu, cuda or cuda:1; auto is cpu.")
@click.option("--base", metavar="PLACE", help="Where the base is now, if not where the merge found it.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PLACE", help="The same of the adapters, each in its turn."
)
@_json_option
def compare(
    output: Path,
    prompts: tuple[str, ...],
    template: str | None,
    max_new_tokens: int,
    dtype: str,
    device: str,
    base: str | None,
    adapters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare the answers of the model in OUTPUT with those of its base + adapter, not merged.

    Loads one after the other. Needs the extra: pip install 'shardmerge[hf]'.
    """
    from shardmerge import comparison

    found = comparison.compare(
        output,
        base=base,
        adapters=adapters,
        prompts=prompts or comparison.PROMPTS,
        template=template,
        dtype=dtype,
        device=device,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        _print_json(found.to_json())
    else:
        _say(comparison.describe(found))
    if not found.same:
        _say(f"shardmerge: {comparison.difference(found)}", err=True)
        raise click.exceptions.Exit(VerifyError.exit_code)


@cli.command()
@click.argument("output")
@click.option("--prompt", help="Answer this and leave; - reads it from stdin.")
@click.option("--template", help="Put the prompt where {} stands in this text, instead of the model's chat template.")
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--adapter-off", is_flag=True, help="Talk to the base that OUTPUT was merged from.")
@click.option("--base", metavar="PLACE", help="With --adapter-off: where the base is now.")
@_json_option
def chat(
    output: str,
    prompt: str | None,
    template: str | None,
    system: str | None,
    max_new_tokens: int,
    adapter_off: bool,
    base: str | None,
    as_json: bool,
) -> None:
    """Talk to the model in OUTPUT. Needs the extra: pip install 'shardmerge[hf]'.

    On a terminal the arrow keys bring back earlier lines, and Ctrl-C stops an answer and not the program.
    """
    from shardmerge.chat import load, loop, once

    if as_json and prompt is None:
        raise ConfigError("--json is for one answer: give --prompt")
    if base and not adapter_off:
        raise ConfigError("--base says where the base is, to talk to it with --adapter-off")
    # The loop outlives Ctrl-C, so that it can stop an answer; it must not take a termination for one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if adapter_off:
        from shardmerge.origin import read_origin

        output = str(read_origin(Path(output), base).base_folder())
        click.echo(f"this is the base, without the adapter: {output}", err=True)
    model = load(output, template)
    if prompt is None:
        loop(model, system=system, max_new_tokens=max_new_tokens)
        return
    asked, answer = once(model, prompt, system=system, max_new_tokens=max_new_tokens, quiet=as_json)
    if as_json:
        _print_json({"model": output, "system": system, "prompt": asked, "answer": answer})


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
    process_is_ours()
    # Torch imports numpy, whose OpenBLAS starts a thread for every core, that waits for work at full speed at first. We
    # give it none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
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
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """End the process at once: to take torch apart would last longer than to plan a merge, and all is on the disk."""
    sys.stderr.flush()
    os._exit(code)
