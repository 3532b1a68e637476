"""A server that is killed and started again while the disk of its state directory is full."""

from __future__ import annotations

import signal

import pytest
from chaos.cell import open_cell

from garden_py.client import AsyncGardenClient, ContainerSpec, ContainerState
from garden_py.client.errors import ServerFault

pytestmark = pytest.mark.root


async def test_server_starts_and_takes_over_on_a_full_disk(no_trace: None) -> None:
    """It lists what there is; what needs room is refused in so many words, and works once there is room."""
    async with open_cell(4) as cell:
        async with AsyncGardenClient(cell.address) as garden:
            kept = await garden.create(ContainerSpec(handle="kept"))
            await garden.create(ContainerSpec(handle="other"))
            filler = cell.fill_disk()
            await cell.end(signal.SIGKILL)
            await cell.start()
            assert (await kept.info()).state is ContainerState.ACTIVE
            with pytest.raises(ServerFault, match=r"full|space"):
                await create_until_refused(garden)
            filler.unlink()
            process = await kept.run(["echo", "room"])
            assert (await process.output()).stdout == b"room\n"
            async for info in garden.list(all_states=True):
                await garden.container(info.handle).destroy()
        assert await cell.end(signal.SIGTERM) == 0


async def create_until_refused(garden: AsyncGardenClient) -> None:
    """Some bytes may be left."""
    for _ in range(20):
        await garden.create()
