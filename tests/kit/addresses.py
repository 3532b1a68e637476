"""Addresses that nothing on this host uses: a run that was killed leaves its links and routes behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from ipaddress import IPv4Network


def first_free(pools: Iterable[IPv4Network]) -> tuple[int, IPv4Network]:
    """The first of some pools that no route of this host touches, and its place among them."""
    listed = subprocess.run(
        ["ip", "-json", "-4", "route", "show", "table", "all"], check=True, capture_output=True, timeout=20
    )
    taken = [IPv4Network(route["dst"]) for route in json.loads(listed.stdout) if route["dst"] != "default"]
    for place, pool in enumerate(pools):
        if not any(pool.overlaps(other) for other in taken):
            return place, pool
    raise AssertionError("every pool of the tests is in use on this host")
