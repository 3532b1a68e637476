"""How old something is by the host's clock, which may be set back meanwhile."""

from __future__ import annotations

import time


def age_ns(since_ns: int) -> int:
    """Nanoseconds since a moment of time(2); 0 for one that is yet to come."""
    return max(0, time.time_ns() - since_ns)
