"""Print results and errors, with the exit codes of errors, for every command."""

from __future__ import annotations

import io
import json
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import click

from shardmerge.errors import ConfigError, LimitError, PlanError, ShardmergeError, VerifyError
from shardmerge.system.interrupt import is_stopping
from shardmerge.system.limits import explained, hint
from shardmerge.system.terminal_text import one_line, shown, shown_json

_AS_JSON = "shardmerge.as_json"
Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """Turns shardmerge's errors into a message and an exit code, for every command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Looked for by hand, since a command line that is wrong is not parsed to its end.
        ctx.meta[_AS_JSON] = "--json" in args
        with reported(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with reported(ctx):
            return super().invoke(ctx)


@contextmanager
def reported(ctx: click.Context) -> Iterator[None]:
    """Whatever goes wrong within the block is reported, as JSON too where that is wanted."""
    try:
        yield
    except ShardmergeError as error:
        if ctx.meta[_AS_JSON]:
            _print_error(type(error).__name__, error.exit_code, [*map(with_options, error.problems)])
        say(f"shardmerge: {with_options(_message(error))}{hint(str(error))}", err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    except (click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except click.UsageError as error:
        if ctx.meta[_AS_JSON]:
            _print_error("UsageError", error.exit_code, [error.format_message()])
        raise
    except Exception as error:
        why = explained(error)
        if why is None or is_stopping():
            raise
        if ctx.meta[_AS_JSON]:
            _print_error("LimitError", LimitError.exit_code, [why])
        say(f"shardmerge: {why}", err=True)
        raise click.exceptions.Exit(LimitError.exit_code) from None


def _message(error: ShardmergeError) -> str:
    """An error's message; line breaks only where the error itself has them."""
    if isinstance(error, PlanError):
        return "\n".join([str(error).partition("\n")[0], *(f"  - {one_line(text)}" for text in error.problems)])
    # Of these two, lists are of what stands in the user's own config, and of what was made one line each.
    return str(error) if isinstance(error, (ConfigError, VerifyError)) else one_line(str(error))


#: What the library's messages call by the name of a parameter, and the command line by an option.
_OPTIONS = {
    "overwrite=True": "--overwrite",
    "partial=True": "--partial",
    "template=": "--template",
    "prompts=": "--prompt",
    "base=": "--base",
    "adapters=": "--adapter",
    "output.allow_config_loss: true": "--allow-config-loss (output.allow_config_loss: true)",
}
_PARAMETER = re.compile(r"(?<![\w.=/-])(" + "|".join(map(re.escape, _OPTIONS)) + r")(?![\w/])")


def with_options(text: str) -> str:
    """A message of the library in the terms of the command line."""
    return _PARAMETER.sub(lambda match: _OPTIONS[match.group()], text)


def examples(*commands: str) -> str:
    """An epilog for a command's help. The first character keeps click from joining the lines."""
    return "\b\nExamples:\n" + "\n".join(f"  shardmerge {command}" for command in commands)


def _print_error(name: str, exit_code: int, problems: Sequence[str]) -> None:
    print_json({"error": name, "exit_code": exit_code, "problems": list(problems)})


def _remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    # `meta` is shared with the group's context, which reports the errors.
    ctx.meta[_AS_JSON] = value
    return value


json_option = click.option("--json", "as_json", is_flag=True, callback=_remember, help="Print the result as JSON.")


def say(text: str, *, err: bool = False) -> None:
    """Print text that may hold untrusted words; control characters are escaped."""
    click.echo(shown(text), err=err)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unhandled error, whose message may contain untrusted text."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)


def show_usage(error: click.ClickException) -> None:
    """Print click's message about a wrong command line, in which a shell may have put names of files."""
    text = io.StringIO()
    error.show(file=text)
    say(text.getvalue().rstrip(), err=True)


def print_json(value: Any) -> None:
    click.echo(shown_json(json.dumps(value, indent=2, ensure_ascii=False)))
