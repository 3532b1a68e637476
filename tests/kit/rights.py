"""What root may do on this machine: virtual machines and CI runners take some of it away."""

from __future__ import annotations

from pathlib import Path

import pytest

_CAP_SYS_RESOURCE = 24  # linux/capability.h


def may_raise_limits() -> bool:
    """Whether root may raise hard limits."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


raises_limits = pytest.mark.skipif(not may_raise_limits(), reason="root has no CAP_SYS_RESOURCE here")
