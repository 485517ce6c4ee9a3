"""Write the tables of docs/ from the registries, so that they cannot promise more than the code does."""

from __future__ import annotations

import re
from pathlib import Path

from shardmerge.adapters.formats.peft import REFUSED_TYPES
from shardmerge.adapters.registry import FORMATS, METHODS
from shardmerge.codecs.registry import CODECS
from shardmerge.planning.quantised_output import EXCEPTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, QUANTISED_PAGE = DOCS / "formats.md", DOCS / "quantised.md"
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


def quantised_table_text() -> str:
    """Formats that bases are quantised in, and what an output can be of each."""
    lines = ["| format | `quant_method` | mixed | dense | same |", "|---|---|---|---|---|"]
    for codec in (codec for codec in CODECS.values() if codec.title):
        mixed = [method for method in codec.methods if method in EXCEPTIONS]
        only = "yes" if len(mixed) == len(codec.methods) else ", ".join(map(_method, mixed)) or "no"
        lines.append(f"| {codec.title} | {', '.join(map(_method, codec.methods))} | {only} | yes | yes |")
    return "\n".join(lines)


def _method(name: str) -> str:
    return f"`{name}`" if name else "none (ComfyUI)"


def updated(page: str, text: str) -> str:
    """The page with the current table in it."""
    between = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    return between.sub(lambda _: f"{_BEGIN}\n\n{text}\n\n{_END}", page)


TABLES = {PAGE: table_text, QUANTISED_PAGE: quantised_table_text}

if __name__ == "__main__":
    for path, text in TABLES.items():
        path.write_text(updated(path.read_text(encoding="utf-8"), text()), encoding="utf-8")
