"""Fold a trained adapter into a model's weights, streaming: W' = W + scaling · B A, one tile of rows at a time."""

from __future__ import annotations

from shardmerge.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shardmerge.api.library import merge, plan, verify
    from shardmerge.api.progress import Progress
    from shardmerge.config.schema import MergeConfig
    from shardmerge.errors import (
        ConfigError,
        FormatError,
        LimitError,
        NonFiniteError,
        OutputError,
        PlanError,
        ResumeError,
        ShardmergeError,
        SourceError,
        VerifyError,
    )
    from shardmerge.reporting.merge_report import MergeReport
    from shardmerge.spec.plans import MergePlan
    from shardmerge.verification.findings import VerifyReport

__all__ = [
    "ConfigError",
    "FormatError",
    "LimitError",
    "MergeConfig",
    "MergePlan",
    "MergeReport",
    "NonFiniteError",
    "OutputError",
    "PlanError",
    "Progress",
    "ResumeError",
    "ShardmergeError",
    "SourceError",
    "VerifyError",
    "VerifyReport",
    "__version__",
    "merge",
    "plan",
    "verify",
]

_ERRORS = ("Config", "Format", "Limit", "NonFinite", "Output", "Plan", "Resume", "Shardmerge", "Source", "Verify")
_HOMES = {
    **{f"{name}Error": "shardmerge.errors" for name in _ERRORS},
    "MergeConfig": "shardmerge.config.schema",
    "MergePlan": "shardmerge.spec.plans",
    "MergeReport": "shardmerge.reporting.merge_report",
    "Progress": "shardmerge.api.progress",
    "VerifyReport": "shardmerge.verification.verifier",
    "merge": "shardmerge.api.library",
    "plan": "shardmerge.api.library",
    "verify": "shardmerge.api.library",
}


def __getattr__(name: str) -> Any:
    # The command line imports this package for every call, --help included, so everything loads when it is named; and
    # until that is done, Ctrl-C would be a traceback (see `shardmerge.cli.entry`).
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
