"""Connections that the network refused or logged, told as events: at once, and then once a second per destination.

A program that is refused tries again and again, often to the same place. The first try is told at once; those to the
same place within the next second are one event with their number. Of many places at once the surplus is counted only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from garden_py.model.connection import Connection
from garden_py.model.netrule import Cause, Decision, EgressPolicy, RuleAction, format_egress_rule
from garden_py.observe.apart import apart
from garden_py.service.events import EventHub, EventKind
from garden_py.service.registry import Container, Registry

log = structlog.get_logger()
GATHER_S = 1.0
PLACES_MAX = 32
"""Of a container in one interval; more are told as a number."""

SETTLE_S = 1.0
"""After a change of rules, when all has been heard of that former ones decided: the kernel sends within 0.1 s."""

Place = tuple[RuleAction, Cause, int | None, str, str, int, str]


@contextmanager
def changing_rules(container: Container, former: EgressPolicy, wanted: EgressPolicy) -> Iterator[None]:
    """While rules are changed, and until that has settled, either policy may be what has decided."""
    container.egress_unsettled += (former, wanted)
    try:
        yield
    finally:
        apart(asyncio.get_running_loop().call_later, SETTLE_S, _settle, container, former, wanted)


def _settle(container: Container, *policies: EgressPolicy) -> None:
    for policy in policies:
        container.egress_unsettled.remove(policy)


@dataclass(slots=True)
class _Gathered:
    """What has come of one container since its interval began, by place and the text of the rule."""

    counts: dict[tuple[Place, str], tuple[Connection, int]] = field(default_factory=dict)
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
        rule = self._rule_of(handle, connection.decision)
        place = _place_of(connection), rule
        if place in gathered.counts:
            first, count = gathered.counts[place]
            gathered.counts[place] = (first, count + 1)
        elif len(gathered.counts) < PLACES_MAX:
            gathered.counts[place] = (connection, 0)
            self._publish(handle, connection, rule, 1)
        else:
            gathered.untold += 1

    def _tell_rest(self, handle: str) -> None:
        gathered = self._gathered.pop(handle)
        for (_, rule), (connection, more) in gathered.counts.items():
            if more:
                self._publish(handle, connection, rule, more)
        if gathered.untold:
            log.info("connections.untold", handle=handle, connections=gathered.untold)

    def _rule_of(self, handle: str, decision: Decision) -> str:
        """The text of the rule that has decided; empty: none has, or it is not known which policy's."""
        container, number = self._registry.find(handle), decision.rule
        if container is None or container.spec.egress is None or number is None:
            return ""
        policies = [container.spec.egress, *container.egress_unsettled]
        rules = {policy.rules[number] if number < len(policy.rules) else None for policy in policies}
        rule = rules.pop()
        return "" if rules or rule is None else format_egress_rule(rule)

    def _publish(self, handle: str, connection: Connection, rule: str, count: int) -> None:
        if self._registry.find(handle) is None:
            return
        decision, flow = connection.decision, connection.flow
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
