"""From what the network has seen to events: what is told at once, what together, and what only counted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
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
from garden_py.service.connections import PLACES_MAX, Connections, changing_rules
from garden_py.service.events import KEPT_CONNECTIONS, KEPT_EVENTS, Event, EventHub, EventKind
from garden_py.service.registry import Container, Registry

FIRST, SECOND, COMMON = "tcp:10.0.0.2:443 log", "tcp:10.0.0.0/8:443 log", "udp:10.0.0.2:53 log"
POLICY, OTHER = (
    EgressPolicy(DefaultAction.DENY, (parse_egress_rule(each), parse_egress_rule(COMMON)))
    for each in (FIRST, SECOND)
)
REFUSED = Decision(RuleAction.DENY, Cause.DEFAULT)


def connection(port: int = 80, decision: Decision = REFUSED) -> Connection:
    return Connection(decision, Flow("tcp", "10.0.0.1", "10.0.0.2", 40_000, port))


@pytest.fixture
def events() -> EventHub:
    return EventHub()


@pytest.fixture
def registry() -> Registry:
    unwritten: Any = None
    registry = Registry(unwritten)
    registry.put_back(Container(ContainerSpec(handle="box", egress=POLICY), "", 0))
    return registry


@pytest.fixture
def connections(events: EventHub, registry: Registry) -> Connections:
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


async def test_rules_are_named_as_they_were_when_they_decided(
    connections: Connections, events: EventHub, registry: Registry
) -> None:
    """The rest is told a second later, when the policy may be another; rules before and after are not one place."""
    decided = connection(443, Decision(RuleAction.ALLOW, Cause.RULE, 0))
    box = registry.find("box")
    assert box is not None
    for _ in range(2):
        connections.heard("box", decided)
    box.spec = replace(box.spec, egress=OTHER)
    connections.heard("box", decided)
    found = await told(events, 3)
    assert [event.details["rule"] for event in found] == [FIRST, SECOND, FIRST]
    assert [event.details["count"] for event in found] == ["1", "1", "1"]


async def test_while_rules_change_only_what_both_policies_say_is_named(
    connections: Connections, events: EventHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them has decided cannot be known, also a moment after the change."""
    monkeypatch.setattr("garden_py.service.connections.SETTLE_S", 0.02)
    box = registry.find("box")
    assert box is not None
    with changing_rules(box, POLICY, OTHER):
        for number in (0, 1):
            connections.heard("box", connection(443, Decision(RuleAction.ALLOW, Cause.RULE, number)))
        box.spec = replace(box.spec, egress=OTHER)
    connections.heard("box", connection(444, Decision(RuleAction.ALLOW, Cause.RULE, 0)))
    await asyncio.sleep(0.03)
    connections.heard("box", connection(445, Decision(RuleAction.ALLOW, Cause.RULE, 0)))
    found = await told(events, 4)
    assert [event.details.get("rule", "") for event in found] == ["", COMMON, "", SECOND]


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
