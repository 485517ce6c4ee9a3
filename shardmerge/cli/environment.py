"""Environment variables: defaults where every command line is the same (a batch system, a container).

What is given on the command line comes first, then the config, then the environment, then the default. Options that
overwrite files (``--overwrite``) or change the result's numbers cannot be set here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from shardmerge.cli.printing import say
from shardmerge.errors import ConfigError

PREFIX = "SHARDMERGE_"
LOG, VERBOSE, QUIET = PREFIX + "LOG", PREFIX + "VERBOSE", PREFIX + "QUIET"
#: Variables that are a default for a key of the config's section ``compute``.
_COMPUTE: Mapping[str, str] = {PREFIX + "DEVICE": "device", PREFIX + "MAX_MEMORY": "max_memory"}
KNOWN = (LOG, VERBOSE, QUIET, *_COMPUTE)

EPILOG = (
    f"Environment: {LOG}, {VERBOSE} and {QUIET} are defaults for --log, -v and --quiet; {PREFIX}DEVICE and "
    f"{PREFIX}MAX_MEMORY for compute.device and compute.max_memory. The command line comes first, then the config, "
    "then these."
)


def warn_of_unknown() -> None:
    """Name the variables that begin as ours do and are not: a slip must not pass without a word.

    They are not refused: not all of them are the user's. Kubernetes makes SHARDMERGE_PORT for a service of that name.
    """
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, 1, 0.8)
            meant = f" Did you mean {near[0]}?" if near else ""
            known = ", ".join(KNOWN)
            text = f"warning: the environment variable {name} is not known and has no effect.{meant} Known are {known}"
            say(text, err=True)


def compute_defaults() -> dict[str, Any]:
    """The environment's settings for the section ``compute``. Raises `ConfigError` where a value is wrong."""
    from shardmerge.config.schema import checked_compute

    found: dict[str, Any] = {}
    for name, key in _COMPUTE.items():
        if value := os.environ.get(name):
            try:
                found[key] = checked_compute(key, value)
            except ConfigError as error:
                raise ConfigError(f"the environment variable {name}: {error}") from None
    return found
