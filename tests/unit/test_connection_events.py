"""From what the network has seen to events: what is told at once, what together, and what only counted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from garden_py.model.connection import Connection, Flow
from garden_py.model.netrule import (
    Cause,
    Decision,
    DefaultAction,
    EgressPolicy,
    RuleAction,
    parse_egress_rule,
)
from garden_py.model.spec import ContainerSpec
from garden_py.service.connections import PLACES_MAX, Connections
from garden_py.service.events import KEPT_CONNECTIONS, KEPT_EVENTS, Event, EventHub, EventKind
from garden_py.service.registry import Container, Registry

POLICY = EgressPolicy(DefaultAction.DENY, (parse_egress_rule("tcp:10.0.0.2:443 log"),))
REFUSED = Decision(RuleAction.DENY, Cause.DEFAULT)


def connection(port: int = 80, decision: Decision = REFUSED) -> Connection:
    return Connection(decision, Flow("tcp", "10.0.0.1", "10.0.0.2", 40_000, port))


@pytest.fixture
def events() -> EventHub:
    return EventHub()


@pytest.fixture
def connections(events: EventHub) -> Connections:
    unwritten: Any = None
    registry = Registry(unwritten)
    registry.put_back(Container(ContainerSpec(handle="box", egress=POLICY), "", 0))
    return Connections(registry, events, gather_s=0.01)


async def told(events: EventHub, count: int) -> list[Event]:
    found = []
    async for event in events.watch(0):
        found.append(event)
        if len(found) == count:
            return found
    raise AssertionError


async def test_the_first_is_told_at_once_and_the_rest_together(
    connections: Connections, events: EventHub
) -> None:
    for _ in range(5):
        connections.heard("box", connection())
    assert events.cursor == 1
    first, rest = await told(events, 2)
    assert (first.details["count"], rest.details["count"]) == ("1", "4")
    assert first.kind is EventKind.CONNECTION_DENIED
    assert first.details["decided_by"] == "default"
    connections.heard("box", connection())
    assert events.cursor == 3, "a new interval tells at once again"
    await asyncio.sleep(0.02)
    assert events.cursor == 3, "and nothing more"


async def test_rules_are_named_by_their_text(connections: Connections, events: EventHub) -> None:
    connections.heard("box", connection(443, Decision(RuleAction.ALLOW, Cause.RULE, 0)))
    connections.heard("box", connection(443, Decision(RuleAction.DENY, Cause.RULE, 7)))
    allowed, denied = await told(events, 2)
    assert allowed.kind is EventKind.CONNECTION_ALLOWED
    assert (allowed.details["rule_number"], allowed.details["rule"]) == ("1", "tcp:10.0.0.2:443 log")
    assert denied.details["rule_number"] == "8"
    assert "rule" not in denied.details, "the policy has been replaced since"


async def test_many_places_at_once_are_bounded(connections: Connections, events: EventHub) -> None:
    for port in range(1, 3 * PLACES_MAX):
        connections.heard("box", connection(port))
    assert events.cursor == PLACES_MAX
    connections.heard("gone", connection())
    await asyncio.sleep(0.02)
    assert events.cursor == PLACES_MAX


async def test_connections_push_out_each_other_and_nothing_else() -> None:
    """A watcher that comes back after a flood of them has missed no other event."""
    events = EventHub()
    events.publish(EventKind.CONTAINER_CREATED, "box")
    for number in range(KEPT_CONNECTIONS + 10):
        events.publish(EventKind.CONNECTION_DENIED, "box", count=str(number))
    events.publish(EventKind.CONTAINER_DESTROYED, "box")
    found = await told(events, KEPT_CONNECTIONS + 2)
    assert [found[0].kind, found[-1].kind] == [EventKind.CONTAINER_CREATED, EventKind.CONTAINER_DESTROYED]
    assert found[1].details["count"] == "10"
    assert [event.cursor for event in found] == sorted(event.cursor for event in found)
    assert KEPT_EVENTS > 2
