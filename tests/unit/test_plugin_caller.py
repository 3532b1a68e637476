"""What the server does around a program of somebody else's: no secret is told, no call finds a launcher half there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from garden_py.backend.plugin import caller as module
from garden_py.backend.plugin.caller import AT_ONCE, Lane, PluginCaller
from garden_py.backend.plugin.network import NetworkPlugin
from garden_py.model.errors import HostFault

SECRET = "root"


class FakeLauncher:
    """Answers as it was told; its start ends when it may."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = {"status": 0, "stdout": "", "stderr": "", "gave_up": "", **answer}
        self.pid: int | None = None
        self.may_start, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        self.fds: list[int] = []
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1
        self.pid = 1
        await self.may_start.wait()

    async def run(self, op: str, params: object, fds: list[int], **_: object) -> dict[str, Any]:
        assert self.may_start.is_set(), "it is not there yet"
        self.fds = fds
        await self.may_answer.wait()
        if "error" in self.answer:
            raise self.answer["error"]
        return self.answer

    async def close(self) -> None:
        assert self.may_start.is_set(), "somebody is starting it"


def caller_with(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> tuple[PluginCaller, FakeLauncher]:
    caller, launcher = PluginCaller(Path("/run/none")), FakeLauncher(answer)
    monkeypatch.setattr(caller, "_launcher", launcher)
    return caller, launcher


async def test_a_secret_is_not_told_and_an_answer_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password may be part of a path as well."""
    for status, stdout in ((0, "/store/rootfs"), (1, "/store/***fs")):
        caller, launcher = caller_with(
            monkeypatch, status=status, stdout="/store/rootfs", stderr="--password root"
        )
        launcher.may_start.set()
        with capture_logs() as logs:
            ended = await caller.run(["/p"], call="create", step="s", timeout_s=1, secrets=(SECRET,))
        assert (ended.stdout, ended.stderr) == (stdout, "--password ***")
        assert SECRET not in str(logs)


async def test_a_secret_is_not_told_of_one_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    caller, launcher = caller_with(monkeypatch, gave_up="it did not end", stderr="--password root")
    launcher.may_start.set()
    with pytest.raises(HostFault, match=r"it did not end: --password \*\*\*"):
        await caller.run(["/p"], call="create", step="s", timeout_s=1, secrets=(SECRET,))


async def test_a_start_of_the_launcher_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first caller leaves while it starts: neither the next one nor the server's end finds it half there."""
    caller, launcher = caller_with(monkeypatch)
    first = asyncio.ensure_future(caller.run(["/p"], call="create", step="s", timeout_s=1))
    await asyncio.sleep(0)
    first.cancel()
    second = asyncio.ensure_future(caller.run(["/p"], call="create", step="s", timeout_s=1))
    closing = asyncio.ensure_future(caller.close())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(task.done() for task in (first, second, closing))
    launcher.may_start.set()
    assert (await second).status == 0
    await closing
    with pytest.raises(asyncio.CancelledError):
        await first
    assert launcher.starts == 1


async def test_containers_can_go_while_none_can_be_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of `up` that hang until the creates give up keep no destroy waiting."""
    caller, launcher = caller_with(monkeypatch)
    launcher.may_start.set()
    plugin = NetworkPlugin(("/p",), caller)
    launcher.may_answer.clear()
    hanging = [
        asyncio.ensure_future(plugin.up("box", 1, {}, (), (), timeout_s=600))
        for _ in range(AT_ONCE[Lane.CHANGE] + 1)
    ]
    for _ in range(20):
        await asyncio.sleep(0)
    launcher.fds = []
    going = asyncio.ensure_future(plugin.down("other", timeout_s=1))
    for _ in range(20):
        await asyncio.sleep(0)
    assert launcher.fds, "it was not run"
    launcher.may_answer.set()
    await asyncio.gather(going, *hanging)


async def test_one_that_sigkill_does_not_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker does not answer in time; that is no deadline of a create."""
    caller, launcher = caller_with(monkeypatch, error=TimeoutError())
    launcher.may_start.set()
    with pytest.raises(HostFault, match="s: /p was killed, and has not ended"):
        await caller.run(["/p"], call="down", step="s", timeout_s=1)


async def test_who_leaves_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the job may still have to send stays open until it is done."""
    monkeypatch.setattr(module, "_GRACE_S", 0.01)
    caller, launcher = caller_with(monkeypatch)
    launcher.may_start.set()
    launcher.may_answer.clear()
    calling = asyncio.ensure_future(caller.run(["/p"], call="create", step="s", timeout_s=600))
    for _ in range(5):
        await asyncio.sleep(0)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    stdin, caller_end = launcher.fds
    assert os.read(caller_end, 1) == b""
    assert os.read(stdin, 1) == b""
    launcher.may_answer.set()
    for _ in range(5):
        await asyncio.sleep(0)
    for fd in launcher.fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
