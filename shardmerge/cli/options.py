"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from shardmerge.cli import environment
from shardmerge.cli.printing import Command, json_option
from shardmerge.config.choices import Format, OutputDtype, Quantization, Quantized
from shardmerge.errors import ConfigError


def _all(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


quiet = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    envvar=environment.QUIET,
    show_envvar=True,
    help="Print only errors, warnings and notes.",
)

allow_config_loss = click.option(
    "--allow-config-loss",
    is_flag=True,
    help="Write a GGUF file although llama.cpp ignores a setting of config.json (only with --format gguf).",
)

overrides = click.option(
    "-s", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a key of the config, by its dotted path."
)

#: A config and what can be said beside it.
config = _all(
    click.argument("config", type=click.Path(dir_okay=False, path_type=Path)),
    overrides,
    click.option("--allow-config-loss", is_flag=True, help="Set output.allow_config_loss, for a GGUF file."),
    click.option("--overwrite", is_flag=True, help="Replace a finished merge, or an unfinished one of another config."),
    json_option,
)

#: Where the result goes, and how it is stored.
output = _all(
    click.option("-o", "--output", required=True, metavar="DIR", help="An empty directory, or one to be created."),
    click.option("--format", "format_", type=click.Choice(get_args(Format)), default="safetensors", show_default=True),
    click.option(
        "--quantization",
        type=click.Choice(get_args(Quantization)),
        help="GGUF quantization type (only with --format gguf).  [default: q8_0]",
    ),
    allow_config_loss,
    click.option("--dtype", type=click.Choice(get_args(OutputDtype)), default="same", show_default=True),
    click.option(
        "--quantized",
        type=click.Choice(get_args(Quantized)),
        default="auto",
        show_default=True,
        help="What becomes of a quantised base's weights.",
    ),
    click.option(
        "--max-shard-size", metavar="SIZE", default="same", show_default=True, help="same, or a size such as 5GB."
    ),
    click.option("--overwrite", is_flag=True, help="Replace what an earlier run has written there."),
    quiet,
    json_option,
)

device = click.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="cpu, cuda or cuda:1; auto is cpu."
)

#: Where the base and the adapters of a finished merge are now.
moved = _all(
    click.option("--base", metavar="PLACE", help="Where the base is now, if it was moved."),
    click.option(
        "--adapter", "adapters", multiple=True, metavar="PLACE", help="Where each adapter is now, all in their order."
    ),
)


def output_section(
    path: str,
    format_: str,
    quantization: str | None,
    dtype: str,
    quantized: str,
    max_shard_size: str,
    *,
    allow_config_loss: bool,
) -> dict[str, Any]:
    """The config's section ``output`` of the options `output`. `ConfigError` where one has no effect."""
    for option, value in (("--quantization", quantization), ("--allow-config-loss", allow_config_loss)):
        if value and format_ != "gguf":
            raise ConfigError(f"{option} is for --format gguf")
    section: dict[str, Any] = {
        "path": path,
        "format": format_,
        "dtype": dtype,
        "quantized": quantized,
        "max_shard_size": max_shard_size,
    }
    if quantization:
        section["quantization"] = quantization
    if allow_config_loss:
        section["allow_config_loss"] = True
    return section
