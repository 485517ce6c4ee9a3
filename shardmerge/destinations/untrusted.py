"""What files in an output say, of which nothing is believed yet: whoever prepared a directory may have written them."""

from __future__ import annotations

import json
from typing import Any


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in ``data``; None where it is damaged or is something other than an object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_within(name: str) -> bool:
    """Whether a name in a record or a journal is of a file inside the output."""
    return bool(name.strip("/.")) and not name.startswith("/") and "\0" not in name and ".." not in name.split("/")


def own_names(value: Any) -> list[str]:
    """The names in a list that are of files inside the output, whatever else the list holds."""
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    return [name for name in names if is_within(name)]
