"""What the host says about names, for what containers are told. Thin; `names` decides."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from garden_py.backend.rootfs.names import choose_resolv_conf

_RESOLV_CONF: Final = Path("/etc/resolv.conf")
_UPSTREAM: Final = Path("/run/systemd/resolve/resolv.conf")


def read_host_resolv_conf() -> str:
    """The file that containers' name servers are taken from; empty if the host has none."""
    return choose_resolv_conf(read_if_there(_RESOLV_CONF), read_if_there(_UPSTREAM))


def read_if_there(path: Path) -> str:
    """A file of the host's; empty if it has none. Its comments may be in any encoding."""
    return path.read_text(errors="replace") if path.exists() else ""
