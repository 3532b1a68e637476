"""Whether the tests run in the emulated machine of tests/vm/cgroup2-vm, which has no network but its own."""

from __future__ import annotations

import os


def in_guest() -> bool:
    return "CGROUP2_VM" in os.environ
