"""Connections that the network refused or logged, told as events: at once, and then once a second per destination.

A program that is refused tries again and again, often to the same place. The first try is told at once; those to the
same place within the next second are one event with their number. Of many places at once the surplus is counted only.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import structlog

from garden_py.model.connection import Connection
from garden_py.model.netrule import Cause, RuleAction, format_egress_rule
from garden_py.observe.apart import apart
from garden_py.service.events import EventHub, EventKind
from garden_py.service.registry import Registry

log = structlog.get_logger()
GATHER_S = 1.0
PLACES_MAX = 32
"""Of a container in one interval; more are told as a number."""

Place = tuple[RuleAction, Cause, int | None, str, str, int, str]


@dataclass(slots=True)
class _Gathered:
    """What has come of one container since its interval began."""

    counts: dict[Place, tuple[Connection, int]] = field(default_factory=dict)
    untold: int = 0


class Connections:
    """Publishes them.

    Args:
        registry: whose containers' rules are named in events.
        events: where to publish.
        gather_s: length of an interval, in seconds.
    """

    def __init__(self, registry: Registry, events: EventHub, *, gather_s: float = GATHER_S) -> None:
        self._registry = registry
        self._events = events
        self._gather_s = gather_s
        self._gathered: dict[str, _Gathered] = {}

    def heard(self, handle: str, connection: Connection) -> None:
        """The backend has seen one."""
        gathered = self._gathered.get(handle)
        if gathered is None:
            gathered = self._gathered[handle] = _Gathered()
            apart(asyncio.get_running_loop().call_later, self._gather_s, self._tell_rest, handle)
        place = _place_of(connection)
        if place in gathered.counts:
            first, count = gathered.counts[place]
            gathered.counts[place] = (first, count + 1)
        elif len(gathered.counts) < PLACES_MAX:
            gathered.counts[place] = (connection, 0)
            self._publish(handle, connection, 1)
        else:
            gathered.untold += 1

    def _tell_rest(self, handle: str) -> None:
        gathered = self._gathered.pop(handle)
        for connection, more in gathered.counts.values():
            if more:
                self._publish(handle, connection, more)
        if gathered.untold:
            log.info("connections.untold", handle=handle, connections=gathered.untold)

    def _publish(self, handle: str, connection: Connection, count: int) -> None:
        container = self._registry.find(handle)
        if container is None:
            return
        decision, flow = connection.decision, connection.flow
        policy = container.spec.egress
        rule = ""
        if decision.rule is not None and policy is not None and decision.rule < len(policy.rules):
            rule = format_egress_rule(policy.rules[decision.rule])
        allowed = decision.action is RuleAction.ALLOW
        details = {
            "protocol": flow.protocol,
            "source": flow.source,
            "source_port": _number(flow.source_port),
            "destination": flow.destination,
            "destination_port": _number(flow.destination_port),
            "icmp": flow.icmp,
            "decided_by": decision.cause.value,
            "rule_number": "" if decision.rule is None else str(decision.rule + 1),
            "rule": rule,
            "count": str(count),
        }
        kind = EventKind.CONNECTION_ALLOWED if allowed else EventKind.CONNECTION_DENIED
        self._events.publish(kind, handle, exit=None, **details)
        if allowed:  # somebody has asked for a log
            shown = {name: text for name, text in details.items() if text}
            log.info("connection.allowed", handle=handle, **shown)


def _place_of(connection: Connection) -> Place:
    decision, flow = connection.decision, connection.flow
    return (
        decision.action,
        decision.cause,
        decision.rule,
        flow.protocol,
        flow.destination,
        flow.destination_port,
        flow.icmp,
    )


def _number(port: int) -> str:
    return str(port) if port else ""
