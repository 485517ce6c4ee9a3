"""``chat``: talk to a merged model, or to its base."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click

from shardmerge.cli import options
from shardmerge.cli.printing import examples, json_option, print_json, say
from shardmerge.errors import ConfigError
from shardmerge.system.limits import check_room_for_torch
from shardmerge.system.terminal_text import one_line


@click.command(
    short_help="Talk to a merged model.",
    epilog=examples(
        "chat output/merged", 'chat output/merged --prompt "Who are you?"', "chat output/merged --adapter-off"
    ),
)
@click.argument("output")
@click.option("--prompt", help="Answer this and leave; - reads it from stdin.")
@click.option("--template", help="Put the prompt where {} stands in this text, instead of the model's chat template.")
@click.option("--system", help="The system message, which comes before the conversation.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--adapter-off", is_flag=True, help="Talk to the base that OUTPUT was merged from.")
@click.option("--base", metavar="PLACE", help="With --adapter-off: where the base is now.")
@options.device
@options.quiet
@json_option
def chat(
    output: str,
    prompt: str | None,
    template: str | None,
    system: str | None,
    max_new_tokens: int,
    adapter_off: bool,
    base: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Talk to the model in OUTPUT. Needs transformers: pip install transformers

    On a terminal /help lists the commands, the arrow keys bring back earlier lines, and Ctrl-C stops an answer and not
    the program. What an answer holds of commands to the terminal is shown as text; a pipe gets it as it is.
    """
    from shardmerge.inference.chat import load, loop, once
    from shardmerge.inference.chat.terminal import Terminal

    if as_json and prompt is None:
        raise ConfigError("--json is for one answer: give --prompt")
    if base and not adapter_off:
        raise ConfigError("--base says where the base is, to talk to it with --adapter-off")
    # The loop outlives Ctrl-C, so that it can stop an answer; it must not take a termination for one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if adapter_off:
        from shardmerge.reporting.origin import read_origin

        output = str(read_origin(Path(output), base).base_folder())
        if not quiet:
            say(f"this is the base, without the adapter: {output}", err=True)
    check_room_for_torch()
    # What is typed meanwhile is the first line, which is shown when it is asked for.
    with _loading(output, quiet=quiet or as_json), Terminal(sys.stdin).muted() if prompt is None else nullcontext():
        model = load(output, template, device)
    if prompt is None:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        loop(model, system=system, max_new_tokens=max_new_tokens)
        return
    asked, answer = once(model, prompt, system=system, max_new_tokens=max_new_tokens, quiet=as_json)
    if as_json:
        print_json({"model": output, "system": system, "prompt": asked, "answer": answer})


@contextmanager
def _loading(output: str, *, quiet: bool) -> Iterator[None]:
    """Say on a terminal that a model is loaded, which may take a minute, and then how long it took."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from shardmerge.reporting.text import human_bytes, human_seconds

    size = sum(file.stat().st_size for file in Path(output).glob("*.safetensors") if file.is_file())
    say(
        f"loading {one_line(output)} ({human_bytes(size)}), which takes as long as to read it, and some seconds",
        err=True,
    )
    started = time.monotonic()
    yield
    say(f"loaded in {human_seconds(time.monotonic() - started)}", err=True)
