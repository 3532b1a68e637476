"""Parts of the launcher that are killed while they work."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kit.garden import wait_until

from garden_py.backend.launcher.client import Launcher
from garden_py.model.errors import HostFault

pytestmark = pytest.mark.root
NOTHING_TO_DO = ("container.release_mounts", {"directory": "/nonexistent"})


@pytest.fixture
async def launcher(tmp_path: Path) -> AsyncIterator[Launcher]:
    """With one worker that is warm."""
    made = Launcher(tmp_path / "mnt", workers=2)
    await made.start()
    yield made
    await made.close()


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def mounts_of(pid: int) -> str:
    return Path(f"/proc/{pid}/mounts").read_text()


def main_of(launcher: Launcher) -> int:
    assert launcher._process is not None
    return launcher._process.pid


async def until_starting(launcher: Launcher, old: int) -> None:
    """Wait until another launcher process than `old` is being started."""
    async with asyncio.timeout(10):
        while launcher._process is None or launcher._process.pid == old:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_launcher_killed_while_a_worker_is_busy_is_replaced_when_that_is_done(
    launcher: Launcher,
) -> None:
    """The new one waits for the old one's workers, so none of those may go back to the idle ones and live on."""
    assert (
        await launcher.run(*NOTHING_TO_DO) == {}
    )  # or the worker is stopped before it lets go of its parent's socket
    old = main_of(launcher)
    (worker,) = children(old)
    os.kill(worker, signal.SIGSTOP)
    busy = asyncio.ensure_future(launcher.run(*NOTHING_TO_DO))
    await asyncio.sleep(0)
    os.kill(old, signal.SIGKILL)
    following = asyncio.ensure_future(launcher.run(*NOTHING_TO_DO))
    try:
        await until_starting(launcher, old)
    finally:
        os.kill(worker, signal.SIGCONT)  # it ends by itself then
    async with asyncio.timeout(15):
        assert await busy == {}
        assert await following == {}
        assert await launcher.run(*NOTHING_TO_DO) == {}


async def test_runtime_ends_with_its_worker(launcher: Launcher, tmp_path: Path) -> None:
    """It would go on making what the server, told of its worker's end, is taking away."""
    runtime = tmp_path / "runc"
    runtime.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 60\n"
    )
    runtime.chmod(0o755)
    (tmp_path / "image").mkdir()
    plan = {
        "directory": str(tmp_path / "mnt" / "c"),
        "layers": [str(tmp_path / "image")],
        **{name: str(tmp_path / name) for name in ("upper", "work")},
        "id_map": None,
        "ready": "",
        "ready_map": None,
        "binds": [],
    }
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    params = {
        "plan": plan,
        "id": "c",
        "bundle": str(tmp_path),
        "runtime": str(runtime),
        "root": str(tmp_path),
    }
    (worker,) = children(main_of(launcher))
    with socket.socket(socket.AF_UNIX) as listener:
        launching = asyncio.ensure_future(
            launcher.run(
                "container.launch",
                {
                    **params,
                    "log": str(tmp_path / "log"),
                    "agent_log": str(tmp_path / "agent.log"),
                    "fail_points": {},
                },
                [listener.fileno()],
            )
        )
        async with asyncio.timeout(10):
            while not (tmp_path / "pid").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        runtime_pid = int((tmp_path / "pid").read_text())
        pidfd = os.pidfd_open(runtime_pid)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(HostFault, match="worker died"):
            await launching
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(5):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
    await launcher.run("container.release_mounts", {"directory": plan["directory"]})
    assert str(plan["directory"]) not in mounts_of(main_of(launcher))


def test_helper_that_holds_a_namespace_ends_with_whoever_forked_it() -> None:
    """It has the launcher's lock open: left behind, it would keep every later server from starting."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from garden_py.backend.host import idmap, userns\n"
        "def hang(self, text):\n"
        "    print(self.parts[2], flush=True)\n"
        "    time.sleep(60)\n"
        "Path.write_text = hang\n"
        "userns.make_userns(idmap.range_of(0x70000000, 65536))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        assert Path(f"/proc/{helper}").exists()
        parent.kill()
    wait_until(lambda: not Path(f"/proc/{helper}/exe").exists(), "the helper's end")


def test_launcher_outlives_predecessors_that_do_not_end(tmp_path: Path) -> None:
    """They are killed after a while; until then they may finish what they do."""
    lock = tmp_path / "mnt.lock"
    holder = subprocess.Popen(["flock", lock, "sleep", "1000"])
    try:
        wait_until(lambda: not _is_free(lock), "the lock")
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from garden_py.backend.launcher.main import outlive_predecessor\n"
            "outlive_predecessor(Path(sys.argv[1]), patience_s=0.3, killed_s=10)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, lock], check=True, capture_output=True, text=True, timeout=30
        )
        assert f"{holder.pid}" in done.stderr
        assert "not waiting" not in done.stderr
    finally:
        holder.kill()
        holder.wait()
    assert _is_free(lock)


def _is_free(lock: Path) -> bool:
    return subprocess.run(["flock", "--nonblock", lock, "true"], check=False, timeout=10).returncode == 0
