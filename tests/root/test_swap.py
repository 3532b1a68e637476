"""Swap on top of a memory limit: values in the kernel's files, for the machines that run this have no swap to fill."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.cgroups import cgroups_of
from kit.server import running_server

from garden_py.client import Container, ContainerSpec, GardenClient, InvalidArgument, Limits, ProcessSpec

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
        and not Path("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists(),
        reason="this kernel does not count swap",
    ),
]

MIB = 1 << 20
UNLIMITED = (1 << 64) - 1
SLEEP = ("sleep", ("1000",))


def in_kernel(box: Container, group: str = "work") -> tuple[int, int | None]:
    """Memory limit and swap on top of it; 0 and None: unlimited."""
    for directory in cgroups_of(box.handle):
        if (v2 := directory / group / "memory.swap.max").exists():
            memory, swap = (v2.parent / "memory.max").read_text().strip(), v2.read_text().strip()
            return 0 if memory == "max" else int(memory), None if swap == "max" else int(swap)
        if (v1 := directory / group / "memory.memsw.limit_in_bytes").exists():
            memory, both = ((v1.parent / "memory.limit_in_bytes").read_text(), v1.read_text())
            limited, swap_limited = int(memory) < 1 << 62, int(both) < 1 << 62
            return int(memory) if limited else 0, int(both) - int(memory) if swap_limited else None
    raise AssertionError(f"{box.handle} has no group {group} with swap")


@pytest.mark.cgroup2
def test_swap_of_a_container(garden: GardenClient) -> None:
    """None unless it is stated; up, down and away, with memory or alone, and the kernel has what is told."""
    with garden.create(ContainerSpec(limits=Limits(memory_bytes=64 * MIB))) as box:
        assert (box.limits().swap_bytes, in_kernel(box)) == (0, (64 * MIB, 0))
    with garden.create(ContainerSpec(limits=Limits(memory_bytes=64 * MIB, swap_bytes=32 * MIB))) as box:
        assert (box.limits().swap_bytes, in_kernel(box)) == (32 * MIB, (64 * MIB, 32 * MIB))
        for change, memory, swap in (
            (Limits(memory_bytes=256 * MIB), 256, 32 * MIB),
            (Limits(memory_bytes=16 * MIB), 16, 32 * MIB),
            (Limits(memory_bytes=128 * MIB, swap_bytes=0), 128, 0),
            (Limits(memory_bytes=16 * MIB, swap_bytes=512 * MIB), 16, 512 * MIB),
            (Limits(swap_bytes=UNLIMITED), 16, UNLIMITED),
            (Limits(memory_bytes=32 * MIB), 32, UNLIMITED),
            (Limits(swap_bytes=8 * MIB), 32, 8 * MIB),
        ):
            now = box.update_limits(change)
            assert (now.memory_bytes, now.swap_bytes) == (memory * MIB, swap)
            assert in_kernel(box) == (memory * MIB, None if swap == UNLIMITED else swap)
        assert box.info().spec.limits == Limits(memory_bytes=32 * MIB, swap_bytes=8 * MIB)
        now = box.update_limits(Limits(memory_bytes=0))
        assert (now.memory_bytes, now.swap_bytes, in_kernel(box)) == (0, None, (0, None))
        assert box.info().spec.limits == Limits(memory_bytes=0)
        assert box.update_limits(Limits(memory_bytes=64 * MIB)).swap_bytes == 0


@pytest.mark.cgroup2
def test_swap_of_a_process(garden: GardenClient) -> None:
    """Within its container's, at the start and later; a memory limit that is refused leaves swap as it was."""
    with garden.create() as box:
        limits = Limits(memory_bytes=64 * MIB, swap_bytes=32 * MIB)
        box.start(ProcessSpec(*SLEEP, id="p", limits=limits))
        assert (box.limits("p").swap_bytes, in_kernel(box, "work/p-p")) == (32 * MIB, (64 * MIB, 32 * MIB))
        assert box.update_limits(Limits(swap_bytes=0), "p").swap_bytes == 0
        assert box.update_limits(Limits(memory_bytes=16 * MIB), "p").swap_bytes == 0
        assert in_kernel(box, "work/p-p") == (16 * MIB, 0)
        assert in_kernel(box) == (0, None)
        (process,) = box.processes()
        assert process.spec.limits == Limits(memory_bytes=16 * MIB, swap_bytes=0)


def test_swap_without_a_memory_limit_is_refused(garden: GardenClient) -> None:
    """At create, at start and live: by name, and nothing else of the call is done."""
    alone = Limits(pids=9, swap_bytes=MIB)
    with garden.create() as box:
        box.start(ProcessSpec(*SLEEP, id="p", limits=Limits(pids=5)))
        for call, field in (
            (lambda: garden.create(ContainerSpec(limits=alone)), "spec.limits.swap_bytes"),
            (lambda: box.run(["true"], limits=alone), "spec.limits.swap_bytes"),
            (lambda: box.update_limits(alone), "limits.swap_bytes"),
            (lambda: box.update_limits(alone, "p"), "limits.swap_bytes"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                call()
            assert [violation.field for violation in caught.value.fields] == [field]
        assert (box.limits().pids, box.limits("p").pids) == (0, 5)


def test_server_that_does_not_limit_swap(no_trace: None) -> None:
    """--disable-swap-limit: whoever states nothing may swap as much as there is; what is stated holds."""
    memory = ContainerSpec(limits=Limits(memory_bytes=64 * MIB))
    with (
        running_server("--disable-swap-limit") as server,
        GardenClient(server.address) as garden,
        garden.create(memory) as box,
    ):
        assert (box.limits().swap_bytes, in_kernel(box)) == (UNLIMITED, (64 * MIB, None))
        assert box.update_limits(Limits(memory_bytes=32 * MIB)).swap_bytes == UNLIMITED
        box.start(ProcessSpec(*SLEEP, id="p", limits=Limits(memory_bytes=16 * MIB)))
        assert in_kernel(box, "work/p-p") == (16 * MIB, None)
        assert box.update_limits(Limits(swap_bytes=0)).swap_bytes == 0
