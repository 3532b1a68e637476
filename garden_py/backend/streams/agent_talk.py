"""The latest exchanges with one agent, for who diagnoses its container."""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

from garden_py.backend.streams.agent_replies import printable

_KEPT = 64
# Of requests and events; whatever else is in them may be large, or a secret.
_SHOWN = ("op", "event", "id", "process", "signal", "group", "code", "status", "build", "wire", "delivered")


class AgentTalk:
    """What was said and heard last. Environments, arguments and data are left out; what the agent says is hostile."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, str, str]] = deque(maxlen=_KEPT)

    def sent(self, value: dict[str, Any]) -> None:
        """A request leaves."""
        self._keep("server", _describe(value))

    def answered(self, request: dict[str, Any], outcome: str) -> None:
        """A request has come to its end: `ok`, or why not."""
        self._keep("agent", f"{_describe(request)}: {printable(outcome)}")

    def heard(self, value: dict[str, Any]) -> None:
        """The agent tells something by itself."""
        self._keep("agent", _describe(value))

    def ended(self, reason: str) -> None:
        """The connection is over."""
        self._keep("link", printable(reason))

    def _keep(self, who: str, what: str) -> None:
        self._kept.append((time.time_ns(), who, what))

    def lines(self) -> list[str]:
        """One per exchange, the oldest first: moment (UTC), who speaks, what."""
        return [
            f"{datetime.fromtimestamp(at_ns / 1e9, UTC).isoformat(timespec='milliseconds')} {who}: {what}"
            for at_ns, who, what in self._kept
        ]


def _describe(value: dict[str, Any]) -> str:
    shown = {name: value[name] for name in _SHOWN if isinstance(value.get(name), str | int | bool)}
    return " ".join(f"{name}={printable(str(each))}" for name, each in shown.items()) or "?"
