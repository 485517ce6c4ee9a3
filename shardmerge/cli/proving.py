"""``verify`` and ``compare``: whether an output is what it should be."""

from __future__ import annotations

from pathlib import Path

import click

from shardmerge.cli import environment
from shardmerge.cli.logs import keep_log_out_of, logged
from shardmerge.cli.printing import json_option, print_json, say
from shardmerge.errors import VerifyError
from shardmerge.system.limits import check_room_for_torch


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--base", metavar="PLACE", help="Where the base is now, if not where the merge found it.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PLACE", help="The same of the adapters, each in its turn."
)
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Rows of a merged tensor.")
@click.option("--all", "all_rows", is_flag=True, help="Compute all rows of every merged tensor again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the rows.")
@click.option("--partial", is_flag=True, help="Succeed though not everything can be verified: the base is gone, say.")
@environment.quiet_option("No progress and no table.")
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
    """Prove that OUTPUT is what its record, the base and the adapters make. Nothing is written into it.

    Exits with 6 if something is wrong, or if something could not be verified and --partial was not given.
    """
    check_room_for_torch()
    from shardmerge.api import library as api
    from shardmerge.cli.progress import show_progress
    from shardmerge.verification.findings import describe

    keep_log_out_of(output)
    failure: VerifyError | None = None
    with show_progress(quiet=quiet) as progress:
        of_tensor = None if all_rows else rows
        try:
            report = api.verify(
                output, base=base, adapters=adapters, rows=of_tensor, seed=seed, partial=partial, progress=progress
            )
        except VerifyError as error:
            if error.report is None:
                raise
            report, failure = error.report, error
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        say(describe(report))
    if failure is not None:
        say(f"shardmerge: {failure}", err=True)
        raise click.exceptions.Exit(failure.exit_code)
    if report.complete:
        from shardmerge.reporting.verified import remember

        remember(output)


@click.command()
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
    as_json: bool,
) -> None:
    """Compare the answers of the model in OUTPUT with those of its base + adapter, not merged.

    Loads one after the other. Needs transformers and PEFT: pip install transformers peft
    """
    check_room_for_torch()
    from shardmerge.inference.comparison import comparing

    found = comparing.compare(
        output,
        base=base,
        adapters=adapters,
        prompts=prompts or comparing.PROMPTS,
        template=template,
        dtype=dtype,
        device=device,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        print_json(found.to_json())
    else:
        say(comparing.describe(found))
    if not found.same:
        say(f"shardmerge: {comparing.difference(found)}", err=True)
        raise click.exceptions.Exit(VerifyError.exit_code)
