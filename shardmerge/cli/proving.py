"""``verify`` and ``compare``: whether an output is what it should be."""

from __future__ import annotations

from pathlib import Path

import click

from shardmerge.cli import options
from shardmerge.cli.logs import keep_log_out_of, logged
from shardmerge.cli.printing import examples, json_option, print_json, say, with_options
from shardmerge.errors import VerifyError


@click.command(
    short_help="Verify a finished merge.",
    epilog=examples("verify output/merged", "verify output/merged --all", "verify output/merged --base /mnt/base"),
)
@click.argument("output", type=click.Path(path_type=Path))
@options.moved
@click.option(
    "--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Rows of each tensor to compute again."
)
@click.option("--all", "all_rows", is_flag=True, help="Compute all rows of every merged tensor again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the rows.")
@click.option("--partial", is_flag=True, help="Succeed if a part could not be verified (the base is gone, say).")
@options.quiet
@json_option
@logged
def verify(
    output: Path,
    base: str | None,
    adapters: tuple[str, ...],
    rows: int,
    all_rows: bool,
    seed: int,
    partial: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Verify that OUTPUT is what its record, the base and the adapters make. Nothing is written into it.

    Exits with 6 if something is wrong, or if something could not be verified and --partial was not given.
    """
    from shardmerge.api import library
    from shardmerge.cli.progress import show_progress
    from shardmerge.verification.findings import describe

    keep_log_out_of(output)
    with show_progress(quiet=quiet) as progress:
        of_tensor = None if all_rows else rows
        report = library.verify(output, base=base, adapters=adapters, rows=of_tensor, seed=seed, progress=progress)
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        say(with_options(describe(report)))
    try:
        report.raise_for_status(partial=partial)
    except VerifyError as error:
        say(f"shardmerge: {with_options(str(error))}", err=True)
        raise click.exceptions.Exit(error.exit_code) from None
    if report.complete:
        from shardmerge.reporting.verified import remember

        remember(output, report.record_checksum)


@click.command(
    short_help="Compare a merge with base + adapter.",
    epilog=examples("compare output/merged", 'compare output/merged --prompt "Who are you?" --dtype bfloat16'),
)
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
@options.device
@options.moved
@options.quiet
@json_option
def compare(
    output: Path,
    prompts: tuple[str, ...],
    template: str | None,
    max_new_tokens: int,
    dtype: str,
    device: str,
    base: str | None,
    adapters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare the answers of the model in OUTPUT with those of its base + adapter, not merged.

    Loads one after the other. Needs transformers and PEFT: pip install transformers peft
    """
    from shardmerge.api import library

    found = library.compare(
        output,
        base=base,
        adapters=adapters,
        prompts=prompts or None,
        template=template,
        dtype=dtype,
        device=device,
        max_new_tokens=max_new_tokens,
    )
    from shardmerge.inference.comparison import figures

    if as_json:
        print_json(found.to_json())
    elif not quiet:
        say(figures.describe(found))
    if not found.same:
        say(f"shardmerge: {figures.difference(found)}", err=True)
        raise click.exceptions.Exit(VerifyError.exit_code)
