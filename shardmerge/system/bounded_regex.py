"""Matches untrusted regular expressions with `re`, in bounded time and memory.

PEFT passes patterns of its configs (``target_modules``, the keys of ``rank_pattern``) to `re`, so the engine must be
`re`. It tries one way to match after the other: against forty letters, ``(a+)+x`` has 10¹², and only a signal to the
main thread ends a match. So an upper bound of the ways is computed first. Usual patterns have few ways and are matched
here; the others are matched by a process of their own, which can be killed.

The `regex` package (2026.11) has timeouts, but not for compiling: ``(?:(?:(?:a?){1000}){1000}){1000}`` takes 25 s and
7.7 GB. And it interprets some patterns otherwise, even with VERSION0: ``a{e}``, ``[[:alpha:]]``, ``\\w``.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import select
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

How = Literal["match", "fullmatch", "search"]

#: Steps from letter to letter that are allowed here; `re` takes some hundred million a second.
_STEPS = 1e9
#: Seconds of the process for all questions, and bytes of its memory, with the interpreter.
SECONDS = 5.0
_BYTES = 160 << 20
#: Most steps to compile a set of characters.
_STEPS_OF_SET = 1e6
_MOST_CHARACTERS = 1_000_000
_MOST_PATTERNS = 10_000

#: A repeated group has no useful bound. A comment of a verbose pattern may hide the repetition.
_ENDLESS = re.compile(r"\)\s*[*+{]|#")

_HELPER = """
import json, re, resource, sys
seconds, memory = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # in case the parent is gone
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
known = {}
for line in sys.stdin:
    number, texts, how, name = json.loads(line)
    try:
        if texts is not None:
            known[number] = [getattr(re.compile(text), how) for text in texts]
        found = ((index, match(name)) for index, match in enumerate(known[number]))
        answer = next(([index, match.groupdict()] for index, match in found if match), None)
    except (re.error, OverflowError, RecursionError) as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


class SlowPatternError(ValueError):
    """A regular expression that takes too long to match."""


@dataclass(slots=True)
class _Patterns:
    """Regular expressions that are tried in order."""

    texts: tuple[str, ...]
    how: How
    number: int
    #: They have at most (letters + 1)^exponent × e^logarithm ways to match.
    exponent: int
    logarithm: float
    matches: list[Callable[[str], Any]] = field(default_factory=list)
    is_sent: bool = False


class _Session:
    """All matching of one block: the steps so far, and the process for patterns that take too many."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._waited = 0.0
        self._helper: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[tuple[str, ...], How], _Patterns] = {}

    def first(self, texts: tuple[str, ...], name: str, how: How) -> Any:
        """The first match: (index, named groups), or None; an error message if one is not a pattern."""
        patterns = self._known.get((texts, how))
        if patterns is None:
            ways = [_ways(text) for text in texts]
            exponent = max(of for of, _ in ways) + (how == "search")
            logarithm = max(of for _, of in ways) + math.log(len(texts) + 1)
            patterns = _Patterns(texts, how, len(self._known), exponent, logarithm)
            self._known[texts, how] = patterns
        # One more step for each letter: the text after a repetition is compared letter by letter.
        steps = patterns.logarithm + (patterns.exponent + 1) * math.log(len(name) + 1)
        if steps >= math.log(_STEPS) or not self._affords(math.exp(steps)):
            return self._ask(patterns, name)
        if not patterns.matches:
            if not self._affords(sum(100.0 * len(text) + _STEPS_OF_SET * text.count("[") for text in texts)):
                return self._ask(patterns, name)
            try:
                patterns.matches = [getattr(_compile(text), how) for text in texts]
            except (re.error, OverflowError, RecursionError) as error:
                return str(error)
        found = ((index, match(name)) for index, match in enumerate(patterns.matches))
        return next(((index, match.groupdict()) for index, match in found if match), None)

    def _affords(self, steps: float) -> bool:
        if self._spent + steps > _STEPS:
            return False
        self._spent += steps
        return True

    def _ask(self, patterns: _Patterns, name: str) -> Any:
        """The process's answer. `SlowPatternError` if it is late."""
        if self._helper is None:
            command = [sys.executable, "-I", "-S", "-c", _HELPER, str(math.ceil(SECONDS)), str(_BYTES)]
            self._helper = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        assert self._helper.stdin is not None and self._helper.stdout is not None
        question = [patterns.number, None if patterns.is_sent else patterns.texts, patterns.how, name]
        patterns.is_sent = True
        asked, answer = time.monotonic(), b""
        with suppress(OSError):  # it has ended
            self._helper.stdin.write(json.dumps(question).encode() + b"\n")
            while not answer.endswith(b"\n"):
                left = SECONDS - self._waited - (time.monotonic() - asked)
                if left <= 0 or not select.select([self._helper.stdout], [], [], left)[0]:
                    break
                if not (more := self._helper.stdout.read(1 << 16)):
                    break
                answer += more
        self._waited += time.monotonic() - asked
        if not answer.endswith(b"\n"):
            shown, more_texts = reprlib.repr(patterns.texts[0]), len(patterns.texts) - 1
            raise SlowPatternError(
                f"{shown}{f' and {more_texts:,} more' if more_texts else ''} cannot be matched against module names in "
                f"{SECONDS:.0f} s; expected fewer, and no nested repetition such as (a+)+"
            )
        return json.loads(answer)

    def close(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.communicate()


_session: ContextVar[_Session | None] = ContextVar("session", default=None)


@contextmanager
def bounded() -> Iterator[_Session]:
    """Bound the time of all matching in the block together. An inner block is part of the outer."""
    session = _session.get()
    if session is not None:
        yield session
        return
    session = _Session()
    token = _session.set(session)
    try:
        yield session
    finally:
        _session.reset(token)
        session.close()


def _first(texts: Sequence[str], name: str, how: How) -> Any:
    with bounded() as session:
        found = session.first(tuple(texts), name, how) if texts else None
    return None if isinstance(found, str) else found


def first_match(texts: Sequence[str], name: str, how: How = "match") -> int | None:
    """The index of the first regular expression that matches; None if none does.

    ``how`` is the function of `re`. Raises `SlowPatternError`.
    """
    found = _first(texts, name, how)
    return None if found is None else int(found[0])


def first_captured(texts: Sequence[str], name: str, group: str) -> str | None:
    """The named group of the first regular expression that matches, or None. Raises `SlowPatternError`."""
    found = _first(texts, name, "match")
    captured: str | None = None if found is None else found[1].get(group)
    return captured


def problems(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Texts that are not regular expressions, and why. Raises `SlowPatternError`, also for too many texts."""
    if len(texts) > _MOST_PATTERNS or sum(map(len, texts)) > _MOST_CHARACTERS:
        raise SlowPatternError(
            f"{len(texts):,} regular expressions of {sum(map(len, texts)):,} characters; expected at most "
            f"{_MOST_PATTERNS:,} of {_MOST_CHARACTERS:,}"
        )
    with bounded() as session:
        for text in texts:
            if isinstance(why := session.first((text,), "", "match"), str):
                yield text, why


def _compile(text: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # [[ may change its meaning one day
        return re.compile(text)


def _ways(text: str) -> tuple[int, float]:
    """e and log f of (n + 1)ᵉ f, an upper bound of the ways of a regular expression to match n letters.

    Every repetition of a character may end at any letter, every optional part may be present, and every group may be
    any alternative. Brackets and escapes are ignored, which counts too many.
    """
    if _ENDLESS.search(text):
        return 0, math.inf
    repetitions = text.count("*") + text.count("+") + text.count("{")
    return repetitions, text.count("?") * math.log(2) + text.count("(") * math.log(1 + text.count("|"))
