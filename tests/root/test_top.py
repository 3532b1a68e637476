"""`garden top` in a real terminal, on real containers, driven as a person would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from kit.garden import wait_until
from kit.server import ServerProcess, running_server
from kit.terminal import Terminal
from kit.trace import assert_no_trace, snapshot

from garden_py.client import ContainerSpec, ContainerState, GardenClient, Limits

pytestmark = pytest.mark.root


@pytest.fixture
def server(no_trace: None) -> Iterator[ServerProcess]:
    before = snapshot()
    with running_server() as server:
        yield server
    assert_no_trace(before)


def environ(server: ServerProcess) -> dict[str, str]:
    return {**os.environ, "GARDEN_ADDRESS": server.address, "TERM": "xterm-256color"}


def plain(text: str) -> str:
    """Without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def busy(garden: GardenClient, handle: str) -> None:
    container = garden.create(ContainerSpec(handle=handle, limits=Limits(memory_bytes=128 << 20)))
    container.start(["sh", "-c", "while :; do :; done"], id="spinner", limits=Limits(pids=10))


def test_a_session_from_the_table_into_a_container_to_its_destruction(server: ServerProcess) -> None:
    """Sorted, filtered, looked into, stopped and destroyed, each only after a yes; the size changes meanwhile."""
    with GardenClient(server.address) as garden:
        busy(garden, "spins")
        idle = garden.create(ContainerSpec(handle="idles"))
        idle.start(["sleep", "1000"], id="sleeper")
        screen = Terminal(environ(server), "top", "--interval", "200ms", rows=24, columns=120)
        shown = plain(screen.wait_for(r"spins +[1-9][0-9.]+ [^\r]*[▁-█] +[0-9.]+[KM]/128\.0M"))
        assert "\x1b[?1049h" not in shown
        assert "2 containers" in shown
        screen.wait_for(r"\r\n *idles")  # the busy one is above
        screen.type("h")
        screen.wait_for(r"idles[^\n]*\r\n[^\n]*spins")
        screen.type("/spi")
        screen.wait_for("filter: spi█")
        screen.type("\r")
        assert "idles" not in plain(screen.wait_for(r"1 of 2 containers[^\n]*\r\n[^\n]*\r\n[^\n]*spins"))
        screen.type("\r")
        screen.wait_for(r"spinner +[0-9]+ running +[1-9][0-9.]+ [^\n]*while :; do :; done")
        screen.resize(12, 60)
        os.kill(screen.process.pid, signal.SIGWINCH)
        screen.wait_for(r"spinner +[0-9]+ running")
        screen.type("\x1b")
        screen.wait_for("1 of 2 containers")
        screen.type("s")
        screen.wait_for(r"Stop spins\? y: yes")
        screen.type("n")
        screen.wait_for("1 of 2 containers")
        screen.type("s")
        screen.wait_for(r"Stop spins\?")
        assert garden.container("spins").info().state is ContainerState.ACTIVE
        screen.type("y")
        screen.wait_for("spins stopped")
        assert garden.container("spins").info().state is ContainerState.STOPPED
        screen.type("x")
        screen.wait_for(r"Destroy spins\?")
        screen.type("y")
        screen.wait_for("spins destroyed")
        wait_until(lambda: [each.handle for each in garden.list()] == ["idles"], "the destroy")
        screen.type("\x1b")
        screen.wait_for(r"1 container [^\n]*\r\n[^\n]*\r\n[^\n]*idles")
        screen.type("q")
        assert "\x1b[?1049l" in screen.wait_for(re.escape("\x1b[?1049l"))
        assert screen.end() == 0
        idle.destroy()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 10), (5, 20), (60, 250)])
def test_any_size_and_a_server_that_goes(server: ServerProcess, rows: int, columns: int) -> None:
    """It goes on showing, and says when there is no answer; a Ctrl-C ends it in any case."""
    with GardenClient(server.address) as garden, garden.create(ContainerSpec(handle="c")):
        screen = Terminal(environ(server), "top", "--interval", "100ms", rows=rows, columns=columns)
        screen.wait_for("c" if columns < 10 or rows < 3 else r"(?m)c +[0-9.]")
        screen.type("\x03")
        assert screen.end() == 0


def test_a_server_that_is_gone_is_told_and_keys_go_on(server: ServerProcess) -> None:
    screen = Terminal(environ(server), "top", "--interval", "100ms", columns=120)
    screen.wait_for("0 containers")
    server.kill()
    try:
        screen.wait_for("(?i)cannot|unavailable|connect|no server|refused")
        screen.type("/x")
        screen.wait_for("filter: x█")
        screen.type("\x03")
        assert screen.end() == 0
    finally:
        server.start()


def test_once_prints_one_plain_table(server: ServerProcess) -> None:
    with GardenClient(server.address) as garden:
        busy(garden, "spins")
        for flags in (["--once"], []):
            done = subprocess.run(
                [sys.executable, "-m", "garden_py", "top", *flags, "--interval", "500ms"],
                env=environ(server), capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            heading, row = done.stdout.splitlines()
            assert heading.split() == ["HANDLE", "CPU%", "MEMORY", "RX", "TX", "DISK", "PIDS", "AGE"]
            assert row.startswith("spins")
            assert float(row.split()[1]) > 1
            assert "\x1b" not in done.stdout
        garden.container("spins").destroy()


def test_a_broken_container_is_in_the_table_with_the_reason(server: ServerProcess) -> None:
    """One that nobody shows is one that nobody destroys."""
    with GardenClient(server.address) as garden:
        garden.create(ContainerSpec(handle="whole"))
        broken = garden.create(ContainerSpec(handle="torn"))
        os.kill(broken.info().pid, signal.SIGKILL)
        wait_until(lambda: broken.info().state is ContainerState.BROKEN, "the broken container")
        argv = [sys.executable, "-m", "garden_py", "top", "--once", "--interval", "100ms"]
        done = subprocess.run(
            argv, env=environ(server), capture_output=True, text=True, timeout=60, check=True
        )
        assert re.search(r"^whole +", done.stdout, re.M)
        assert re.search(r"^torn +", done.stdout, re.M)
        assert "torn: container torn is broken" in done.stderr
