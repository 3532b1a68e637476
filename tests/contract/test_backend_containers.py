"""What every backend promises about containers: all or nothing, any number of times, and recorded beforehand."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from kit.rights import may_raise_limits
from kit.stage import Stage, chunks_of, eventually, exit_of, full_spec, output_of

from garden_py.model import errors
from garden_py.model.limits import IO_RATES, SWAP_UNLIMITED, Limits
from garden_py.model.netrule import DefaultAction, EgressPolicy, parse_egress_rule
from garden_py.model.process import OutputStream
from garden_py.model.spec import PortMapping, Transport
from garden_py.service.ports import OutOfMemory


class Refused(Exception):
    """A record that cannot be written."""


async def test_create_gives_a_container_that_runs_processes(stage: Stage) -> None:
    """The return of create is the promise that everything is in place."""
    handle = await stage.create()
    network = stage.backend.facts_of_network(handle)
    assert network.container_ip
    assert network.host_ip
    assert network.container_ip != network.host_ip
    assert stage.backend.pid(handle) > 1
    assert stage.backend.workload_count(handle) == 0
    process = await stage.start(handle, "echo", "alive")
    assert await output_of(process) == (b"alive\n", b"")


async def test_two_containers_share_nothing_that_names_them(stage: Stage) -> None:
    """Addresses and PID 1 tell containers apart on the host."""
    first, second = await stage.create(), await stage.create()
    assert stage.backend.pid(first) != stage.backend.pid(second)
    addresses = [stage.backend.facts_of_network(h).container_ip for h in (first, second)]
    assert len(set(addresses)) == 2


async def test_facts_are_recorded_before_anything_is_made(stage: Stage) -> None:
    """A server killed at any moment must find what it had begun: no record, no container."""
    before = stage.backend.capacity().ports_in_use

    def refuse(facts: dict[str, Any]) -> None:
        raise Refused

    with pytest.raises(Refused):
        await stage.backend.create(
            full_spec("unrecorded", port_mappings=(PortMapping(0, 80),)), refuse, lambda progress: None
        )
    with pytest.raises(errors.ContainerNotFound):
        stage.backend.pid("unrecorded")
    assert stage.backend.capacity().ports_in_use == before


async def test_facts_alone_are_enough_to_destroy(stage: Stage) -> None:
    """A destroy after a restart has nothing but the journal."""
    handle = await stage.create()
    process = await stage.start(handle, "sleep", "1000")
    await stage.restart()
    await stage.destroy(handle)
    with pytest.raises(errors.ContainerNotFound):
        stage.backend.pid(handle)
    assert process.pid > 1


async def test_destroy_may_be_repeated(stage: Stage) -> None:
    """Callers retry; a destroy of what is gone, or never was, is done at once."""
    handle = await stage.create()
    await stage.destroy(handle)
    await stage.destroy(handle)
    await stage.backend.destroy("never-made", {})
    with pytest.raises(errors.ContainerNotFound):
        await stage.backend.usage(handle)


async def test_a_handle_can_be_used_again_after_destroy(stage: Stage) -> None:
    """Nothing of the first container is seen by the second."""
    for round_ in ("one", "two"):
        await stage.create("again", limits=Limits(pids=64))
        process = await stage.start("again", "echo", round_, id="same-id")
        assert (await output_of(process))[0] == f"{round_}\n".encode()
        await stage.destroy("again")


async def test_address_is_free_again_after_destroy(stage: Stage) -> None:
    """More containers than the pool holds can be made one after the other."""
    addresses = set()
    for _ in range(3):
        handle = await stage.create()
        addresses.add(stage.backend.facts_of_network(handle).container_ip)
        await stage.destroy(handle)
    assert len(addresses) == 1


async def test_failed_create_leaves_nothing(stage: Stage) -> None:
    """A port that is taken fails the create; the pools are as before and the handle can be used."""
    first = await stage.create(port_mappings=(PortMapping(0, 80),))
    taken = stage.backend.facts_of_network(first).mapped_ports[0].host_port
    before = stage.backend.capacity().ports_in_use
    with pytest.raises(errors.PortInUse) as refused:
        await stage.create("loser", port_mappings=(PortMapping(0, 80), PortMapping(taken, 80)))
    assert refused.value.port == taken
    assert stage.backend.capacity().ports_in_use == before
    with pytest.raises(errors.ContainerNotFound):
        stage.backend.facts_of_network("loser")
    await stage.create("loser")


async def test_missing_image_is_the_callers_mistake(stage: Stage) -> None:
    """A root file system that is not there is named as a field, and nothing was taken for it."""
    with pytest.raises(errors.ImageNotFound) as refused:
        await stage.create("imageless", image="/nonexistent/image")
    assert refused.value.violations[0].field == "spec.image"
    await stage.create("imageless")


async def test_pool_exhaustion_says_which_pool(stage: Stage) -> None:
    """An operator has to learn which setting to change."""
    ports = tuple(PortMapping(0, 1000 + n) for n in range(stage.backend.capacity().ports + 1))
    with pytest.raises(errors.PoolExhausted) as refused:
        await stage.create(port_mappings=ports)
    assert (refused.value.pool, refused.value.flag) == ("ports", "--port-pool-size")
    assert refused.value.size == stage.backend.capacity().ports
    assert stage.backend.capacity().ports_in_use == 0


async def test_port_is_mapped_on_a_running_container(stage: Stage) -> None:
    """The mapping is in the facts before it works, so that a destroy after a crash removes it."""
    handle = await stage.create()
    mapped = await stage.backend.map_port(handle, PortMapping(0, 0), stage.recorder(handle))
    assert mapped.host_port > 0
    assert mapped.container_port == mapped.host_port
    assert stage.backend.facts_of_network(handle).mapped_ports == (mapped,)
    with pytest.raises(errors.PortInUse):
        await stage.backend.map_port(handle, mapped, stage.recorder(handle))
    assert stage.backend.facts_of_network(handle).mapped_ports == (mapped,)
    await stage.destroy(handle)
    assert stage.backend.capacity().ports_in_use == 0


async def test_limits_are_read_back(stage: Stage) -> None:
    """What was asked for is in force, and an update changes only what it states."""
    asked = Limits(memory_bytes=64 << 20, cpu_weight=50, cpu_quota_us=50_000, pids=40)
    handle = await stage.create(limits=asked)
    now = await stage.backend.limits(handle)
    assert now.swap_bytes in (0, None)  # some kernels do not count it
    assert replace(now, swap_bytes=None, **dict.fromkeys(("io_weight", *IO_RATES))) == replace(
        asked, cpu_period_us=100_000, cpu_shares=now.cpu_shares, disk_bytes=0, disk_inodes=0
    )
    assert now.cpu_shares in (None, 512)  # cgroup v1 keeps nothing but shares
    changed = await stage.backend.update_limits(handle, Limits(memory_bytes=128 << 20, pids=0))
    assert changed == replace(now, memory_bytes=128 << 20, pids=0)
    assert await stage.backend.limits(handle) == changed


async def test_swap_goes_with_a_memory_limit(stage: Stage) -> None:
    """It stays on top of it when that changes, and goes with it; alone it makes no sense."""
    handle = await stage.create(limits=Limits(memory_bytes=64 << 20))
    if (await stage.backend.limits(handle)).swap_bytes is None:
        pytest.skip("this kernel does not count swap")
    for change, expected in (
        (Limits(swap_bytes=32 << 20), (64 << 20, 32 << 20)),
        (Limits(memory_bytes=48 << 20), (48 << 20, 32 << 20)),
        (Limits(memory_bytes=96 << 20, swap_bytes=4 << 20), (96 << 20, 4 << 20)),
        (Limits(swap_bytes=SWAP_UNLIMITED), (96 << 20, SWAP_UNLIMITED)),
        (Limits(memory_bytes=64 << 20, swap_bytes=0), (64 << 20, 0)),
        (Limits(memory_bytes=0), (0, None)),
        (Limits(memory_bytes=64 << 20), (64 << 20, 0)),
    ):
        now = await stage.backend.update_limits(handle, change)
        assert (now.memory_bytes, now.swap_bytes) == expected
        assert await stage.backend.limits(handle) == now
    await stage.backend.update_limits(handle, Limits(memory_bytes=0))
    with pytest.raises(errors.InvalidField) as refused:
        await stage.backend.update_limits(handle, Limits(pids=3, swap_bytes=1 << 20))
    assert refused.value.field == "limits.swap_bytes"
    assert (await stage.backend.limits(handle)).pids == 0


async def test_limits_of_a_process(stage: Stage) -> None:
    """They are read and changed beside the container's, and its spec says them; others are refused with a reason."""
    handle = await stage.create()
    before = await stage.backend.limits(handle)
    await stage.start(handle, "sleep", "1000", id="own", limits=Limits(memory_bytes=64 << 20))
    await stage.start(handle, "sleep", "1000", id="plain")
    now = await stage.backend.limits(handle, "own")
    assert (now.memory_bytes, now.pids) == (64 << 20, 0)
    changed = await stage.backend.update_limits(handle, Limits(pids=7), "own")
    assert (changed.memory_bytes, changed.pids) == (64 << 20, 7)
    assert await stage.backend.limits(handle) == before
    with pytest.raises(errors.ProcessNotLimited):
        await stage.backend.update_limits(handle, Limits(pids=7), "plain")
    with pytest.raises(errors.ProcessNotFound):
        await stage.backend.limits(handle, "nobody")


async def test_usage_of_a_process_that_is_not_counted_by_itself(stage: Stage) -> None:
    """It is refused for what it is: a process that is known is not said to be unknown."""
    handle = await stage.create()
    await stage.start(handle, "sleep", "1000", id="own", limits=Limits(memory_bytes=64 << 20))
    await stage.start(handle, "sleep", "1000", id="plain")
    ended = await stage.start(handle, "true", id="ended", limits=Limits(memory_bytes=64 << 20))
    await exit_of(ended)
    assert (await stage.backend.usage(handle, "own")).pids >= 1
    with pytest.raises(errors.ProcessNotCounted, match="is counted with its container"):
        await stage.backend.usage(handle, "plain")
    with pytest.raises(errors.ProcessExited, match="ended has exited"):
        await stage.backend.usage(handle, "ended")
    with pytest.raises(errors.ProcessNotFound):
        await stage.backend.usage(handle, "nobody")


async def test_rlimits_of_a_container_and_its_processes(stage: Stage) -> None:
    """Of a container they are its processes', those under way included, unless these state the resource themselves."""
    handle = await stage.create(limits=Limits(rlimits=(("core", 5), ("nofile", 500))))
    await stage.start(handle, "sleep", "1000", id="plain")
    await stage.start(handle, "sleep", "1000", id="own", rlimits=(("nofile", 100),))
    assert await stage.backend.limits(handle, "plain") == Limits(rlimits=(("core", 5), ("nofile", 500)))
    now = await stage.backend.update_limits(handle, Limits(rlimits=(("nofile", 400),)))
    assert now.rlimits == (("core", 5), ("nofile", 400))
    assert (await stage.backend.limits(handle)).rlimits == now.rlimits
    assert (await stage.backend.limits(handle, "plain")).rlimits == now.rlimits
    assert (await stage.backend.limits(handle, "own")).rlimits == (("core", 5), ("nofile", 100))
    changed = await stage.backend.update_limits(handle, Limits(rlimits=(("core", 3),)), "own")
    assert changed.rlimits == (("core", 3), ("nofile", 100))
    assert (await stage.backend.limits(handle, "plain")).rlimits == now.rlimits
    with pytest.raises(errors.ProcessNotLimited):
        await stage.backend.update_limits(handle, Limits(pids=7, rlimits=(("core", 1),)), "plain")


@pytest.mark.parametrize("process_id", [None, "own"])
async def test_change_of_limits_that_is_not_recorded_is_not_made(
    stage: Stage, process_id: str | None
) -> None:
    """Whatever `record` raises comes out, with everything as it was."""
    handle = await stage.create(limits=Limits(pids=100, cpu_weight=50, rlimits=(("core", 5),)))
    process = await stage.start(
        handle, "sleep", "1000", id="own", limits=Limits(pids=9), rlimits=(("nofile", 100),)
    )
    before = [await stage.backend.limits(handle, each) for each in (None, "own")]
    spec, told = process.spec, []

    def record(now: Limits) -> None:
        told.append(now)
        raise errors.HostFault("journal", "full")

    asked = Limits(pids=20, cpu_weight=70, rlimits=(("core", 4), ("nofile", 90)))
    with pytest.raises(errors.HostFault, match="full"):
        await stage.backend.update_limits(handle, asked, process_id, record=record)
    assert [(now.pids, dict(now.rlimits)["nofile"]) for now in told] == [(20, 90)]
    after = [await stage.backend.limits(handle, each) for each in (None, "own")]
    assert process.spec == spec
    assert after[0] == before[0]
    # Without CAP_SYS_RESOURCE, a hard limit that was lowered cannot be raised again.
    assert after[1].without_rlimits() == before[1].without_rlimits()
    if may_raise_limits():
        assert after[1] == before[1]


async def test_container_without_limits_has_none(stage: Stage) -> None:
    """0 is the reading of "unlimited", whatever the kernel writes for it."""
    now = await stage.backend.limits(await stage.create())
    assert (now.memory_bytes, now.cpu_quota_us, now.pids, now.cpu_weight) == (0, 0, 0, 100)


async def test_usage_counts_tasks_and_shows_limits(stage: Stage) -> None:
    """PID 1 is counted in the container, not in its workload."""
    handle = await stage.create(limits=Limits(memory_bytes=64 << 20, pids=128))
    idle = await stage.backend.usage(handle)
    assert idle.pids == 1
    assert (idle.memory_limit_bytes, idle.pids_limit) == (64 << 20, 128)
    assert idle.memory_bytes > 0
    assert idle.cpu_usage_ns > 0
    process = await stage.start(handle, "sleep", "1000")
    assert (await stage.backend.usage(handle)).pids == 2
    assert stage.backend.workload_count(handle) == 1
    await process.signal(9, group=False)
    await exit_of(process)


async def test_start_beyond_the_limit_of_tasks_is_refused(stage: Stage) -> None:
    """It takes nothing away: as soon as one ends there is room again."""
    handle = await stage.create(limits=Limits(pids=1))
    first = await stage.start(handle, "sleep", "1000")
    with pytest.raises(errors.TaskLimitReached) as caught:
        await stage.start(handle, "sleep", "1000")
    assert (caught.value.tasks, caught.value.limit) == (1, 1)
    await first.signal(9, group=False)
    await exit_of(first)
    assert await exit_of(await stage.start(handle, "true")) == (0, None)


async def test_running_out_of_memory_is_told_and_spares_the_container(stage: Stage) -> None:
    """The hog dies with the reason on its exit status; PID 1 lives and runs the next process."""
    handle = await stage.create(limits=Limits(memory_bytes=16 << 20))
    hog = await stage.start(handle, "tail", "/dev/zero")
    assert await exit_of(hog) == (None, 9)
    assert hog.exit is not None
    assert hog.exit.out_of_memory
    assert "out of memory" in hog.exit.reason
    await eventually(lambda: bool(stage.heard.out_of_memory), "an out-of-memory report")
    assert stage.heard.out_of_memory == [(handle, OutOfMemory(limit_bytes=16 << 20))]
    assert await exit_of(await stage.start(handle, "true")) == (0, None)
    assert stage.heard.broken == []


async def test_egress_policy_is_replaced_and_counted(stage: Stage) -> None:
    """There is one count per rule, in the rules' order, also after a change."""
    deny = EgressPolicy(DefaultAction.DENY, (parse_egress_rule("tcp:10.0.0.1:80"),))
    handle = await stage.create(egress=deny)
    assert len((await stage.backend.egress_counts(handle, 1)).rules) == 1
    rules = tuple(parse_egress_rule(f"tcp:10.0.0.{n}:80") for n in range(1, 6))
    await stage.backend.set_egress(handle, EgressPolicy(DefaultAction.ALLOW, rules))
    counts = await stage.backend.egress_counts(handle, 5)
    assert [rule.packets for rule in counts.rules] == [0] * 5


async def test_udp_and_tcp_ports_are_different_pools(stage: Stage) -> None:
    """A UDP mapping keeps its transport on the way to the facts."""
    handle = await stage.create(port_mappings=(PortMapping(0, 53, Transport.UDP),))
    (mapped,) = stage.backend.facts_of_network(handle).mapped_ports
    assert (mapped.container_port, mapped.transport) == (53, Transport.UDP)


@pytest.mark.parametrize("verb", ["usage", "limits"])
async def test_unknown_handle_is_not_found(stage: Stage, verb: str) -> None:
    """Every verb says so in the same way."""
    with pytest.raises(errors.ContainerNotFound):
        await getattr(stage.backend, verb)("unknown")


async def test_files_go_in_and_come_out(stage: Stage) -> None:
    """What was copied in is what is copied out, byte by byte."""
    handle = await stage.create()
    content = bytes(range(256)) * 100
    await stage.backend.stream_in(handle, "/tmp", "", chunks_of(tar_of("data.bin", content)))
    packed = b"".join([chunk async for chunk in stage.backend.stream_out(handle, "/tmp/data.bin", "")])
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        member = archive.extractfile("data.bin")
        assert member is not None
        assert member.read() == content


async def test_copies_fail_with_a_reason(stage: Stage) -> None:
    """A missing path, a broken archive and an unknown user are three different errors."""
    handle = await stage.create()
    with pytest.raises(errors.CopyFailed) as missing:
        await drain(stage.backend.stream_out(handle, "/no/such/file", ""))
    assert missing.value.reason == "no_such_path"
    with pytest.raises(errors.CopyFailed) as broken:
        await stage.backend.stream_in(handle, "/tmp", "", chunks_of(b"this is no tar" * 100))
    assert broken.value.reason == "broken_archive"
    with pytest.raises(errors.UserNotFound):
        await stage.backend.stream_in(handle, "/tmp", "stranger", chunks_of(tar_of("a", b"b")))
    await eventually(lambda: stage.backend.workload_count(handle) == 0, "an empty workload")


async def test_destroy_ends_processes_and_says_so(stage: Stage) -> None:
    """Whoever waits for a process of a destroyed container gets an answer."""
    handle = await stage.create()
    process = await stage.start(handle, "sh", "-c", "echo ready; exec sleep 1000")
    waiting = asyncio.ensure_future(exit_of(process))
    await eventually(lambda: process.output(OutputStream.STDOUT).end_offset == 6, "its output")
    await stage.destroy(handle)
    assert await waiting == (None, 9)
    assert stage.heard.exits == [(handle, process.id)]
    assert process.output(OutputStream.STDOUT).closed


def tar_of(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


async def drain(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


async def test_pools_tell_what_is_taken_and_given_back(stage: Stage) -> None:
    """What is in use never exceeds the size, and a destroyed container has nothing of it."""
    before = stage.backend.pools()
    handle = await stage.create(port_mappings=(PortMapping(0, 80),))
    during = stage.backend.pools()
    assert during["tcp_ports"].in_use == before["tcp_ports"].in_use + 1
    assert during.keys() == before.keys()
    assert all(0 <= level.in_use <= level.size for level in during.values())
    await stage.destroy(handle)
    assert stage.backend.pools() == before


async def test_there_are_clues_to_a_container_and_to_what_is_none(stage: Stage) -> None:
    """Listing them never fails, their names differ, and reading one fails as the host does, if at all."""
    handle = await stage.create()
    for clues in (stage.backend.clues(handle, stage.facts[handle]), stage.backend.clues("nobody", {})):
        names = [clue.name for clue in clues]
        assert len(names) == len(set(names))
        for clue in clues:
            with suppress(errors.GardenError, OSError):
                assert isinstance(await clue.read(), bytes)
