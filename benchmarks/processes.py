"""Run `true` and see its exit, from each kind of client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from measure import Subject, alternate, in_a_row, in_a_streak
from report import Row, at_most, ratio_at_most
from setting import Setting

from garden_py.client import AsyncContainer, AsyncGardenClient, Container

_PEER = "runc exec"
_MARKS = (at_most(4), ratio_at_most(0.2))
# Longer than an RCU grace period, after which the kernel takes a slower way again when a task changes its cgroup.
_PAUSE_S = 0.1


def measure_run(setting: Setting) -> Iterator[Row]:
    """In one container of the server and one of bare runc, both with the agent as PID 1."""
    runc = setting.runc
    name = runc.new_id()
    with setting.cell.container() as handle, asyncio.Runner() as loop:
        asynchronous = loop.run(_open_async(setting.cell.address, handle))
        runc.run_ms(name)
        try:
            subjects = _subjects(setting, handle, name, lambda: loop.run(_run_true_async(asynchronous[1])))
            found = alternate(
                {subject: in_a_row(act) for subject, act in subjects.items()}, rounds=setting.rounds
            )
            paused = alternate(
                {subject: _after_a_pause(subjects[subject]) for subject in ("raw stub", _PEER)},
                rounds=setting.rounds,
            )
            streak = alternate(
                {subject: in_a_streak(subjects[subject]) for subject in ("raw stub", _PEER)},
                rounds=setting.rounds,
            )
        finally:
            runc.delete_ms(name)
            loop.run(asynchronous[0].close())
    for subject in subjects:
        if subject != _PEER:
            yield Row(f"run `true` → exit, {subject}", "ms", found[subject], _PEER, found[_PEER], _MARKS)
    yield Row("run `true` → exit, 20 in a row", "ms", streak["raw stub"], _PEER, streak[_PEER], _MARKS)
    yield Row("run `true` → exit after 100 ms rest", "ms", paused["raw stub"], _PEER, paused[_PEER], _MARKS)


def _subjects(setting: Setting, handle: str, runc_name: str, run_async: Subject) -> dict[str, Subject]:
    cell = setting.cell
    container = cell.client.container(handle)
    return {
        "raw stub": lambda: cell.run_ms(handle, "true"),
        _PEER: lambda: setting.runc.exec_ms(runc_name, "/bin/true"),
        "client library": lambda: _run_true(container),
        "async client library": run_async,
    }


def _after_a_pause(act: Subject) -> Subject:
    def rested() -> float:
        time.sleep(_PAUSE_S)
        return act()

    return rested


def _run_true(container: Container) -> float:
    begin = time.perf_counter()
    with container.run(["true"]) as process:
        if process.wait().code != 0:
            raise RuntimeError("true is false")
        return (time.perf_counter() - begin) * 1e3


async def _open_async(address: str, handle: str) -> tuple[AsyncGardenClient, AsyncContainer]:
    client = AsyncGardenClient(address)
    return client, client.container(handle)


async def _run_true_async(container: AsyncContainer) -> float:
    begin = time.perf_counter()
    async with await container.run(["true"]) as process:
        if (await process.wait()).code != 0:
            raise RuntimeError("true is false")
        return (time.perf_counter() - begin) * 1e3
