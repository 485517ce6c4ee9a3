"""How many processor cores this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores that the scheduler gives this process: in a container, or under taskset, fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
