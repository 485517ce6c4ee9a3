"""Sizes, times and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardmerge.spec.notices import severity
from shardmerge.system.terminal_text import one_line

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def human_bytes(count: float) -> str:
    """``"269.1 MB"``, in powers of 1000 like the Hub and ``ls --si``."""
    unit = 0
    while abs(count) >= 999.95 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def human_seconds(seconds: float) -> str:
    """``"7.3 s"`` or ``"3 min 20 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int, noun: str) -> str:
    """``"1 weight"``, ``"1,000 weights"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns padded with spaces; those in ``right`` are aligned to the right."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = set(right)
    lines = (
        "  ".join(
            cell.rjust(width) if column in to_the_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def labelled(notice: str) -> str:
    """The line for a warning or a note."""
    return f"{severity(notice)}: {one_line(notice)}"


def notices(warnings: Sequence[str]) -> list[dict[str, str]]:
    """The same texts, each with its severity: ``warning`` or ``note``."""
    return [{"severity": severity(text), "text": text} for text in warnings]
