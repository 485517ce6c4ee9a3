"""Progress of a merge on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shardmerge.reporting.text import human_bytes

if TYPE_CHECKING:
    from shardmerge.api.progress import Progress

#: Seconds between two lines where there is no terminal.
LINE_SECONDS = 5.0


@contextmanager
def show_progress(*, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A callback for `shardmerge.merge` that shows the progress until the block is left."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        yield _Lines()


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc="starting", file=sys.stderr, dynamic_ncols=True) as bar:
        doing = ""

        def callback(progress: Progress) -> None:
            nonlocal doing
            if doing != progress.doing:
                doing = progress.doing
                bar.reset(progress.total)
                bar.set_description(doing, refresh=False)
                bar.initial = bar.n = progress.done  # shards of an earlier run do not count for the rate
            bar.set_postfix_str(f"shard {progress.shard_number}/{progress.shards}", refresh=False)
            bar.update(progress.done - bar.n)

        yield callback


class _Lines:
    """A line at the start, then one every few seconds, then one at the end."""

    def __init__(self) -> None:
        self._doing = ""
        self._started = 0.0
        self._initial = 0
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._doing != progress.doing:
            self._doing = progress.doing
            self._started, self._initial, self._last = now, progress.done, now - LINE_SECONDS
        if now - self._last < LINE_SECONDS and progress.done < progress.total:
            return
        self._last = now
        elapsed = now - self._started
        rate = (progress.done - self._initial) / elapsed if elapsed > 0.5 else 0.0
        left = f", {human_bytes(rate)}/s, {(progress.total - progress.done) / rate:.0f} s left" if rate else ""
        percent = 100 * progress.done / max(progress.total, 1)
        done, total = human_bytes(progress.done), human_bytes(progress.total)
        shard = f"shard {progress.shard_number}/{progress.shards}"
        print(f"{self._doing}: {percent:3.0f}%, {done} of {total}, {shard}{left}", file=sys.stderr, flush=True)
