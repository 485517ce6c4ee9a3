"""``inspect``, ``init`` and ``schema``: what a path is, a config to begin with, and what may stand in one."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from shardmerge.cli.printing import json_option, print_json, say
from shardmerge.errors import ConfigError
from shardmerge.system.terminal_text import one_line, shown


@click.command()
@click.argument("path")
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Say what PATH is: a checkpoint, an adapter or a GGUF file; of what kind, size, dtype, rank, scaling, origin."""
    from shardmerge.reporting.inspection import describe, inspect_path

    found = inspect_path(path)
    if as_json:
        print_json(found)
    else:
        say(describe({**found, "problems": [one_line(text) for text in found.get("problems", [])]}))


@click.command()
@click.argument("adapter")
@click.option("-o", "target", type=click.Path(path_type=Path), default=Path("config.yaml"), show_default=True)
@click.option("--base", metavar="PLACE", help="What to merge into.  [default: what the adapter was trained on]")
@click.option("--output", metavar="DIR", help="Where the merged model shall go.  [default: ADAPTER-merged]")
@json_option
def init(adapter: str, target: Path, base: str | None, output: str | None, as_json: bool) -> None:
    """Write a commented config for ADAPTER, from its own metadata. `-o -` prints it."""
    from shardmerge.reporting.starter import starter_config

    printed = str(target) == "-"
    text = starter_config(adapter, "config.yaml" if printed else str(target), base, output)
    if not printed:
        _write_new(target, text)
    if as_json:
        print_json({"config": text, "path": None if printed else str(target)})
    elif printed:
        # Elsewhere than on a terminal it is a config, whose bytes count.
        click.echo(shown(text) if sys.stdout.isatty() else text, nl=False)
    else:
        say(f"{target}: written; look it over, then: shardmerge plan {target}", err=True)


@click.command()
def schema() -> None:
    """Print the JSON schema of a config, by which editors complete and check it."""
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
