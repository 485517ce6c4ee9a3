"""What can go wrong.

::

    ShardmergeError                1   a bug, if it is raised as itself
    ├── ConfigError                2   the config or the command line is wrong
    ├── PlanError                  3   the merge is refused; nothing was written
    ├── FormatError                4   a file is malformed
    │   ├── NonFiniteError         4   a number that cannot be merged or stored
    │   └── OtherKindError         4   an adapter was given as the base, or a model as an adapter
    ├── SourceError                5   reading failed
    │   ├── ChangedError           5   a file is not what it was when the merge was planned
    │   └── MissingError           5   a place that was named is not there; a plan is refused (3)
    ├── OutputError                5   writing failed
    ├── LimitError                 5   the system allows the process no more memory, threads or files
    ├── VerifyError                6   the output is not what it should be
    └── ResumeError                7   the output belongs to another merge

Every message says what is wrong, where, what was expected, and what state the disk is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class ShardmergeError(Exception):
    """The base of every error that shardmerge raises on purpose.

    ``problems`` are the reasons, each by itself; most errors have one, which is the message.
    """

    exit_code: ClassVar[int] = 1

    @property
    def problems(self) -> tuple[str, ...]:
        return self.__dict__.get("_problems") or (str(self),)


class ConfigError(ShardmergeError):
    """The config file, an override or the command line is wrong."""

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self._problems = tuple(problems)


class PlanError(ShardmergeError):
    """The merge, or ``what`` else was to be done, is refused before a byte was written.

    ``problems`` holds every reason found, in the order in which a person would mend them.
    """

    exit_code = 3

    def __init__(self, problems: Sequence[str], what: str = "the merge") -> None:
        self._problems, self.what = tuple(problems), what
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{what} is refused, {count}; nothing was written:\n{lines}")

    def __reduce__(self) -> tuple[type[PlanError], tuple[tuple[str, ...], str]]:
        # BaseException pickles ``args``, which here is the rendered message and not the problems.
        return (type(self), (self.problems, self.what))


class FormatError(ShardmergeError):
    """A file's content breaks its format."""

    exit_code = 4


class NonFiniteError(FormatError):
    """A factor holds NaN or infinity, or a merged value does not fit the output dtype."""


class OtherKindError(FormatError):
    """What was given as the base is an adapter, or what was given as an adapter is a model."""


class SourceError(ShardmergeError):
    """Reading the base or an adapter failed, or it is not there."""

    exit_code = 5


class ChangedError(SourceError):
    """A file of the base or of an adapter is no longer what the plan saw."""


class MissingError(SourceError):
    """A file, a directory or a repo that was named is not there."""


class OutputError(ShardmergeError):
    """Writing the output failed."""

    exit_code = 5


class LimitError(ShardmergeError):
    """Memory, threads or open files ran out; the message says which limit was in force."""

    exit_code = 5


class VerifyError(ShardmergeError):
    """The output is not what the merge's record says that it must be.

    ``report`` is the whole `VerifyReport`; None where there was nothing to verify.
    """

    exit_code = 6
    report: Any = None


class ResumeError(ShardmergeError):
    """The output directory holds the work of another merge, or another process works on it."""

    exit_code = 7
