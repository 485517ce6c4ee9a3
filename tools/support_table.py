"""Write the table of docs/formats.md from the registry, so that it cannot promise more than the code does."""

from __future__ import annotations

import re
from pathlib import Path

from shardmerge.adapters.formats.peft import REFUSED_TYPES
from shardmerge.adapters.registry import FORMATS, METHODS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
_BEGIN, _END = "<!-- support table: tools/support_table.py -->", "<!-- end of the table -->"


def table_text() -> str:
    """Formats, methods by their title, and what is refused by name."""
    lines = ["| format | what it is |", "|---|---|"]
    for format_ in sorted(FORMATS.values(), key=lambda format_: (format_.name != "peft", format_.name)):
        lines.append(f"| `{format_.name}` | {format_.summary} |")
    lines += ["", "| method of PEFT | `peft_type` | described in | |", "|---|---|---|---|"]
    for method in sorted(METHODS.values(), key=lambda method: (method.peft_type != "LORA", method.title.lower())):
        lines.append(f"| {method.title} | `{method.peft_type}` | {method.paper or '-'} | {method.note} |")
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED_TYPES.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    lines += ["", "Refused by name, with the reason:", ""]
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page with the current table in it."""
    between = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    return between.sub(lambda _: f"{_BEGIN}\n\n{table_text()}\n\n{_END}", page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
