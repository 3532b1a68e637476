"""Bandwidth: what passes in a time is what was asked for, at create and live, in both directions."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from kit.garden import code_of, sh, wait_until
from kit.garden_http import GardenHttp
from kit.server import ServerProcess, running_server

from garden_py.client import (
    Container,
    ContainerSpec,
    GardenClient,
    InvalidArgument,
    Limits,
    NetworkMode,
    ProcessSpec,
)

pytestmark = pytest.mark.root

MIB = 1 << 20
RATE = 4 * MIB
WINDOW_S = 1.0


@pytest.fixture(scope="module")
def peer(garden: GardenClient) -> Container:
    """A container that sends without end on port 7000, and takes whatever comes on 7001."""
    container = garden.create()
    container.start(["nc", "-ll", "-p", "7000", "-e", "cat", "/dev/zero"])
    container.start(["nc", "-ll", "-p", "7001", "-e", "sh", "-c", "exec cat >/dev/null"])
    for port in ("1B58", "1B59"):
        listening = f"grep -q ':{port} .* 0A ' /proc/net/tcp /proc/net/tcp6"
        wait_until(lambda listening=listening: code_of(container, listening) == 0, "the listener")
    return container


def measure(box: Container, peer: Container, *, sends: bool) -> float:
    """Bytes per second that pass the container's link in the long run, by the kernel's own counters."""
    address = peer.info().container_ip
    script = f"exec nc {address} 7001 </dev/zero" if sends else f"exec nc {address} 7000 >/dev/null"
    process = box.run(sh(script))
    counted = "network_tx_bytes" if sends else "network_rx_bytes"
    begun = getattr(box.metrics(), counted)
    wait_until(lambda: getattr(box.metrics(), counted) - begun > RATE // 8, "the transfer")
    before, started = getattr(box.metrics(), counted), time.monotonic()
    wait_until(lambda: time.monotonic() - started > WINDOW_S, "the window")
    passed, took_s = getattr(box.metrics(), counted) - before, time.monotonic() - started
    process.signal("KILL")
    process.wait()
    return float(passed / took_s)


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("sends", [False, True])
def test_rate_is_what_was_asked_for_and_changes_live(
    garden: GardenClient, peer: Container, privileged: bool, sends: bool
) -> None:
    """Never above the limit by more than 15 %; a busy machine may be slower, benchmarks/ has the lower bound."""
    name = "network_tx_bytes_per_s" if sends else "network_rx_bytes_per_s"
    with garden.create(ContainerSpec(limits=Limits(**{name: RATE}), privileged=privileged)) as box:
        assert getattr(box.limits(), name) == RATE
        assert 0.4 * RATE < measure(box, peer, sends=sends) < 1.15 * RATE
        in_force = box.update_limits(Limits(**{name: RATE // 4}))
        assert getattr(in_force, name) == RATE // 4
        assert measure(box, peer, sends=sends) < 1.15 * RATE / 4
        lifted = box.update_limits(Limits(**{name: 0}))
        assert getattr(lifted, name) == getattr(box.limits(), name) == 0
        assert measure(box, peer, sends=sends) > 2 * RATE / 4


def test_limits_on_bandwidth_survive_a_restart_and_other_changes(no_trace: None) -> None:
    """They are the kernel's, and what is not stated stays."""
    with running_server() as server, GardenClient(server.address) as garden:
        wanted = Limits(
            network_rx_bytes_per_s=RATE, network_tx_bytes_per_s=RATE // 2, network_burst_bytes=65536
        )
        box = garden.create(ContainerSpec(limits=wanted))

        def rates() -> tuple[int | None, ...]:
            found = box.limits()
            return found.network_rx_bytes_per_s, found.network_tx_bytes_per_s, found.network_burst_bytes

        assert rates() == (RATE, RATE // 2, 65536)
        server.kill()
        server.start()
        box.update_limits(Limits(pids=100))
        assert rates() == (RATE, RATE // 2, 65536)
        box.update_limits(Limits(network_rx_bytes_per_s=RATE * 1024))  # above what 32 bits hold
        assert rates() == (RATE * 1024, RATE // 2, 65536)


def test_container_cannot_lift_its_limit(garden: GardenClient) -> None:
    """Its link is in its namespace, and it has no right to change it."""
    with garden.create(ContainerSpec(limits=Limits(network_tx_bytes_per_s=RATE))) as box:
        assert (
            code_of(box, "tc qdisc del dev eth0 root 2>/dev/null || ip link set eth0 down 2>/dev/null") != 0
        )
        assert box.limits().network_tx_bytes_per_s == RATE


def test_the_largest_and_the_smallest_bandwidth_are_taken(garden: GardenClient) -> None:
    """With the server's burst and with a stated one, at create and live."""
    most, least = 1 << 40, 1 << 10
    with garden.create(
        ContainerSpec(limits=Limits(network_rx_bytes_per_s=most, network_tx_bytes_per_s=most))
    ) as box:
        for rate, burst in ((least, 0), (least, 1 << 30), (most, 0), (most, 1 << 30), (most, 4096)):
            asked = Limits(
                network_rx_bytes_per_s=rate, network_tx_bytes_per_s=rate, network_burst_bytes=burst
            )
            found = box.update_limits(asked)
            assert (found.network_rx_bytes_per_s, found.network_tx_bytes_per_s) == (rate, rate)
            assert found == box.limits()


def test_bad_bandwidth_is_refused(garden_server: ServerProcess, garden: GardenClient) -> None:
    """Out of range, of a process, of a container without a link; nothing has changed."""
    with pytest.raises(InvalidArgument) as refused:
        garden.create(ContainerSpec(limits=Limits(network_rx_bytes_per_s=10)))
    assert [each.field for each in refused.value.fields] == ["spec.limits.network_rx_bytes_per_s"]
    with garden.create() as box:
        with pytest.raises(InvalidArgument, match="bandwidth of its container"):
            box.start(ProcessSpec(path="true", limits=Limits(network_tx_bytes_per_s=RATE)))
        with pytest.raises(InvalidArgument):
            box.update_limits(Limits(pids=5, network_burst_bytes=1))
        assert box.limits().pids == 0
    for mode in (NetworkMode.NONE, NetworkMode.HOST):
        spec = ContainerSpec(network_mode=mode, privileged=mode is NetworkMode.HOST)
        with garden.create(spec) as box:
            with pytest.raises(InvalidArgument, match="has no link of its own") as unlinked:
                box.update_limits(Limits(pids=7, network_tx_bytes_per_s=RATE))
            assert [each.field for each in unlinked.value.fields] == ["limits.network_tx_bytes_per_s"]
            assert box.limits().pids == 0
    assert "change_not_undone" not in garden_server.log(), "nothing had been changed"


def test_command_line_limits_bandwidth(garden_server: ServerProcess, garden: GardenClient) -> None:
    """As a user types it."""
    with garden.create() as box:
        argv = [sys.executable, "-m", "garden_py", "--address", garden_server.address, "limits", box.handle]
        done = subprocess.run(
            [*argv, "--bandwidth-in", "8M", "--bandwidth-out", "1M"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert "bandwidth in 8.0M/s, bandwidth out 1.0M/s" in done.stdout
        assert box.limits().network_tx_bytes_per_s == MIB


def test_OL2_bandwidth_of_a_garden_create(garden_http: GardenHttp) -> None:
    """One rate for both directions; read back, and nothing where none was set."""
    with (
        garden_http.container(limits={"bandwidth_limits": {"rate": RATE, "burst": 65536}}) as limited,
        garden_http.container() as free,
    ):
        read = [garden_http.json("GET", f"/containers/{box}/limits/bandwidth") for box in (limited, free)]
        assert read == [{"rate": RATE, "burst": 65536}, {}]
