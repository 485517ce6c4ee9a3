"""Strangers' regular expressions: what `re` makes of them, here or in a process of its own, and an end to all of it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.adapters.formats.checks import pattern_value
from shardmerge.adapters.formats.peft_targets import matches
from shardmerge.system import bounded_regex
from shardmerge.system.bounded_regex import How, SlowPatternError, bounded, first_match, problems
from tests.support.builders import untimed

NAMES = [f"model.layers.{number}.self_attn.{which}_proj" for number in range(12) for which in "qkvo"]
#: What training tools write.
HONEST = [
    r".*\.(q_proj|v_proj)",
    r"^.*\.layers\.(0|1|11)\.(self_attn|mlp)\.(q|v)_proj$",
    r"model\.layers\.[0-9]+\.self_attn\.[qk]_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj)$",
    r"(\w+\.)*o_proj",
    r"(?:.*?(?:vision|language|layers).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    "|".join(map(re.escape, NAMES[::3])),
    r"(?x) .* \. # any layer's" + "\n q_proj",
    r".*(.)\1.*",
]


@pytest.fixture(params=["here", "in a process"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "in a process":
        monkeypatch.setattr(bounded_regex, "_STEPS", 1.0)
    with bounded() as session:
        yield
        assert request.param == "here" or session._helper is not None


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("how", ["match", "fullmatch", "search"])
def test_is_what_re_says(how: How) -> None:
    for text in HONEST:
        for name in [*NAMES, "", "q_proj\n", "модель.q_proj", "x\ud800.q_proj"]:
            assert first_match([text], name, how) == (0 if getattr(re, how)(text, name) else None)


@pytest.mark.usefixtures("place")
def test_the_first_that_matches() -> None:
    texts = [r"nothing", r".*\.1\..*", r".*q_proj", r".*"]
    assert [first_match(texts, name) for name in ("x.1.q_proj", "x.2.q_proj", "x")] == [1, 2, 3]
    assert first_match([], "x") is None


@pytest.mark.usefixtures("place")
def test_what_is_no_regular_expression() -> None:
    found = dict(problems([r"(", r"ok", r"[z-a]", r"(?P<a>x)(?P<a>y)", "*"]))
    assert list(found) == [r"(", r"[z-a]", r"(?P<a>x)(?P<a>y)", "*"]
    assert "unterminated subpattern" in found["("]


SMALL = st.text("ab.(|)*+?{}[]\\1,^$#", max_size=10)


@untimed
@given(SMALL, st.text("ab.", max_size=8))
def test_any_pattern(text: str, name: str) -> None:
    try:
        expected = re.fullmatch(text, name)
    except re.error:
        assert list(problems([text]))
        return
    assert not list(problems([text]))
    assert first_match([text], name, "fullmatch") == (None if expected is None else 0)


ENDLESS = {
    "repeated repetition": r"(a+)+$",
    "in a comment": "(?x)(a+) # twice\n +$",
    "alternatives": "(a|aa)" * 60 + "x",
    "alternatives repeated": "(a|a)*x",
    "many repetitions": ".*" * 12 + "x",
    "options": "a?" * 40 + "(a?)" * 40 + "a" * 40 + "x",
    "ahead": "(?=(a+)+x)a",
    "sets that take long to compile": "(?i)" + "[!-\uffff]" * 20_000,
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_an_end(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(bounded_regex, "SECONDS", 0.3)
    with pytest.raises(SlowPatternError, match=r"cannot be matched against module names in"):
        list(problems([text]))
        first_match([text], "a" * 80 + "b", "fullmatch")


def test_an_end_of_many_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_regex, "SECONDS", 0.3)
    with bounded(), pytest.raises(SlowPatternError, match=r"and 4,999 more"):
        for name in ["a" * 1_000] * 1_000:
            first_match([f".*.*x{number}" for number in range(5_000)], name)


def test_too_many_and_too_long() -> None:
    with pytest.raises(SlowPatternError, match="10,001 regular expressions"):
        list(problems(["x"] * 10_001))
    with pytest.raises(SlowPatternError, match="1,000,001 characters"):
        list(problems(["x" * 1_000_001]))


def test_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_regex, "SECONDS", 0.3)
    raised: list[SlowPatternError] = []

    def work() -> None:
        try:
            first_match(["(a+)+x"], "a" * 80)
        except SlowPatternError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_process_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_regex, "_STEPS", 1.0)
    with bounded() as session:
        first_match(["x"], "x")
        helper = session._helper
        with bounded() as inner:
            assert inner is session
        assert helper is not None and helper.poll() is None
    assert helper.poll() is not None


def test_no_process_for_what_people_write() -> None:
    """A rank for every module of a large model, and the usual target_modules."""
    names = [name.replace("layers.", f"layers.{number}") for number in range(10) for name in NAMES]
    ranks = dict.fromkeys(names, 3)
    with bounded() as session:
        assert {pattern_value(ranks, f"base.{name}", 8) for name in names} == {3}
        assert all(matches(r".*\.(q_proj|k_proj|v_proj|o_proj)", name) for name in names)
        assert session._helper is None


# --- names by their ends ----------------------------------------------------------------------------------------------


@untimed
@given(st.lists(st.text("ab.", max_size=4), max_size=4), st.text("ab.", min_size=1, max_size=8))
def test_ends_of_names(targets: list[str], module: str) -> None:
    """PEFT: ``key in target_modules or any(key.endswith(f".{target}") for target in target_modules)``."""
    expected = module in targets or any(module.endswith(f".{target}") for target in targets if target)
    assert matches(frozenset(targets), module) == matches(targets, module) == expected
