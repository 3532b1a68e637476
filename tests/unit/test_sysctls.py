"""Parameters of TCP: the server's own, else the host's."""

from __future__ import annotations

from pathlib import Path

from garden_py.backend.linux.sysctls import choose_tcp_sysctls
from garden_py.config import Config


def test_setting_wins_over_the_host(tmp_path: Path) -> None:
    """And the host's value is taken as it is when a container is made, not as the kernel's default is."""
    ipv4 = tmp_path / "net" / "ipv4"
    ipv4.mkdir(parents=True)
    names = (
        "tcp_keepalive_time",
        "tcp_keepalive_intvl",
        "tcp_keepalive_probes",
        "tcp_retries1",
        "tcp_retries2",
    )
    for number, name in enumerate(names):
        (ipv4 / name).write_text(f"{number + 10}\n")
    config = Config(tcp_keepalive_interval=77, tcp_retries1=5)
    assert dict(choose_tcp_sysctls(config, tmp_path)) == {
        "net.ipv4.tcp_keepalive_time": "10",
        "net.ipv4.tcp_keepalive_intvl": "77",
        "net.ipv4.tcp_keepalive_probes": "12",
        "net.ipv4.tcp_retries1": "5",
        "net.ipv4.tcp_retries2": "14",
    }
