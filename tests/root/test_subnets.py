"""Chosen subnets and addresses, containers that may or may not reach each other, no network, and the host's."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from kit.garden import code_of, text_of, wait_until
from kit.garden_http import GardenHttp, GardenHttpError
from kit.server import running_server

from garden_py.client import (
    Container,
    ContainerSpec,
    Destination,
    EgressAction,
    EgressCause,
    EgressPolicy,
    EgressProtocol,
    FailedPrecondition,
    GardenClient,
    InvalidArgument,
    NetworkMode,
    PortMapping,
)

pytestmark = pytest.mark.root

PORT = 7000
_numbers = itertools.count()


@pytest.fixture
def subnet() -> str:
    """A /24 that no other test, of this run or another one, uses."""
    return f"172.{16 + os.getpid() % 16}.{next(_numbers) + 100}"


def serve(container: Container, word: str) -> str:
    container.start(["nc", "-ll", "-p", str(PORT), "-e", "echo", word])
    listening = f"grep -q ':{PORT:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6"
    wait_until(lambda: code_of(container, listening) == 0, "the listener")
    return container.info().container_ip


def ask(container: Container, address: str) -> str:
    return text_of(container, f"nc -w 10 {address} {PORT} </dev/null || true").strip()


def routes() -> str:
    return subprocess.run(["ip", "route"], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.mark.parametrize("privileged", [False, True])
def test_containers_share_a_subnet_and_have_the_addresses_they_asked_for(
    garden: GardenClient, subnet: str, privileged: bool
) -> None:
    """N2, N3: the lowest free address, or the very one; both reach each other and others; all goes with the last."""
    with (
        garden.create(ContainerSpec(subnet=f"{subnet}.0/24", privileged=privileged)) as first,
        garden.create(ContainerSpec(subnet=f"{subnet}.77/24")) as second,
        garden.create() as third,
    ):
        assert first.info().container_ip == f"{subnet}.2"
        assert serve(second, "second") == f"{subnet}.77"
        assert ask(first, f"{subnet}.77") == "second"
        assert ask(third, f"{subnet}.77") == "second"
        assert f"unreachable {subnet}.0/24" in routes()
        assert code_of(first, f"ping -c 1 -W 1 {subnet}.200") != 0
        mapped = second.map_port(PORT)
        with socket.create_connection(("127.0.0.1", mapped.host_port), timeout=5) as peer:
            assert peer.makefile().readline() == "second\n"
        second.set_egress(EgressPolicy(EgressAction.DENY))
        first.set_egress(EgressPolicy(EgressAction.DENY))
        assert ask(first, f"{subnet}.77") == ""
        first.set_egress(EgressPolicy(EgressAction.ALLOW))
        assert first.metrics().network_tx_packets > 0
        first.destroy()
        assert ask(third, f"{subnet}.77") == "second"
    assert subnet not in routes()


def test_subnets_survive_a_restart(no_trace: None, subnet: str) -> None:
    """SR2: the address stays its container's, what another one asks for stays refused; destroyed, it is free."""
    with running_server() as server, GardenClient(server.address) as garden:
        box = garden.create(ContainerSpec(subnet=f"{subnet}.7/24"))
        other = garden.create()
        serve(box, "box")
        server.kill()
        server.start()
        assert ask(other, f"{subnet}.7") == "box"
        with pytest.raises(InvalidArgument, match="the requested IP is already allocated"):
            garden.create(ContainerSpec(subnet=f"{subnet}.7/24"))
        assert garden.check_leaks() == []
        box.destroy()
        with garden.create(ContainerSpec(subnet=f"{subnet}.7/24")) as again:
            assert again.info().container_ip == f"{subnet}.7"


@pytest.mark.parametrize(("access", "within", "across"), [("subnet", True, False), ("none", False, False)])
def test_server_decides_which_containers_reach_each_other(
    no_trace: None, subnet: str, access: str, within: bool, across: bool
) -> None:
    """`--container-access`; the explanation says the same."""
    with running_server("--container-access", access) as server, GardenClient(server.address) as garden:
        near = garden.create(ContainerSpec(subnet=f"{subnet}.0/25"))
        far = garden.create(ContainerSpec(subnet=f"{subnet}.128/25"))
        pooled = garden.create()
        server_box = garden.create(ContainerSpec(subnet=f"{subnet}.0/25"))
        address = serve(server_box, "hello")
        for box, reaches in ((near, within), (far, across), (pooled, across)):
            assert (ask(box, address) == "hello") is reaches
            found = box.explain_egress(Destination(EgressProtocol.TCP, address, PORT))
            assert found.action is (EgressAction.ALLOW if reaches else EgressAction.DENY)
            assert found.cause is (EgressCause.DEFAULT if reaches else EgressCause.CONTAINERS)


def test_impossible_subnets_are_refused_and_nothing_stays(garden: GardenClient, subnet: str) -> None:
    """N4, and what would take addresses away from the host."""
    gateway = garden.create().info().host_ip
    with garden.create(ContainerSpec(subnet=f"{subnet}.7/24")):
        for asked, problem in (
            (f"{subnet}.7/24", "the requested IP is already allocated"),
            (f"{subnet}.1/24", "a container IP must not equal the gateway IP"),
            (f"{subnet}.255/24", "a container IP must not equal the broadcast IP"),
            (f"{subnet}.0/25", "overlaps an existing subnet"),
            (f"{gateway}/24", "a container IP must not equal the gateway IP"),
            (f"{gateway.rpartition('.')[0]}.9/24", "overlaps the dynamic allocation range"),
            ("127.0.0.0/8", "on this host"),
            ("nonsense", "invalid CIDR address: nonsense"),
        ):
            with pytest.raises(InvalidArgument, match=problem) as refused:
                garden.create(ContainerSpec(subnet=asked))
            assert [each.field for each in refused.value.fields] == ["spec.subnet"]
    with garden.create(ContainerSpec(subnet=f"{subnet}.0/25")):
        pass


# --- modes


def test_no_network_is_loopback_only(garden: GardenClient) -> None:
    """Nothing leaves it, nothing reaches it; what is about links is refused with the reason."""
    with garden.create(ContainerSpec(network_mode=NetworkMode.NONE)) as box:
        info = box.info()
        assert (info.container_ip, info.host_ip, info.spec.network_mode) == ("", "", NetworkMode.NONE)
        assert text_of(box, "ls /sys/class/net") == "lo\n"
        assert code_of(box, "ping -c 1 -W 20 127.0.0.1") == 0
        assert text_of(box, "cat /etc/hosts") == f"127.0.0.1 localhost\n127.0.0.1 {info.spec.hostname}\n"
        for act in (box.map_port, box.egress, lambda: box.set_egress(EgressPolicy())):
            with pytest.raises(FailedPrecondition) as refused:
                act()
            assert refused.value.code == "NO_LINK"
        assert box.metrics().network_tx_bytes == 0
        assert garden.check_leaks() == []


def test_host_network_is_the_hosts(garden: GardenClient) -> None:
    """For privileged containers: the host's links, its loopback services, its names."""
    with (
        garden.create(ContainerSpec(network_mode=NetworkMode.HOST, privileged=True)) as box,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        assert set(text_of(box, "ls /sys/class/net").split()) == set(os.listdir("/sys/class/net"))
        box.start(["nc", "127.0.0.1", str(listener.getsockname()[1])])
        listener.settimeout(5)
        listener.accept()[0].close()
        own_name = f"127.0.0.1 {box.info().spec.hostname}\n"
        assert text_of(box, "cat /etc/hosts") == Path("/etc/hosts").read_text() + own_name
        assert box.info().container_ip == ""


@pytest.mark.parametrize(
    "spec",
    [
        ContainerSpec(network_mode=NetworkMode.HOST),
        ContainerSpec(network_mode=NetworkMode.HOST, privileged=True, port_mappings=(PortMapping(),)),
        ContainerSpec(network_mode=NetworkMode.NONE, egress=EgressPolicy()),
        ContainerSpec(network_mode=NetworkMode.NONE, subnet="172.31.99.0/24"),
    ],
)
def test_modes_that_contradict_the_rest_are_refused(garden: GardenClient, spec: ContainerSpec) -> None:
    with pytest.raises(InvalidArgument) as refused:
        garden.create(spec)
    assert [each.field for each in refused.value.fields] == ["spec.network_mode"]


def test_modes_survive_a_restart(no_trace: None) -> None:
    """They have nothing that has to be put back, and are no leak."""
    with running_server() as server, GardenClient(server.address) as garden:
        boxes = [
            garden.create(ContainerSpec(network_mode=NetworkMode.NONE)),
            garden.create(ContainerSpec(network_mode=NetworkMode.HOST, privileged=True)),
        ]
        server.kill()
        server.start()
        assert garden.check_leaks() == []
        for box in boxes:
            assert text_of(box, "echo alive") == "alive\n"


# --- the Garden door


def test_N2_N3_N4_network_of_a_garden_create(garden_http: GardenHttp, subnet: str) -> None:
    """`network` in the body, the words of its errors."""
    with (
        garden_http.container(network=f"{subnet}.0/24") as first,
        garden_http.container(network=f"{subnet}.9/24") as second,
    ):
        found = [garden_http.info(handle)["ContainerIP"] for handle in (first, second)]
        assert found == [f"{subnet}.2", f"{subnet}.9"]
        for network, problem in (
            (f"{subnet}.9/24", "the requested IP is already allocated"),
            (f"{subnet}.1/24", "a container IP must not equal the gateway IP"),
            (f"{subnet}.0/25", f"overlaps an existing subnet ({subnet}.0/24)"),
        ):
            with (
                pytest.raises(GardenHttpError, match=re.escape(problem)),
                garden_http.container(network=network),
            ):
                pass
