"""Runs as JSON lines, ratios, the table and the verdict of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report, verdict
from benchmarks.runs import Group, cpu_seconds, ratio, read_groups, seconds
from benchmarks.verdict import Claim
from tests.support.bench_runs import MIB, group, usage


def rows(table: str) -> dict[str, list[str]]:
    """The table's body, by first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: rest for first, *rest in lines}


# --- ratios -----------------------------------------------------------------------------------------------------------


def test_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians() -> None:
    of = group("tiny", {"shardmerge": [usage(1), usage(9), usage(4)], "copy": [usage(1), usage(3), usage(8)]})
    assert ratio(of, "shardmerge", ["copy"], seconds) == 1  # of 1, 3 and 0.5; the medians are 4 and 3


def test_ratio_adds_yardsticks_up_and_can_take_the_larger() -> None:
    of = group("tiny", {"shardmerge": [usage(6)], "copy": [usage(2)], "import-torch": [usage(1)]})
    assert ratio(of, "shardmerge", ["copy", "import-torch"], seconds) == 2
    assert ratio(of, "shardmerge", ["copy", "import-torch"], seconds, max) == 3


def test_ratio_leaves_out_rounds_in_which_one_failed() -> None:
    failed = usage(100, exit_code=1)
    of = group("tiny", {"shardmerge": [usage(4), usage(2)], "copy": [failed, usage(1)]})
    assert ratio(of, "shardmerge", ["copy"], seconds) == 2
    assert ratio(of, "shardmerge", ["peft"], seconds) is None


def test_ratio_of_cpu_time() -> None:
    of = group("tiny", {"shardmerge": [usage(9, cpu=1)], "peft": [usage(1, cpu=4)]})
    assert ratio(of, "shardmerge", ["peft"], cpu_seconds) == 0.25


# --- lines of JSON ----------------------------------------------------------------------------------------------------


def test_last_session_comes_back_from_its_lines(tmp_path: Path) -> None:
    old = group("tiny", {"copy": [usage(1)]})
    new = [
        group("tiny", {"shardmerge": [usage(1.5, 3), usage(2)], "copy": [usage(1)]}, cache="cold"),
        group("tiny", {"shardmerge": [usage(7)]}, rank=64, memory_limit=MIB),
    ]
    events = [
        {"event": "begin"},
        *(old.line(run) for run in old.runs),
        {"event": "begin"},
        *(of.line(run) for of in new for run in of.runs),
        {"event": "claim", "text": "…"},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, events)) + "\n")
    assert read_groups(path) == new


def test_file_without_a_session_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"event": "run"}\n')
    with pytest.raises(ValueError, match="no line says"):
        read_groups(path)


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_has_medians_ranges_ratios_and_the_worst_peak() -> None:
    of = group(
        "tinyllama",
        {
            "shardmerge": [usage(4, 300), usage(2, 310), usage(3, 290)],
            "copy": [usage(2, 5), usage(2, 5), usage(2, 5)],
            "import-torch": [usage(1, 200), usage(1, 200), usage(1, 200)],
            "peft": [usage(30, 2500), usage(30, 2500), usage(30, 2500)],
        },
    )
    found = rows(report.table(of, floor=10 * MIB))
    assert found["shardmerge"] == [
        *("3", "3.00 (2.00–4.00)", "1.50", "1.00", "0.10"),
        *("–", "3.00", "1.36", "310", "2", "–"),
    ]
    assert found["copy"][-3] == "≤ 5", "what is no more than the measuring process's own may be less"
    assert found["peft"][2:5] == ["15.00", "10.00", "1.00"]


def test_table_says_the_speed_of_a_core() -> None:
    runs = {"shardmerge": [usage(2.2)], "shardmerge-one-core": [usage(4)]}
    found = rows(report.table(group("tinyllama", runs, cores=4, storage="memory"), 0))
    assert found["shardmerge"][5] == "0.25" and found["shardmerge-one-core"][5] == "0.55"


def test_table_says_what_failed_and_how() -> None:
    runs = {"peft": [usage(1, exit_code=137), usage(1, exit_code=-9)], "copy": [usage(1), usage(1, exit_code=1)]}
    free = rows(report.table(group("tiny", runs), 0))
    assert free["peft"][0] == "all 2 failed"
    assert free["copy"][0] == "1, and 1 failed"
    limited = rows(report.table(group("tiny", runs, memory_limit=MIB), 0))
    assert limited["peft"][0] == "all 2 killed at the limit"
    assert limited["copy"][0] == "1, and 1 failed", "an error of its own is not the limit's work"


def test_title_says_what_is_not_as_usual() -> None:
    assert group("tinyllama", {}).setting.title() == "tinyllama, 2.20 GB, rank 16, warm"
    odd = group(
        "tinyllama",
        {},
        dtype="float32",
        device="cuda",
        compute_dtype="float64",
        memory_limit=512 * MIB,
        storage="memory",
    )
    for word in ("output float32", "cuda", "float64", "536.9 MB of memory", "in memory"):
        assert word in odd.setting.title()


# --- the verdict ------------------------------------------------------------------------------------------------------


def judged(text: str, *groups: Group) -> list[Claim]:
    found = [claim for claim in verdict.claims(groups) if text in claim.text]
    assert found, text
    return found


def holds(text: str, *groups: Group) -> bool | None:
    (claim,) = judged(text, *groups)
    return claim.holds


def test_nothing_is_judged_that_was_not_measured() -> None:
    assert {claim.holds for claim in verdict.claims([])} == {None}
    small = group("tiny", {tool: [usage(1, 100)] for tool in ("shardmerge", "copy", "peft", "direct-read")})
    assert {claim.holds for claim in verdict.claims([small])} == {None}, "tiny shapes say nothing"


@pytest.mark.parametrize(("ours", "expected"), [(9.0, True), (9.1, False)])
def test_time_of_the_large_shape_against_a_copy(ours: float, expected: bool) -> None:
    of = group("llama3-8b", {"shardmerge": [usage(ours)], "copy": [usage(10)]}, cache="cold")
    assert holds("2.2 GB: time", of) is None
    assert judged("16 GB: time", of)[0].holds is expected


@pytest.mark.parametrize(("ours", "expected"), [(3.0, True), (3.1, False)])
def test_time_of_the_small_shape_against_copy_and_start(ours: float, expected: bool) -> None:
    of = group("tinyllama", {"shardmerge": [usage(ours)], "copy": [usage(2)], "import-torch": [usage(1)]})
    assert holds("2.2 GB: time", of) is expected


@pytest.mark.parametrize("peer", ["peft", "mergekit"])
@pytest.mark.parametrize(("theirs", "expected"), [(10.0, True), (9.9, False)])
def test_speed_against_peers(peer: str, theirs: float, expected: bool) -> None:
    of = group("tinyllama", {"shardmerge": [usage(2)], peer: [usage(theirs)]})
    assert holds(f"faster than {peer}", of) is expected


def test_speed_is_judged_on_every_shape() -> None:
    fast = group("tinyllama", {"shardmerge": [usage(2)], "peft": [usage(20)]})
    slow = group("qwen3-moe", {"shardmerge": [usage(2)], "peft": [usage(2)]})
    assert [claim.holds for claim in judged("faster than peft", fast, slow)] == [True, False]


@pytest.mark.parametrize(("ours", "expected"), [(11.5, True), (11.6, False)])
def test_time_against_the_slower_half_of_the_disk(ours: float, expected: bool) -> None:
    tools = {"shardmerge": [usage(ours)], "direct-read": [usage(10)], "direct-write": [usage(5)]}
    assert holds("slower of direct", group("llama3-8b", tools, cache="cold")) is expected
    assert holds("slower of direct", group("llama3-8b", tools, cache="warm")) is None


@pytest.mark.parametrize(("ours", "expected"), [(11.5, True), (11.6, False)])
def test_time_against_a_bare_copy(ours: float, expected: bool) -> None:
    tools = {"shardmerge": [usage(ours)], "direct-copy-huge": [usage(10)]}
    assert holds("a bare direct copy", group("llama3-8b", tools, cache="cold")) is expected
    assert holds("a bare direct copy", group("llama3-8b", tools, cache="warm")) is None


def test_memory_above_torch_is_the_worst_run_against_the_best() -> None:
    kept = group("tiny", {"shardmerge": [usage(1, 300), usage(1, 328)], "import-torch": [usage(1, 200), usage(1, 210)]})
    missed = group("tiny", {"shardmerge": [usage(1, 300), usage(1, 329)], "import-torch": [usage(1, 200)]})
    assert [claim.holds for claim in judged("import torch + 128", kept, missed)] == [True, False]
    assert all(claim.is_bound for claim in judged("import torch + 128", kept, missed))


def test_memory_over_shapes_compares_one_rank() -> None:
    small, other_rank = (
        group("tinyllama", {"shardmerge": [usage(1, 280)]}),
        group("tinyllama", {"shardmerge": [usage(1, 400)]}, rank=256),
    )
    near, far = (group("qwen3-moe", {"shardmerge": [usage(1, peak)]}) for peak in (296, 297))
    assert holds("of all shapes", small, near, other_rank) is True
    assert holds("of all shapes", small, far, other_rank) is False
    assert holds("of all shapes", small, other_rank) is None


def test_memory_over_ranks_takes_the_whole_range() -> None:
    low, middle, high, too_high = (
        group("tinyllama", {"shardmerge": [usage(1, peak)]}, rank=rank)
        for rank, peak in ((8, 270), (16, 275), (256, 286), (256, 287))
    )
    assert holds("over ranks", low, middle, high) is True
    assert holds("over ranks", low, middle, too_high) is False
    assert holds("over ranks", low, middle) is None


@pytest.mark.parametrize(("theirs", "expected"), [(10.0, True), (9.9, False)])
def test_cpu_time(theirs: float, expected: bool) -> None:
    of = group("tinyllama", {"shardmerge": [usage(9, cpu=2)], "peft": [usage(9, cpu=theirs)]})
    assert holds("CPU time per GB", of) is expected


@pytest.mark.parametrize(("ours", "expected"), [(3.6, True), (3.7, False)])
def test_time_in_memory_against_a_copy_and_start(ours: float, expected: bool) -> None:
    tools = {"shardmerge": [usage(ours)], "copy": [usage(2)], "import-torch": [usage(1)]}
    assert holds("in memory: time", group("tinyllama", tools, storage="memory")) is expected
    assert holds("in memory: time", group("tinyllama", tools)) is None
    assert holds("2.2 GB: time", group("tinyllama", tools, storage="memory")) is None


@pytest.mark.parametrize(("one", "cores", "expected"), [(3.4, 2, True), (3.3, 2, False), (3.4, 1, None)])
def test_cores_are_used(one: float, cores: int, expected: bool | None) -> None:
    tools = {"shardmerge": [usage(2)], "shardmerge-one-core": [usage(one)]}
    assert holds("with all cores", group("tinyllama", tools, storage="memory", cores=cores)) is expected


def test_claim_says_its_figures() -> None:
    assert Claim("a ≤ b", True, "1 and 2").line() == "- **holds**: a ≤ b (1 and 2)"
    assert "does not hold" in Claim("a", False, "").line()
    assert "not measured" in Claim("a", None, "").line()
