"""``inspect``, ``init`` and ``schema``: what a path is, a config to begin with, and what a config may hold."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from shardmerge.cli import options
from shardmerge.cli.printing import examples, json_option, print_json, say
from shardmerge.errors import ConfigError
from shardmerge.system.terminal_text import one_line, shown


@click.command(
    short_help="Describe a model, an adapter or a merge.",
    epilog=examples("inspect output/merged", "inspect org/adapter@main --json"),
)
@click.argument("path")
@options.quiet
@json_option
def inspect(path: str, as_json: bool, quiet: bool) -> None:
    """Say what PATH is: a checkpoint, an adapter, a merge or a GGUF file; its kind, size, dtype, rank and scaling."""
    from shardmerge.api import library
    from shardmerge.reporting.inspection import describe

    found = library.inspect(path)
    if as_json:
        print_json(found)
    elif not quiet:
        say(describe({**found, "problems": [one_line(text) for text in found.get("problems", [])]}))


@click.command(
    short_help="Write a config to begin with.",
    epilog=examples("init output/sft", "init org/adapter --base org/model --output output/merged", "init sft -o -"),
)
@click.argument("adapter")
@click.option("-o", "target", type=click.Path(path_type=Path), default=Path("config.yaml"), show_default=True)
@click.option("--base", metavar="PLACE", help="What to merge into.  [default: what the adapter was trained on]")
@click.option("--output", metavar="DIR", help="Where the merged model is to go.  [default: ADAPTER-merged]")
@options.quiet
@json_option
def init(adapter: str, target: Path, base: str | None, output: str | None, as_json: bool, quiet: bool) -> None:
    """Write a commented config for ADAPTER, from its own metadata. `-o -` prints it."""
    from shardmerge.api import library

    printed = str(target) == "-"
    text = library.init(adapter, base=base, output=output, name="config.yaml" if printed else str(target))
    if not printed:
        _write_new(target, text)
    if as_json:
        print_json({"config": text, "path": None if printed else str(target)})
    elif printed:
        # A terminal must not get an adapter's control characters; a file or a pipe gets the config's own bytes.
        click.echo(shown(text) if sys.stdout.isatty() else text, nl=False)
    elif not quiet:
        say(f"{target}: written; look it over, then: shardmerge plan {target}", err=True)


@click.command(short_help="Print the config's JSON schema.", epilog=examples("schema > shardmerge.schema.json"))
@options.quiet
@json_option
def schema(as_json: bool, quiet: bool) -> None:
    """Print the JSON schema of a config, with which editors complete and check it."""
    from shardmerge.reporting.starter import SCHEMA

    click.echo(SCHEMA.read_text(encoding="utf-8"), nl=False)


def _write_new(target: Path, text: str) -> None:
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{target} exists already; nothing was written. Remove it, or name another with -o") from None
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from None
