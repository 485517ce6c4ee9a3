"""Plots of the benchmark: valid, small files whose colours can be told on white and on dark pages."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot
from benchmarks.runs import Group
from tests.support.bench_runs import group, usage

WHITE, DARK = "#ffffff", "#0d1117"


def made_up() -> list[Group]:
    seconds = {"shardmerge": 3.5, "peft": 17.0, "mergekit": 19.0, "copy": 1.2, "import-torch": 1.3, "direct-read": 2.0}
    return [
        group(
            shape,
            {
                tool: [usage(value * scale * run, int(300 * scale)) for run in (1, 1.1)]
                for tool, value in seconds.items()
            },
        )
        for shape, scale in (("tinyllama", 1), ("qwen3-moe", 1.7), ("llama3-405b", 3), ("llama3-8b", 7))
    ]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", [WHITE, DARK])
def test_colours_can_be_told_on_either_page(page: str) -> None:
    assert contrast(plot.INK, page) >= 4, "text"
    assert all(contrast(colour, page) >= 3 for colour, _ in plot.LINES.values())


def test_files_are_valid_and_small() -> None:
    files = plot.charts(made_up())
    assert sorted(files) == ["memory.png", "memory.svg", "time.png", "time.svg"]
    for name, data in files.items():
        assert len(data) < 60_000, name
        if name.endswith(".png"):
            image = pytest.importorskip("PIL.Image").open(io.BytesIO(data))
            image.load()
            assert image.size[0] >= 600
            assert image.convert("RGBA").getpixel((1, image.size[1] // 2))[3] == 0, "the page is seen through it"
        else:
            root = ElementTree.fromstring(data)
            assert root.tag.endswith("svg")


def test_every_tool_has_a_line_in_the_chart_it_belongs_to() -> None:
    files = plot.charts(made_up())
    texts = {name: data.decode() for name, data in files.items() if name.endswith(".svg")}
    for name in ("shardmerge", "PEFT", "mergekit", "import torch", "qwen3-moe"):
        assert all(name in text for text in texts.values()), name
    assert "durable copy" in texts["time.svg"]
    assert "durable copy" not in texts["memory.svg"], "its memory cannot be told from the measuring process's"
    assert "direct" not in texts["time.svg"]


def test_same_runs_give_the_same_files() -> None:
    assert plot.charts(made_up()) == plot.charts(made_up())


def test_line_has_medians_and_range_by_size() -> None:
    small = group("tinyllama", {"peft": [usage(1), usage(5), usage(2), usage(9, exit_code=1)]})
    large = group("llama3-8b", {"peft": [usage(7)], "copy": [usage(3)]})
    of_peft, of_copy = plot.lines([large, small], ["peft", "mergekit", "copy"], lambda usage: usage.seconds)
    assert of_peft.tool == "peft"
    assert of_peft.sizes == pytest.approx((2.2, 16.06), abs=0.01)
    assert (of_peft.middle, of_peft.least, of_peft.most) == ((2, 7), (1, 7), (5, 7))
    assert of_copy.middle == (3,)


def test_swept_ranks_are_no_points_of_a_line() -> None:
    groups = [group("tinyllama", {"shardmerge": [usage(1)]}), group("tinyllama", {"shardmerge": [usage(9)]}, rank=256)]
    assert plot.comparable(groups) == groups[:1]


def test_session_in_a_file_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    events = [{"event": "begin"}, *(of.line(run) for of in made_up() for run in of.runs)]
    results.write_text("\n".join(map(json.dumps, events)))
    plot.main([str(results), "--out", str(tmp_path / "images")])
    assert len(list((tmp_path / "images").iterdir())) == 4
    assert "memory.svg" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"event": "begin"}\n'])
def test_nothing_to_draw_is_said(tmp_path: Path, text: str) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(text)
    with pytest.raises(SystemExit, match=r"benchmarks\.plot"):
        plot.main([str(results), "--out", str(tmp_path / "images")])
    assert not (tmp_path / "images").exists()
