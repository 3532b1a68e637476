"""Parameters of TCP that containers get: the server's setting, else what the host has now (statement SE6)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from garden_py.config import Config

_HOST: Final = Path("/proc/sys")
# Source: kernel docs, ip-sysctl.rst; all five are of the network namespace.
_SETTING_OF: Final = {
    "net.ipv4.tcp_keepalive_time": "tcp_keepalive_time",
    "net.ipv4.tcp_keepalive_intvl": "tcp_keepalive_interval",
    "net.ipv4.tcp_keepalive_probes": "tcp_keepalive_probes",
    "net.ipv4.tcp_retries1": "tcp_retries1",
    "net.ipv4.tcp_retries2": "tcp_retries2",
}


def choose_tcp_sysctls(config: Config, host: Path = _HOST) -> tuple[tuple[str, str], ...]:
    """(name, value) of each parameter; the host's are read anew, for somebody may have tuned them.

    Args:
        config: the server's settings.
        host: /proc/sys, or what stands for it.
    """
    return tuple(
        (name, str(getattr(config, setting) or (host / name.replace(".", "/")).read_text().strip()))
        for name, setting in _SETTING_OF.items()
    )
