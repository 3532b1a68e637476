"""Check of what fetches images: skopeo, and the command of it that hands out manifests and layers as streams."""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

from garden_py.cli.doctor.finding import Finding, Level

_TIMEOUT_S: Final = 10.0
_COST: Final = "containers can be made of directories and bare tars only"


def check_images() -> Finding:
    """Whether images of registries, layouts and archives can be fetched."""
    if shutil.which("skopeo") is None:
        return Finding("images", Level.WARN, "no skopeo", _COST, "apt-get install skopeo")
    version = _ask("--version").strip() or "skopeo of an unknown version"
    if "--sockfd" not in _ask("experimental-image-proxy", "--help"):
        found = f"{version} without experimental-image-proxy"
        return Finding("images", Level.WARN, found, _COST, "skopeo 1.9 or newer")
    return Finding("images", Level.OK, version)


def _ask(*argv: str) -> str:
    try:
        done = subprocess.run(
            ["skopeo", *argv], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
