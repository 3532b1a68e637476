"""Containers with IPv6 addresses: reaching and being reached, rules, events, and a server that changes its pool."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from kit.garden import PATIENCE, code_of, events_of, text_of, wait_until
from kit.garden_http import GardenHttp
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import (
    Container,
    ContainerSpec,
    Destination,
    EgressAction,
    EgressCause,
    EgressPolicy,
    EgressProtocol,
    EgressRule,
    EventKind,
    GardenClient,
    IcmpMatch,
    PortMapping,
    PortRange,
)

pytestmark = pytest.mark.root

PORT = 7000
CLOSED = EgressPolicy(EgressAction.DENY)
OPEN = EgressPolicy(EgressAction.ALLOW)
TCP, UDP, ICMP, ALL = EgressProtocol.TCP, EgressProtocol.UDP, EgressProtocol.ICMP, EgressProtocol.ALL
both = pytest.mark.parametrize("privileged", [False, True])
_numbers = itertools.count()


def new_pool(*, private: bool = True) -> IPv6Network:
    """A prefix that no other test of this machine has: unique local, or one that is routed (RFC 3849)."""
    number = os.getpid() << 8 & 0xFFFF00 | next(_numbers)
    return IPv6Network(((0xFD676472 if private else 0x20010DB8) << 96 | number << 64, 64))


@pytest.fixture(scope="module")
def pool() -> IPv6Network:
    return new_pool()


@pytest.fixture(scope="module", name="garden_server")
def server_with_ipv6(pool: IPv6Network) -> Iterator[ServerProcess]:
    before = snapshot()
    with running_server("--network-pool-v6", str(pool)) as server:
        yield server
    assert_no_trace(before)


def serve(container: Container, port: int = PORT) -> str:
    """Have a container send back on every connection what comes; its IPv6 address."""
    container.start(["nc", "-ll", "-p", str(port), "-e", "cat"])
    wait_until(
        lambda: code_of(container, f"grep -q ':{port:04X} .* 0A ' /proc/net/tcp6") == 0, "the listener"
    )
    return container.info().container_ipv6


@pytest.fixture(scope="module")
def peer_ip(garden: GardenClient) -> str:
    return serve(garden.create(ContainerSpec(handle="peer")))


def connects(container: Container, address: str, port: int = PORT) -> bool:
    return text_of(container, f"echo hello | nc -w 10 {address} {port} || true").strip() == "hello"


def pings(container: Container, address: str) -> bool:
    return code_of(container, f"ping -6 -c 1 -W 5 {address}") == 0


def gateway_of(container: Container) -> str:
    """The host's address, as the container's routes have it."""
    return text_of(container, "ip -6 route show default").split()[2]


def rule(
    address: str,
    protocol: EgressProtocol = TCP,
    *ports: int,
    action: EgressAction = EgressAction.ALLOW,
    log: bool = False,
) -> EgressRule:
    return EgressRule(action, protocol, (address,), tuple(PortRange(port) for port in ports), log=log)


# --- addresses


@pytest.mark.cgroup2
@both
def test_container_has_the_address_that_goes_with_its_ipv4_one(
    garden: GardenClient, pool: IPv6Network, privileged: bool
) -> None:
    """In the last 32 bits; shown, in /etc/hosts (N30), and the only one besides ::1."""
    with garden.create(ContainerSpec(privileged=privileged, hostname="web")) as box:
        info = box.info()
        assert IPv6Address(info.container_ipv6) == pool[int(IPv4Address(info.container_ip))]
        assert text_of(box, "cat /etc/hosts").splitlines() == [
            "127.0.0.1 localhost", "::1 localhost", f"{info.container_ip} web", f"{info.container_ipv6} web",
        ]  # fmt: skip
        held = text_of(box, "cat /proc/net/if_inet6").split()[::6]
        assert sorted(IPv6Address(int(each, 16)) for each in held) == [
            IPv6Address("::1"),
            IPv6Address(info.container_ipv6),
        ]


def test_garden_door_and_command_line_show_it(no_trace: None, tmp_path: Path) -> None:
    """`ContainerIPv6`, the property of N-table, and `garden info`; a server without a pool shows nothing."""
    door = f"unix:{tmp_path}/garden.sock"
    with (
        running_server("--network-pool-v6", str(new_pool()), "--garden-http", door) as server,
        GardenClient(server.address) as garden,
    ):
        http = GardenHttp(door)
        handle = http.create()
        address = garden.container(handle).info().container_ipv6
        info = http.info(handle)
        assert info["ContainerIPv6"] == address != ""
        assert info["Properties"]["garden.network.container-ipv6"] == address
        argv = [sys.executable, "-m", "garden_py", "info", handle, "--address", server.address]
        shown = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
        assert f"container ipv6  {address}" in shown


# --- reaching and being reached


@pytest.mark.cgroup2
@both
def test_rules_decide_about_ipv6_as_about_ipv4(garden: GardenClient, peer_ip: str, privileged: bool) -> None:
    """Networks, ports, ICMPv6 types and what has no networks; counted, told, explained as it then happens."""
    with garden.create(ContainerSpec(egress=CLOSED, privileged=privileged)) as box:
        assert not connects(box, peer_ip)
        assert not pings(box, peer_ip)
        wide = str(IPv6Network((int(IPv6Address(peer_ip)) >> 16 << 16, 112)))
        box.set_egress(
            EgressPolicy(
                EgressAction.DENY,
                (
                    rule("10.0.0.0/8"),
                    rule(wide, TCP, PORT, log=True),
                    EgressRule(EgressAction.ALLOW, ICMP, (wide,), icmp=IcmpMatch(128, 0)),
                ),
            )
        )
        events = events_of(garden, box.handle)
        assert connects(box, peer_ip)
        told = next(dict(each.details) for each in events if each.kind is EventKind.CONNECTION_ALLOWED)
        assert (told["source"], told["destination"]) == (box.info().container_ipv6, peer_ip)
        assert (told["destination_port"], told["rule_number"]) == (str(PORT), "2")
        assert pings(box, peer_ip)
        assert not connects(box, peer_ip, PORT + 1)
        told = next(dict(each.details) for each in events if each.kind is EventKind.CONNECTION_DENIED)
        assert (told["destination"], told["destination_port"], told["decided_by"]) == (
            peer_ip, str(PORT + 1), "default",
        )  # fmt: skip
        counted = [each.packets for each in box.egress().rules]
        assert counted[0] == 0
        assert min(counted[1:]) > 0
        for asked, cause, action in (
            (Destination(TCP, peer_ip, PORT), EgressCause.RULE, EgressAction.ALLOW),
            (Destination(TCP, peer_ip, PORT + 1), EgressCause.DEFAULT, EgressAction.DENY),
            (Destination(ICMP, peer_ip, icmp=IcmpMatch(128, 0)), EgressCause.RULE, EgressAction.ALLOW),
        ):
            found = box.explain_egress(asked)
            assert (found.cause, found.action) == (cause, action), asked
        box.set_egress(EgressPolicy(EgressAction.ALLOW, (rule("0.0.0.0/0", ALL, action=EgressAction.DENY),)))
        assert connects(box, peer_ip)  # all of IPv4 is not all
        box.set_egress(EgressPolicy(EgressAction.ALLOW, (EgressRule(EgressAction.DENY, TCP),)))
        assert not connects(box, peer_ip)  # no networks are all of both


@both
def test_cut_ends_a_live_stream(garden: GardenClient, peer_ip: str, privileged: bool) -> None:
    """A change without cut leaves it, one with cut ends what is not allowed."""
    with garden.create(ContainerSpec(privileged=privileged)) as box:
        stream = box.run(["nc", peer_ip, str(PORT)])

        def talk(word: str) -> str:
            stream.stdin.write(f"{word}\n".encode())
            return bytes(next(iter(stream)).data).decode().strip()

        assert talk("before") == "before"
        box.set_egress(CLOSED)
        assert talk("kept") == "kept"
        box.set_egress(CLOSED, cut=True)
        stream.stdin.write(b"cut\n")
        assert stream.wait(PATIENCE) is not None


def test_host_is_closed_but_for_echo_requests_and_mapped_ports(garden: GardenClient) -> None:
    """As for IPv4; from the host a mapped port is reached by its addresses, but not by ::1."""
    with garden.create(ContainerSpec(port_mappings=(PortMapping(0, PORT),))) as box, garden.create() as other:
        serve(box)
        gateway, port = gateway_of(other), box.info().mapped_ports[0].host_port
        assert pings(other, gateway)
        with socket.create_server((gateway, 0), family=socket.AF_INET6) as listener:
            assert not connects(other, gateway, listener.getsockname()[1])
        assert connects(other, gateway, port)
        assert connects(box, gateway, port)
        with socket.create_connection((gateway, port), timeout=5) as peer:
            peer.sendall(b"hello\n")
            assert peer.makefile().readline() == "hello\n"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("::1", port), timeout=5)
        found = [other.explain_egress(Destination(TCP, gateway, each)).cause for each in (port, PORT)]
        assert found == [EgressCause.DEFAULT, EgressCause.HOST]
        nobody = str(IPv6Address(int(IPv6Address(gateway)) + 150))
        assert "unreachable" in text_of(
            other, f"nc -w 5 {nobody} 80 2>&1 || true"
        )  # and no packet leaves the host
        assert other.explain_egress(Destination(TCP, nobody, 80)).cause is EgressCause.UNREACHABLE


@contextmanager
def host_beside(route: IPv6Network | None) -> Iterator[tuple[str, str]]:
    """A network namespace with a link to this host: the name of the namespace, and its address."""
    number = next(_numbers)
    name = f"gt6-{os.getpid()}-{number}"
    near, far = f"2001:db8:fe:{number}::1", f"2001:db8:fe:{number}::2"
    commands = [
        f"ip netns add {name}",
        f"ip link add {name} type veth peer name eth0 netns {name}",
        f"ip address add {near}/64 dev {name} nodad",
        f"ip link set {name} up",
        f"ip -n {name} address add {far}/64 dev eth0 nodad",
        f"ip -n {name} link set eth0 up",
        f"ip -n {name} link set lo up",
    ]
    if route is not None:
        commands.append(f"ip -n {name} route add {route} via {near}")
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, timeout=20)
        yield name, far
    finally:
        for command in (f"ip link delete {name}", f"ip netns delete {name}"):
            subprocess.run(command.split(), check=False, timeout=20)


_TELL_PEER = """
import socket
listener = socket.create_server(("::", 80), family=socket.AF_INET6)
print("ready", flush=True)
while True:
    peer, address = listener.accept()
    peer.sendall((address[0] + "\\n").encode())
    peer.close()
"""


@contextmanager
def teller_in(name: str) -> Iterator[None]:
    """Something on port 80 of a namespace that tells who has connected."""
    argv = ["ip", "netns", "exec", name, sys.executable, "-c", _TELL_PEER]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as outside:
        try:
            assert outside.stdout is not None
            assert outside.stdout.readline() == "ready\n"
            yield
        finally:
            outside.kill()


def visit_from(name: str, address: str, port: int) -> subprocess.CompletedProcess[str]:
    """Say hi to a port, from a namespace, and print the answer."""
    code = f"import socket; s = socket.create_connection(('{address}', {port}), 3); "
    code += "s.sendall(b'hi\\n'); print(s.recv(9))"
    argv = ["ip", "netns", "exec", name, sys.executable, "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("private", [True, False])
def test_only_unique_local_addresses_are_masqueraded(no_trace: None, private: bool) -> None:
    """Somebody outside sees the host's address, or the container's if it is one that can be routed to."""
    pool = new_pool(private=private)
    with (
        host_beside(None if private else pool) as (name, far),
        teller_in(name),
        running_server("--network-pool-v6", str(pool)) as server,
        GardenClient(server.address) as garden,
    ):
        box = garden.create(ContainerSpec(port_mappings=(PortMapping(0, PORT),)))
        own, port = serve(box), box.info().mapped_ports[0].host_port
        near = far.removesuffix("2") + "1"
        assert text_of(box, f"nc -w 10 {far} 80 </dev/null").strip() == (near if private else own)
        assert "hi" in visit_from(name, near, port).stdout
        assert visit_from(name, own, PORT).returncode != 0  # what is not mapped is not open to others


# --- the server's settings


def test_server_settings_hold_for_ipv6(no_trace: None) -> None:
    """`--deny-network`, `--container-access subnet` and `--dns-server` with IPv6."""
    pool = new_pool()
    dns = str(pool[0x53])
    flags = ["--network-pool-v6", str(pool), "--container-access", "subnet", "--dns-server", dns]
    with (
        running_server(*flags, "--deny-network", "2001:db8::/32") as server,
        GardenClient(server.address) as garden,
    ):
        subnet = f"172.31.{os.getpid() % 250}"
        boxes = [garden.create(ContainerSpec(subnet=f"{subnet}.{offset}/25")) for offset in (0, 0, 128)]
        address = serve(boxes[0])
        assert IPv6Address(address) == pool[int(IPv4Address(f"{subnet}.2"))]
        assert connects(boxes[1], address)
        assert not connects(boxes[2], address)
        found = [box.explain_egress(Destination(TCP, address, PORT)).cause for box in boxes[1:]]
        assert found == [EgressCause.DEFAULT, EgressCause.CONTAINERS]
        denied = boxes[1].explain_egress(Destination(TCP, "2001:db8::1", 80))
        assert denied.cause is EgressCause.DENIED_NETWORK
        assert not connects(boxes[1], "2001:db8::1", 80)
        assert boxes[1].egress().denied_network_packets > 0
        assert text_of(boxes[1], "cat /etc/resolv.conf") == f"nameserver {dns}\n"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--network-pool-v6", "fd00::/97"], "/32 to /96"),
        (["--network-pool-v6", "2000::/3"], "/32 to /96"),
        (["--network-pool-v6", "fe80::/64"], "unicast"),
        (["--network-pool-v6", "fd00::1/64"], "not a valid IPv6 network"),
        (["--network-pool-v6", "fd67:6472:ffff::/64", "--mtu", "1279"], "1280"),
        (["--dns-server", "fd00::53"], "no IPv6"),
        (["--network-pool-v6", "fd67:6472:ffff::/64", "--dns-server", "fe80::1%eth0"], "one link"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, flags: list[str], problem: str) -> None:
    """Before anything is made."""
    argv = [sys.executable, "-m", "garden_py", "server", "--state-dir", str(tmp_path / "s")]
    argv += ["--run-dir", str(tmp_path / "r"), *flags]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert problem in done.stderr


def test_pool_that_the_host_uses_is_refused(no_trace: None, tmp_path: Path) -> None:
    """What another link's route leads to would become unreachable."""
    with host_beside(None) as (_, far):
        network = IPv6Network((int(IPv6Address(far)) >> 64 << 64, 64))
        argv = [sys.executable, "-m", "garden_py", "server", "--state-dir", str(tmp_path / "s")]
        argv += [
            "--run-dir",
            str(tmp_path / "r"),
            "--network-pool",
            "10.19.0.0/24",
            "--network-pool-v6",
            str(network),
        ]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert "network-pool-v6" in done.stderr
        assert "overlaps" in done.stderr


# --- restarts


@both
def test_a_changed_or_missing_pool_takes_ipv6_away_and_nothing_else(no_trace: None, privileged: bool) -> None:
    """A container goes on over restarts; without its pool IPv6 is refused at once, with it again it works again."""
    pool = new_pool()
    with (
        host_beside(None) as (name, far),
        teller_in(name),
        running_server("--network-pool-v6", str(pool)) as server,
        GardenClient(server.address) as garden,
    ):
        peer = garden.create(ContainerSpec(handle="peer"))
        serve(peer)
        ports = (PortMapping(0, PORT),)
        box = garden.create(ContainerSpec(handle="box", privileged=privileged, port_mappings=ports))
        serve(box)
        near, port = far.removesuffix("2") + "1", box.info().mapped_ports[0].host_port

        def is_told() -> str:
            return text_of(box, f"nc -w 4 {far} 80 </dev/null || true").strip()

        def reaches_box() -> bool:
            return "hi" in visit_from(name, near, port).stdout

        server.kill()
        server.start()
        assert is_told() == near
        assert reaches_box()
        server.stop()
        for flags in (["--network-pool-v6", str(new_pool())], []):
            server.flags[-2:] = flags
            server.start()
            assert is_told() == ""
            assert not reaches_box()
            assert connects(box, peer.info().container_ip)
            assert box.info().container_ipv6 == ""
            assert box.explain_egress(Destination(TCP, far, 80)).cause is EgressCause.IPV6
            assert garden.check_leaks() == []
            server.stop()
        server.flags += ["--network-pool-v6", str(pool)]
        server.start()
        assert is_told() == near
        assert reaches_box()
        assert box.info().container_ipv6
        assert garden.check_leaks() == []
        server.stop()
        del server.flags[-2:]
        server.start()
        box.destroy()  # what stands for its IPv6 address goes with it


def test_table_that_somebody_removed_comes_back_with_ipv6_in_it(no_trace: None) -> None:
    """Members, mapped ports and the rules of privileged containers."""
    with (
        running_server("--network-pool-v6", str(new_pool())) as server,
        GardenClient(server.address) as garden,
    ):
        box = garden.create(ContainerSpec(handle="box", port_mappings=(PortMapping(0, PORT),)))
        address, port = serve(box), box.info().mapped_ports[0].host_port
        root = garden.create(
            ContainerSpec(
                privileged=True, egress=EgressPolicy(EgressAction.DENY, (rule(address, TCP, PORT),))
            )
        )
        listed = subprocess.run(
            ["nft", "list", "tables"], capture_output=True, text=True, check=True, timeout=20
        )
        tag = (server.place / "log").read_text().partition('"tag": "')[2][:4]
        assert f"garden_{tag}" in listed.stdout
        subprocess.run(["nft", "delete", "table", "inet", f"garden_{tag}"], check=True, timeout=20)
        with garden.create():  # a change finds it missing
            assert connects(root, address)
            assert not connects(root, gateway_of(root), port)
            with socket.create_connection((gateway_of(root), port), timeout=5) as peer:
                peer.sendall(b"hello\n")
                assert peer.makefile().readline() == "hello\n"
            assert garden.check_leaks() == []
