"""Regular expressions of strangers, matched as `re` matches them, and in bounded time.

PEFT's configs hold some (``target_modules``, the keys of ``rank_pattern``), and PEFT leaves them to `re`, so nothing
else may be asked. But `re` tries one way to match after the other: against forty letters ``(a+)+x`` has 10¹² of them,
and nothing ends a match that has begun, except a signal to the main thread. So the ways are counted first, generously.
What people write has few of them and is matched here; the rest is matched by a process of its own, which can be ended.
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
from typing import Any, Literal

How = Literal["match", "fullmatch", "search"]

#: What may be done here, in steps from letter to letter, of which `re` does some hundred million a second.
_STEPS = 1e9
#: How long the process may take for all that it is asked, and the memory that it may have, the interpreter's included.
SECONDS = 5.0
_BYTES = 160 << 20
#: Steps to compile a set of characters, at the worst.
_STEPS_OF_SET = 1e6
_MOST_CHARACTERS = 1_000_000
_MOST_PATTERNS = 10_000

#: A group that is repeated has no bound that is worth having; in a comment such a thing may be hidden.
_ENDLESS = re.compile(r"\)\s*[*+{]|#")

_HELPER = """
import json, re, resource, sys
seconds, memory = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # should nobody be there to end it
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


class _Session:
    """The work of one block: what was spent, and the process that does what is too much for this one."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._waited = 0.0
        self._helper: subprocess.Popen[bytes] | None = None
        #: By the patterns and how they are matched: their number, and the exponent and logarithm of their ways.
        self._counted: dict[tuple[Sequence[str], How], tuple[int, int, float]] = {}
        self._compiled: dict[tuple[Sequence[str], How], list[Callable[[str], Any]]] = {}
        self._sent: set[int] = set()

    def problem(self, text: str) -> str | None:
        """Why a text is no regular expression, if it is none."""
        if self._affords(_compile_steps(text)):
            try:
                _compile(text)
            except (re.error, OverflowError, RecursionError) as error:
                return str(error)
            return None
        answer = self._ask((text,), "match", "", self._number((text,), "match")[0])
        return answer if isinstance(answer, str) else None

    def first(self, texts: tuple[str, ...], name: str, how: How) -> tuple[int, dict[str, str | None]] | None:
        number, exponent, logarithm = self._number(texts, how)
        # A step more for each letter, since what follows a repetition is compared letter by letter.
        steps = logarithm + (exponent + 1) * math.log(len(name) + 1)
        if steps < math.log(_STEPS) and self._affords(math.exp(steps)) and (matches := self._compiled_here(texts, how)):
            found = ((index, match(name)) for index, match in enumerate(matches))
            return next(((index, match.groupdict()) for index, match in found if match), None)
        answer = self._ask(texts, how, name, number)
        return (answer[0], answer[1]) if isinstance(answer, list) else None

    def _compiled_here(self, texts: tuple[str, ...], how: How) -> list[Callable[[str], Any]] | None:
        """What matches, unless it takes too long to compile."""
        if (texts, how) not in self._compiled:
            if not self._affords(sum(map(_compile_steps, texts))):
                return None
            self._compiled[texts, how] = [getattr(_compile(text), how) for text in texts]
        return self._compiled[texts, how]

    def _number(self, texts: tuple[str, ...], how: How) -> tuple[int, int, float]:
        if (texts, how) not in self._counted:
            ways = [_ways(text) for text in texts]
            exponent = max((of for of, _ in ways), default=0) + (how == "search")
            logarithm = max((of for _, of in ways), default=0.0) + math.log(len(texts) + 1)
            self._counted[texts, how] = len(self._counted), exponent, logarithm
        return self._counted[texts, how]

    def _affords(self, steps: float) -> bool:
        if self._spent + steps > _STEPS:
            return False
        self._spent += steps
        return True

    def _ask(self, texts: tuple[str, ...], how: How, name: str, number: int) -> Any:
        """The process's answer. `SlowPatternError` where there is none in time."""
        if self._helper is None:
            command = [sys.executable, "-I", "-S", "-c", _HELPER, str(math.ceil(SECONDS)), str(_BYTES)]
            self._helper = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        assert self._helper.stdin is not None and self._helper.stdout is not None
        question = [number, None if number in self._sent else texts, how, name]
        self._sent.add(number)
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
            raise SlowPatternError(
                f"{_brief(texts)} cannot be matched against module names in {SECONDS:.0f} s; expected fewer, and "
                "none that repeats what itself repeats, as (a+)+ does"
            )
        return json.loads(answer)

    def close(self) -> None:
        if self._helper is not None:
            self._helper.kill()
            self._helper.communicate()


_session: ContextVar[_Session | None] = ContextVar("session", default=None)


@contextmanager
def bounded() -> Iterator[_Session]:
    """All matching within the block takes a bounded time together; a block within another is part of it."""
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


def first_match(texts: Sequence[str], name: str, how: How = "match") -> int | None:
    """Which of some regular expressions is the first that matches; None if none does.

    ``how`` is the function of `re`. Raises `SlowPatternError`.
    """
    with bounded() as session:
        found = session.first(tuple(texts), name, how) if texts else None
    return None if found is None else found[0]


def first_captured(texts: Sequence[str], name: str, group: str) -> str | None:
    """What a named group holds in the first of some regular expressions that matches; None where there is nothing.

    Raises `SlowPatternError`.
    """
    with bounded() as session:
        found = session.first(tuple(texts), name, "match") if texts else None
    return None if found is None else found[1].get(group)


def problems(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Those that are no regular expressions, and why. Raises `SlowPatternError`, also where there are too many."""
    if len(texts) > _MOST_PATTERNS or sum(map(len, texts)) > _MOST_CHARACTERS:
        raise SlowPatternError(
            f"{len(texts):,} regular expressions of {sum(map(len, texts)):,} characters; expected at most "
            f"{_MOST_PATTERNS:,} of {_MOST_CHARACTERS:,}"
        )
    with bounded() as session:
        for text in texts:
            if why := session.problem(text):
                yield text, why


def _compile(text: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # [[ may mean something else one day; a stranger's pattern is not ours to mend
        return re.compile(text)


def _ways(text: str) -> tuple[int, float]:
    """At most how many ways a regular expression has to match n letters: the e of (n + 1)ᵉ f, and log f.

    Every repetition of a character may end at any letter, every optional thing may be there or not, and every group may
    be each of the alternatives. Brackets and escapes are not looked at, which counts too many.
    """
    if _ENDLESS.search(text):
        return 0, math.inf
    repetitions = text.count("*") + text.count("+") + text.count("{")
    return repetitions, text.count("?") * math.log(2) + text.count("(") * math.log(1 + text.count("|"))


def _compile_steps(text: str) -> float:
    return 100.0 * len(text) + _STEPS_OF_SET * text.count("[")


def _brief(texts: Sequence[str]) -> str:
    shown = reprlib.repr(texts[0]) if texts else "nothing"
    return shown if len(texts) < 2 else f"{shown} and {len(texts) - 1:,} more"
