"""The janitor believes only what two looks show, and takes nothing that somebody is about to use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from kit.core import Server

from garden_py.model.errors import HostFault
from garden_py.model.leak import Direction, Leak, LeakKind, LeakReport
from garden_py.model.spec import ContainerSpec
from garden_py.service.events import Event
from garden_py.service.ports import Witness

ORPHAN = Leak(LeakKind.CGROUP, Direction.ORPHAN, "garden-1234/gone", "gone")
OTHER = Leak(LeakKind.LINK, Direction.ORPHAN, "gdn1234-7")
TABLE = Leak(LeakKind.NFT_CHAIN, Direction.MISSING, "table inet garden_1234")
Look = Callable[[Witness], list[Leak]]


def sees(*leaks: Leak) -> Look:
    return lambda witness: list(leaks)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A service over a fake host; the pause between two looks is none."""
    server = Server()
    await server.start()
    server.core.janitor._settle_s = 0.0
    yield server
    await server.core.close()


async def until_removing(server: Server) -> None:
    """Let the loop turn until the backend is asked to remove the orphan."""
    for _ in range(5000):
        if ("remove_leak", ORPHAN.name) in server.backend.calls:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(server.backend.calls)


async def until_told(server: Server, count: int) -> list[Event]:
    """Let the loop turn until so many leaks have been told."""
    for _ in range(5000):
        told = [event for event in server.kept() if event.kind.value == "LEAK_FOUND"]
        if len(told) >= count:
            return told
        await asyncio.sleep(0.001)
    raise AssertionError(server.kept())


def metric(server: Server, line: str) -> bool:
    return line in server.core.metrics.render().decode().splitlines()


async def test_only_what_two_looks_show_is_a_leak(server: Server) -> None:
    """The kernel finishes some things later than it was told to."""
    server.backend.looks = [sees(ORPHAN, OTHER), sees(ORPHAN)]
    assert await server.core.janitor.check(remove=False) == [LeakReport(ORPHAN)]
    server.backend.looks = [sees(OTHER), sees(ORPHAN)]
    assert await server.core.janitor.check(remove=False) == []


async def test_nothing_found_needs_no_second_look(server: Server) -> None:
    """The usual round costs one look and no pause."""
    server.backend.looks = [sees(), sees(ORPHAN)]
    assert await server.core.janitor.check(remove=True) == []
    assert len(server.backend.looks) == 1


async def test_orphan_is_removed_told_and_counted_once(server: Server) -> None:
    """However often it is seen before it goes."""
    for _ in range(2):
        server.backend.looks += [sees(ORPHAN), sees(ORPHAN)]
        await server.core.janitor.check(remove=False)
    server.backend.looks = [sees(ORPHAN), sees(ORPHAN)]
    assert await server.core.janitor.check(remove=True) == [LeakReport(ORPHAN, removed=True)]
    (event,) = [event for event in server.kept() if event.kind.value == "LEAK_FOUND"]
    assert event.handle == "gone"
    assert event.details == {
        "what": "cgroup", "direction": "orphan", "name": "garden-1234/gone", "removed": "no",
    }  # fmt: skip
    assert metric(server, 'garden_leaks_found_total{direction="orphan",kind="cgroup"} 1.0')
    assert metric(server, 'garden_leaks_removed_total{kind="cgroup"} 1.0')


async def test_what_is_kept_is_never_handed_to_the_backend(server: Server) -> None:
    """Neither what only looks like ours, nor what is missing."""
    foreign = Leak(LeakKind.LINK, Direction.ORPHAN, "gdn1234-zz", keep_because="its name")
    missing = Leak(LeakKind.LINK, Direction.MISSING, "gdn1234-8", "web")
    server.backend.looks = [sees(foreign, missing), sees(foreign, missing)]
    reports = await server.core.janitor.check(remove=True)
    assert [report.removed for report in reports] == [False, False]
    assert reports[0].kept_because == "its name"
    assert reports[1].kept_because
    assert not [call for call in server.backend.calls if call[0] == "remove_leak"]


async def test_leftovers_of_a_handle_that_is_in_use_again_are_kept(server: Server) -> None:
    """The backend is told the claims of that very moment."""
    await server.core.containers.create(ContainerSpec(handle="gone"))
    server.backend.looks = [sees(ORPHAN), sees(ORPHAN)]
    (report,) = await server.core.janitor.check(remove=True)
    assert not report.removed
    assert "in use" in report.kept_because


async def test_create_waits_until_leftovers_of_its_handle_are_gone(server: Server) -> None:
    """Else the removal would take the new container's things."""
    server.backend.remove_gate.clear()
    server.backend.looks = [sees(ORPHAN), sees(ORPHAN)]
    check = asyncio.ensure_future(server.core.janitor.check(remove=True))
    await until_removing(server)
    create = asyncio.ensure_future(server.core.containers.create(ContainerSpec(handle="gone")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert ("create", "gone") not in server.backend.calls
    server.backend.remove_gate.set()
    await asyncio.gather(check, create)
    assert ("create", "gone") in server.backend.calls


async def test_leftovers_of_a_handle_that_is_being_made_are_left_alone(server: Server) -> None:
    """What looks orphaned may be half made."""
    server.backend.create_gate.clear()
    create = asyncio.ensure_future(server.core.containers.create(ContainerSpec(handle="gone")))
    await asyncio.sleep(0)
    server.backend.looks = [sees(ORPHAN), sees(ORPHAN)]
    (report,) = await server.core.janitor.check(remove=True)
    assert not report.removed
    server.backend.create_gate.set()
    await create


async def test_witness_sees_what_came_and_went_during_the_look(server: Server) -> None:
    """A container whose whole life falls into the look is claimed all the same."""
    containers = server.core.containers
    await containers.create(ContainerSpec(handle="steady"))
    await containers.create(ContainerSpec(handle="changed"))
    with server.core.registry.witness() as witness:
        await containers.create(ContainerSpec(handle="brief"))
        await containers.destroy("brief")
        containers.update_properties("changed", {"a": "b"}, [])
        claims, settled = witness.claims(), witness.settled()
    assert {claim.handle for claim in claims} == {"steady", "changed", "brief"}
    assert any(claim.handle == "brief" and claim.facts for claim in claims)
    assert [claim.handle for claim in settled] == ["steady"]


async def test_container_whose_change_is_under_way_lacks_nothing(server: Server) -> None:
    """It has recorded already what is not there yet."""
    container = await server.core.containers.create(ContainerSpec(handle="web"))
    with server.core.registry.witness() as witness:
        assert [claim.handle for claim in witness.settled()] == ["web"]
        async with container.changing:
            assert witness.settled() == []


async def test_a_loss_is_dealt_with_at_once(server: Server) -> None:
    """Not only in the next round; and its event says that it has been put back."""
    janitor = server.core.janitor
    janitor._interval_s = 3600
    server.backend.can_put_back = {TABLE.name}
    janitor.start()
    await asyncio.sleep(0.01)
    server.backend.looks = [sees(TABLE), sees(TABLE)]
    server.backend.loss.set()
    await until_told(server, 1)
    server.backend.looks = [sees(TABLE), sees(TABLE)]
    server.backend.loss.set()
    told = await until_told(server, 2)  # what has been put back can be lost again
    await janitor.close()
    assert [event.details["put_back"] for event in told] == ["yes", "yes"]
    assert server.backend.calls.count(("put_back", TABLE.name)) == 2


async def test_failed_round_is_counted_and_the_next_one_comes(server: Server) -> None:
    """A dead launcher must not end the janitor."""

    def fails(witness: Witness) -> list[Leak]:
        raise HostFault("look", "no launcher")

    server.backend.looks = [fails, sees(ORPHAN), sees(ORPHAN)]
    janitor = server.core.janitor
    janitor._interval_s = 0.001
    janitor.start()
    await until_removing(server)
    await janitor.close()
    assert metric(server, "garden_janitor_failures_total 1.0")


async def test_what_is_missing_and_can_be_made_again_is(server: Server) -> None:
    """But only by a check that may change something, and what it cannot make is told as before."""
    table = TABLE
    link = Leak(LeakKind.LINK, Direction.MISSING, "gdn1234-7", "box")
    server.backend.can_put_back = {table.name}
    server.backend.looks = [sees(table, link)] * 4
    told = await server.core.janitor.check(remove=False)
    assert [report.kept_because.split(":")[0] for report in told] == ["it is missing"] * 2
    assert ("put_back", table.name) not in server.backend.calls
    told = await server.core.janitor.check(remove=True)
    assert told[0].kept_because == "it was missing and has been put back"
    assert told[1].kept_because.startswith("it is missing: what works without it goes on")
