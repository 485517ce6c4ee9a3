"""The config in the record of a finished merge: read back, and moved to where base and adapters are now."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from shardmerge.config.schema import ExportConfig, MergeConfig
from shardmerge.errors import ConfigError


def recorded_config(value: Any, where: str) -> MergeConfig:
    """The config in a record: of a merge, or of an export, which has no adapter. Raises `ConfigError`."""
    found = value if isinstance(value, dict) else {}
    # A record has every key, also those that the merge had no use for.
    return (ExportConfig if found.get("adapters") == [] else MergeConfig).validated(found, where)


def relocated(config: MergeConfig, record: Mapping[str, Any], base: str | None, adapters: Sequence[str]) -> MergeConfig:
    """A recorded config with base and adapters where the merge found them, or where ``base`` and ``adapters`` say.

    `ConfigError` where ``adapters``, which are all of them, are not as many as were merged.
    """
    if adapters and len(adapters) != len(config.adapters):
        raise ConfigError(
            f"{len(adapters)} adapters are given, but {len(config.adapters)} were merged: give a place for each, in "
            "their order"
        )
    infos = record.get("adapters")
    places: list[str | None] = list(adapters) or [_place(info) for info in (infos if isinstance(infos, list) else [])]
    entries = tuple(
        entry.model_copy(update={"path": place}) if place else entry
        for entry, place in itertools.zip_longest(config.adapters, places[: len(config.adapters)])
    )
    return config.model_copy(update={"base": base or _place(record.get("base")) or config.base, "adapters": entries})


def _place(info: Any) -> str | None:
    """Where a base or an adapter was found: an absolute path, or a Hub id with the commit."""
    location = info.get("location") if isinstance(info, dict) else None
    if not isinstance(location, str) or not location:
        return None
    revision = info.get("revision")
    return f"{location}@{revision}" if revision else location
