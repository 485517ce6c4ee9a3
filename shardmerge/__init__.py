"""Fold a trained adapter into a model's weights, streaming: W' = W + scaling · B A, one tile of rows at a time."""

from __future__ import annotations

from shardmerge.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shardmerge.api.library import compare, export, init, inspect, merge, plan, verify
    from shardmerge.api.progress import Progress
    from shardmerge.config.schema import AdapterConfig, ComputeConfig, ExportConfig, MergeConfig, OutputConfig
    from shardmerge.errors import (
        ChangedError,
        ConfigError,
        FormatError,
        LimitError,
        MissingError,
        NonFiniteError,
        OtherKindError,
        OutputError,
        PlanError,
        ResumeError,
        ShardmergeError,
        SourceError,
        VerifyError,
    )
    from shardmerge.inference.comparison.figures import Comparison
    from shardmerge.reporting.merge_report import MergeReport
    from shardmerge.spec.plans import MergePlan
    from shardmerge.verification.findings import VerifyReport

#: Where each public name is defined.
_HOMES = {
    "shardmerge.api.library": ("compare", "export", "init", "inspect", "merge", "plan", "verify"),
    "shardmerge.api.progress": ("Progress",),
    "shardmerge.config.schema": ("AdapterConfig", "ComputeConfig", "ExportConfig", "MergeConfig", "OutputConfig"),
    "shardmerge.errors": (
        *("ChangedError", "ConfigError", "FormatError", "LimitError", "MissingError", "NonFiniteError"),
        *("OtherKindError", "OutputError", "PlanError", "ResumeError", "ShardmergeError", "SourceError", "VerifyError"),
    ),
    "shardmerge.inference.comparison.figures": ("Comparison",),
    "shardmerge.reporting.merge_report": ("MergeReport",),
    "shardmerge.spec.plans": ("MergePlan",),
    "shardmerge.verification.findings": ("VerifyReport",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterConfig",
    "ChangedError",
    "Comparison",
    "ComputeConfig",
    "ConfigError",
    "ExportConfig",
    "FormatError",
    "LimitError",
    "MergeConfig",
    "MergePlan",
    "MergeReport",
    "MissingError",
    "NonFiniteError",
    "OtherKindError",
    "OutputConfig",
    "OutputError",
    "PlanError",
    "Progress",
    "ResumeError",
    "ShardmergeError",
    "SourceError",
    "VerifyError",
    "VerifyReport",
    "__version__",
    "compare",
    "export",
    "init",
    "inspect",
    "merge",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    # The command line imports this package for every call, --help included, so everything loads when it is named; and
    # until that is done, Ctrl-C would be a traceback (see `shardmerge.cli.entry`).
    if name in _HOME_OF:
        import importlib

        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
