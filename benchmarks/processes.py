"""Run `true` and see its exit, from each kind of client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from time import perf_counter

from measure import alternate, timing
from report import Row, at_most, ratio_at_most
from setting import Setting

from garden_py.client import AsyncContainer, AsyncGardenClient, Container

_PEER = "runc exec"


def measure_run(setting: Setting) -> Iterator[Row]:
    """In one container of the server and one of bare runc, both with the agent as PID 1."""
    cell, runc = setting.cell, setting.runc
    name = runc.new_id()
    with cell.container() as handle, asyncio.Runner() as loop:
        asynchronous = loop.run(_open_async(cell.address, handle))
        container = cell.client.container(handle)
        runc.run_ms(name)
        try:
            found = alternate(
                {
                    "stub": lambda: cell.run_ms(handle, "true"),
                    _PEER: lambda: runc.exec_ms(name, "/bin/true"),
                    "client": timing(lambda: _run_true(container)),
                    "async": lambda: loop.run(_run_true_async(asynchronous[1])),
                },
                rounds=setting.rounds,
            )
        finally:
            runc.delete_ms(name)
            loop.run(asynchronous[0].close())
    marks = (at_most(4), ratio_at_most(0.2))
    for subject, text in (
        ("stub", "raw stub"),
        ("client", "client library"),
        ("async", "async client library"),
    ):
        yield Row(f"run `true` → exit, {text}", "ms", found[subject], _PEER, found[_PEER], marks)


def _run_true(container: Container) -> None:
    with container.run(["true"]) as process:
        if process.wait().code != 0:
            raise RuntimeError("true is false")


async def _open_async(address: str, handle: str) -> tuple[AsyncGardenClient, AsyncContainer]:
    client = AsyncGardenClient(address)
    return client, client.container(handle)


async def _run_true_async(container: AsyncContainer) -> float:
    begin = perf_counter()
    async with await container.run(["true"]) as process:
        if (await process.wait()).code != 0:
            raise RuntimeError("true is false")
        return (perf_counter() - begin) * 1e3
