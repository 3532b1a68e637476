"""What a server writes down about its network for the next one: files of its own, and one beside each container.

Each may be missing or unreadable: what follows from that is said here, and is never a failure.
"""

from __future__ import annotations

import hashlib
import json
import os
from ipaddress import IPv6Network
from pathlib import Path

import structlog

log = structlog.get_logger()
_PORTS_FILE = "ports.json"
_POOL_V6_FILE = "pool-v6"
_RULES_FILE = "egress-rules"


class NetworkNotes:
    """Of one server.

    Args:
        directory: its state directory.
    """

    def __init__(self, directory: Path) -> None:
        self._ports = directory / _PORTS_FILE
        self._pool_v6 = directory / _POOL_V6_FILE

    def read_heads(self) -> dict[str, int]:
        """Where the port pools had got to, by protocol; nothing if that is not known."""
        try:
            return {str(kind): int(offset) for kind, offset in json.loads(self._ports.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def note_heads(self, heads: dict[str, int]) -> None:
        """Remember where the port pools go on: the next server does not give out again what was just freed (N17)."""
        try:
            self._ports.write_text(json.dumps(heads))
        except OSError as error:  # a full disk: it begins elsewhere, and no port is given out twice
            log.warning("network.port_heads_not_written", error=str(error))

    def read_pool_v6(self) -> IPv6Network | None:
        """The pool that was noted last; None if there was none, or it is not known."""
        try:
            return IPv6Network(self._pool_v6.read_text())
        except (OSError, ValueError):
            return None

    def note_pool_v6(self, pool: IPv6Network | None) -> None:
        """Remember the pool in force."""
        try:
            if pool is None:
                self._pool_v6.unlink(missing_ok=True)
                return
            new = self._pool_v6.with_suffix(".new")
            new.write_text(str(pool))
            new.replace(self._pool_v6)
        except OSError as error:  # a full disk: a later server with another pool leaves a route behind
            log.warning("network.pool_not_noted", error=str(error))


def note_rules(directory: Path, rules: str) -> None:
    """Remember in a container's directory which rules are in force in its namespace.

    Not remembered, they are set anew by the next server, which loses no more than the counters.
    """
    try:
        # Over what is there, which is as long: neither a new file nor a truncated one, which ext4 writes out at once.
        fd = os.open(directory / _RULES_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with open(fd, "wb", buffering=0) as note:
            note.write(_digest(rules).encode())
    except OSError as error:
        log.warning("network.rules_not_noted", directory=str(directory), error=str(error))
        (directory / _RULES_FILE).unlink(missing_ok=True)


def spoil_rules(directory: Path) -> None:
    """Make what note_rules has remembered stand for no rules at all."""
    note = directory / _RULES_FILE
    try:
        with note.open("r+b", buffering=0) as noted:
            noted.write(b"?")
    except OSError:  # missing, most likely
        note.unlink(missing_ok=True)


def are_noted(directory: Path, rules: str) -> bool:
    """Whether these are the rules that note_rules has remembered."""
    try:
        return (directory / _RULES_FILE).read_text() == _digest(rules)
    except OSError:  # missing, most likely
        return False


def _digest(rules: str) -> str:
    return hashlib.sha256(rules.encode()).hexdigest()
