"""What the kernel says of AppArmor. Source: kernel docs, admin-guide/LSM/apparmor.rst; aa-enabled(1), aa-status(8)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys")


def find_obstacle(sys: Path = _ROOT) -> str:
    """Why no process can be confined on this host; empty if it can.

    Args:
        sys: /sys, or what stands for it.
    """
    switch = sys / "module/apparmor/parameters/enabled"
    if not switch.exists():
        return "this kernel has no AppArmor"
    return "" if switch.read_text().strip() == "Y" else "AppArmor is turned off on this host"


def is_known_missing(profile: str, sys: Path = _ROOT) -> bool:
    """Whether the kernel has told which profiles are loaded, and this is none of them."""
    try:
        lines = (sys / "kernel/security/apparmor/profiles").read_text().splitlines()
    except OSError:
        return False  # securityfs is not mounted here: the runtime will find out
    return profile not in {line.rpartition(" (")[0] for line in lines}  # NAME (MODE)
