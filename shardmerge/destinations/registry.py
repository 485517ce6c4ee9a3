"""Destinations by the scheme of their name (``scheme://…``). A name without one is a local directory."""

from __future__ import annotations

from collections.abc import Callable

from shardmerge.destinations.destination import Destination
from shardmerge.destinations.local.directory import LocalDirectory

#: What makes a destination of a name and of whether a finished merge there may be replaced.
Open = Callable[[str, bool], Destination]

DESTINATIONS: dict[str, Open] = {"": LocalDirectory}


def open_destination(location: str, overwrite: bool) -> Destination:
    """The destination of that name, which is not looked at yet. `PlanError` where there can be none."""
    scheme, separator, _ = location.partition("://")
    return DESTINATIONS.get(scheme if separator else "", LocalDirectory)(location, overwrite)
