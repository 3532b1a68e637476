"""Many callers at once: gRPC, forks and runtimes side by side must neither hang nor mix anything up."""

from __future__ import annotations

import asyncio

import pytest
from kit.server import ServerProcess

from garden_py.client import AsyncGardenClient, ContainerSpec

pytestmark = pytest.mark.root

LIVES = 200
IN_FLIGHT = 8
DEADLINE_S = 240


async def test_200_lives_with_8_in_flight(garden_server: ServerProcess) -> None:
    """Create, run, destroy: every output is its own container's, every exit code right, no call hangs."""
    slots = asyncio.Semaphore(IN_FLIGHT)
    async with AsyncGardenClient(garden_server.address) as garden:

        async def live(number: int) -> None:
            async with slots:
                container = await garden.create(ContainerSpec(handle=f"life-{number}"))
                script = f"echo {number}; hostname; exit {number % 100}"
                async with await container.run(["sh", "-c", script]) as process:
                    output = await process.output()
                assert output.stdout.decode().split() == [str(number), f"life-{number}"]
                assert output.exit.code == number % 100
                await container.destroy()

        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as lives:
            for number in range(LIVES):
                lives.create_task(live(number))
        capacity = await garden.capacity()
        assert (capacity.containers, capacity.ports_in_use) == (0, 0)


async def test_100_processes_at_once_in_one_container(garden_server: ServerProcess) -> None:
    """Each gets its own streams and its own exit."""
    async with AsyncGardenClient(garden_server.address) as garden:
        container = await garden.create()

        async def run(number: int) -> None:
            async with await container.run(["sh", "-c", f"cat; echo {number} >&2; exit {number}"]) as process:
                await process.stdin.write(b"%d" % number * 1000)
                await process.stdin.close()
                output = await process.output()
            assert output.stdout == b"%d" % number * 1000
            assert (output.stderr, output.exit.code) == (b"%d\n" % number, number)

        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as runs:
            for number in range(100):
                runs.create_task(run(number))
        await container.destroy()
