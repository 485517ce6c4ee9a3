"""The command line: parse, construct, call, print. Results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from typing import NoReturn

import click

from shardmerge.cli import describing, environment, merging, proving, talking
from shardmerge.cli.printing import Group, show_traceback, show_usage
from shardmerge.system.garbage import process_is_ours
from shardmerge.system.interrupt import INTERRUPTED, interrupt_on_signals, is_stopping
from shardmerge.version import __version__


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=environment.EPILOG)
@click.version_option(__version__, prog_name="shardmerge")
def cli() -> None:
    """Fold a trained adapter (LoRA and its relatives) into a model's weights, streaming.

    \b
    Examples:
      shardmerge merge org/model output/sft -o output/merged
      shardmerge init output/sft && shardmerge run config.yaml
      shardmerge verify output/merged

    Exit codes: 0 done; 1 a bug; 2 usage or config; 3 the plan is refused; 4 a file is malformed; 5 reading or writing
    failed; 6 verification failed; 7 the output belongs to another merge; 130 interrupted.

    Completion in bash: eval "$(_SHARDMERGE_COMPLETE=bash_source shardmerge)"; zsh and fish likewise.
    """
    environment.warn_of_unknown()


for _command in (
    merging.run,
    merging.merge,
    merging.plan,
    merging.export,
    proving.verify,
    proving.compare,
    describing.inspect,
    describing.init,
    describing.schema,
    talking.chat,
):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line and end the process; `shardmerge.cli.entry` is the console script."""
    sys.excepthook = show_traceback
    try:
        interrupt_on_signals()
        _leave(_run())
    except (KeyboardInterrupt, click.Abort):
        click.echo("shardmerge: interrupted", err=True)
    except Exception:
        if not is_stopping():
            raise
        # What an interrupt became in code that is not ours.
        click.echo("shardmerge: interrupted", err=True)
    _leave(INTERRUPTED)


def _run() -> int:
    process_is_ours()
    # Torch imports numpy, whose OpenBLAS starts a thread for every core, that waits for work at full speed at first. We
    # give it none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Where numpy is not installed, importing torch warns of it. Nothing that we ask of torch needs numpy.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        show_usage(error)
        code = error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone; pointing stdout elsewhere keeps the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return code if isinstance(code, int) else 0


def _leave(code: int) -> NoReturn:
    """End the process at once: to take torch apart would last longer than to plan a merge, and all is on the disk."""
    sys.stderr.flush()
    os._exit(code)
