"""The README's promises are each held by tests, and docs/guarantees.md says by which."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.builders import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
_TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def section(text: str, heading: str) -> str:
    """What stands below a heading of level 2, up to the next."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def promises() -> list[str]:
    """The items of the README's section, each in one line; a paragraph before or after the list is not one."""
    items = re.split(r"\n\n|\n(?=- )", section(README, "What it guarantees").strip())
    return [" ".join(item.split()) for item in items if item.startswith("- ")]


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the rows of a Markdown table, without its head."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| promise"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_there_are_promises() -> None:
    assert len(promises()) >= 8


@pytest.mark.parametrize("promise", promises(), ids=lambda promise: promise[:40])
def test_every_promise_leads_to_its_tests(promise: str) -> None:
    (anchor,) = re.findall(r"\]\(docs/guarantees\.md#([\w-]+)\)", promise)
    headings = re.findall(r"^## (.+)$", GUARANTEES, re.MULTILINE)
    (heading,) = [heading for heading in headings if heading.lower().replace(" ", "-") == anchor]
    assert list(rows(section(GUARANTEES, heading)))


def test_every_section_is_of_a_promise() -> None:
    headings = re.findall(r"^## (.+)$", GUARANTEES, re.MULTILINE)
    for heading in headings:
        assert f"docs/guarantees.md#{heading.lower().replace(' ', '-')}" in section(README, "What it guarantees")


def test_every_test_is_there() -> None:
    functions = {
        (path.name, name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for promise, tests in rows(GUARANTEES):
        named = _TEST.findall(tests)
        assert named, promise
        for file, name in named:
            assert (file, name) in functions, f"{file}::{name}, of: {promise}"
