"""What containers reach, with real packets between containers of one server and to the host's loopback."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kit.garden import code_of, sh, text_of, wait_until
from kit.server import ServerProcess, running_server

from garden_py.client import (
    Aborted,
    AlreadyExists,
    Container,
    ContainerSpec,
    EgressAction,
    EgressPolicy,
    EgressProtocol,
    EgressRule,
    EventKind,
    GardenClient,
    PortMapping,
    PortProtocol,
    PortRange,
)
from garden_py.config import Config

pytestmark = pytest.mark.root

PORT = 7000
CLOSED = EgressPolicy(EgressAction.DENY)
OPEN = EgressPolicy(EgressAction.ALLOW)


def serve(container: Container, word: str, port: int = PORT) -> None:
    """Have a container answer every connection with a word; returns when it listens."""
    container.start(["nc", "-ll", "-p", str(port), "-e", "echo", word])
    listening = f"grep -q ':{port:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6"
    wait_until(lambda: code_of(container, listening) == 0, "the listener")


def ask(container: Container, address: str, port: int = PORT) -> str:
    """What a container is answered there; "" when the connection fails."""
    done = container.run(sh(f"nc -w 10 {address} {port} </dev/null")).output()
    return done.stdout.decode().strip()


def ask_from_host(address: str, port: int) -> str:
    """What the host is answered there."""
    with socket.create_connection((address, port), timeout=5) as connection:
        return connection.makefile("rb").read().decode().strip()


def allow(address: str, *ports: int) -> EgressPolicy:
    rule = EgressRule(
        protocol=EgressProtocol.TCP, networks=(address,), ports=tuple(PortRange(port) for port in ports)
    )
    return EgressPolicy(EgressAction.DENY, (rule,))


@pytest.fixture(scope="module")
def server(garden: GardenClient) -> Container:
    """A container that answers on PORT."""
    container = garden.create(ContainerSpec(handle="server"))
    serve(container, "hello")
    return container


@pytest.fixture(scope="module")
def server_ip(server: Container) -> str:
    return server.info().container_ip


@pytest.mark.cgroup2
@pytest.mark.parametrize("privileged", [False, True])
def test_rules_open_and_close_a_running_container(
    garden: GardenClient, server_ip: str, privileged: bool
) -> None:
    """Promise 3: denied, allowed, denied again, without a restart of anything; refusals are quick."""
    with garden.create(ContainerSpec(egress=CLOSED, privileged=privileged)) as box:
        started = time.monotonic()
        assert ask(box, server_ip) == ""
        assert time.monotonic() - started < 2.5, "a refusal must not be a time-out"
        box.set_egress(allow(server_ip, PORT))
        assert ask(box, server_ip) == "hello"
        box.set_egress(allow(server_ip, PORT + 1))
        assert ask(box, server_ip) == ""
        box.set_egress(OPEN)
        assert ask(box, server_ip) == "hello"
        box.set_egress(CLOSED)
        assert ask(box, server_ip) == ""


def test_policy_of_the_create_is_in_force_from_the_first_packet(garden: GardenClient, server_ip: str) -> None:
    """There is no moment in which a closed container is open."""
    for policy, answer in ((allow(server_ip, PORT), "hello"), (CLOSED, "")):
        with garden.create(ContainerSpec(egress=policy)) as box:
            assert ask(box, server_ip) == answer


def test_established_connection_survives_a_change(garden: GardenClient, server: Container) -> None:
    """Rules decide about new connections; what was let through goes on."""
    server.start(["nc", "-l", "-p", "7100", "-e", "cat"])
    wait_until(
        lambda: code_of(server, "grep -q ':1BBC .* 0A ' /proc/net/tcp /proc/net/tcp6") == 0, "the listener"
    )
    address = server.info().container_ip
    with garden.create(ContainerSpec(egress=allow(address, 7100))) as box:
        talk = box.run(["nc", address, "7100"])
        talk.stdin.write(b"before\n")
        assert next(iter(talk)).data == b"before\n"
        box.set_egress(CLOSED)
        talk.stdin.write(b"after\n")
        assert next(iter(talk)).data == b"after\n"
        talk.signal("KILL")


def test_first_matching_rule_decides_and_is_counted(garden: GardenClient, server_ip: str) -> None:
    """A deny before a wider allow wins, and the counters tell which rule it was."""
    deny = EgressRule(
        EgressAction.DENY, EgressProtocol.TCP, networks=(server_ip,), ports=(PortRange(PORT, PORT + 10),)
    )
    wide = EgressRule(protocol=EgressProtocol.TCP)
    with garden.create(ContainerSpec(egress=EgressPolicy(EgressAction.DENY, (deny, wide)))) as box:
        assert ask(box, server_ip) == ""
        counted = box.egress()
        assert counted.rules[0].packets >= 1
        assert counted.rules[0].bytes > 0
        assert counted.rules[1].packets == 0
        box.set_egress(EgressPolicy(EgressAction.DENY, (wide, deny)))
        assert ask(box, server_ip) == "hello"
        counted = box.egress()
        assert counted.rules[0].packets >= 1
        assert counted.rules[1].packets == 0
        box.set_egress(CLOSED)
        assert ask(box, server_ip) == ""
        assert box.egress().default_packets >= 1


def test_lost_update_is_refused(garden: GardenClient, server_ip: str) -> None:
    """Who read an older policy than the one in force must read again."""
    with garden.create(ContainerSpec(egress=CLOSED)) as box:
        first = box.egress()
        second = box.set_egress(EgressPolicy(EgressAction.ALLOW, etag=first.etag))
        assert second.etag != first.etag
        with pytest.raises(Aborted) as refused:
            box.set_egress(EgressPolicy(EgressAction.DENY, etag=first.etag))
        assert refused.value.code == "ETAG_MISMATCH"
        assert ask(box, server_ip) == "hello"
        assert box.set_egress(EgressPolicy(EgressAction.DENY, etag=second.etag)).etag == first.etag


def test_a_thousand_rules_are_one_change(garden: GardenClient, server_ip: str) -> None:
    """Large policies are taken whole; the last rule works like the first."""
    rules = tuple(
        EgressRule(protocol=EgressProtocol.TCP, networks=(f"192.0.2.{n % 256}",), ports=(PortRange(1 + n),))
        for n in range(999)
    )
    last = EgressRule(protocol=EgressProtocol.TCP, networks=(server_ip,), ports=(PortRange(PORT),))
    with garden.create(ContainerSpec(egress=CLOSED)) as box:
        box.set_egress(EgressPolicy(EgressAction.DENY, (*rules, last)))
        assert ask(box, server_ip) == "hello"
        assert len(box.egress().rules) == 1000
        assert box.egress().rules[-1].packets >= 1


def test_udp_follows_its_own_rules(garden: GardenClient, server: Container, server_ip: str) -> None:
    """A rule for TCP opens nothing for UDP; pings need a rule for ICMP."""
    with garden.create(ContainerSpec(egress=allow(server_ip, PORT))) as box:
        assert code_of(box, f"ping -c 1 -W 1 {server_ip}") != 0
        box.set_egress(EgressPolicy(EgressAction.DENY, (EgressRule(protocol=EgressProtocol.ICMP),)))
        assert code_of(box, f"ping -c 1 -W 20 {server_ip}") == 0
        assert ask(box, server_ip) == ""


def test_policy_cannot_be_undone_from_inside(garden: GardenClient, server_ip: str) -> None:
    """Root of an unprivileged container has no say over its network."""
    with garden.create(ContainerSpec(egress=CLOSED)) as box:
        for attempt in (
            "ip link set lo down",
            "ip route add 192.0.2.0/24 dev lo",
            "ip addr add 192.0.2.9/32 dev lo",
        ):
            assert code_of(box, attempt) != 0
        assert ask(box, server_ip) == ""


@pytest.mark.cgroup2
def test_mapped_port_is_reachable_from_the_host(garden: GardenClient) -> None:
    """Through loopback and through the bridge's address; of the create and of a running container."""
    spec = ContainerSpec(port_mappings=(PortMapping(0, PORT),))
    with garden.create(spec) as box:
        serve(box, "mapped")
        (mapping,) = box.info().mapped_ports
        assert mapping.container_port == PORT
        assert ask_from_host("127.0.0.1", mapping.host_port) == "mapped"
        assert ask_from_host(box.info().host_ip, mapping.host_port) == "mapped"
        later = box.map_port(PORT)
        assert later.host_port != mapping.host_port
        assert ask_from_host("127.0.0.1", later.host_port) == "mapped"
        assert {m.host_port for m in box.info().mapped_ports} == {mapping.host_port, later.host_port}
    with pytest.raises(OSError, match="refused"):
        ask_from_host("127.0.0.1", mapping.host_port)


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_that_a_program_of_the_host_has_is_not_mapped(
    garden: GardenClient, family: int, address: str
) -> None:
    """Nobody would reach that program any more. At create, live, and from the pool."""
    with garden.create() as box, socket.socket(family) as listener:
        following = box.map_port(PORT).host_port + 1
        listener.bind((address, following))
        listener.listen()
        assert box.map_port(PORT).host_port == following + 1
        with pytest.raises(AlreadyExists, match="in use by a program of the host") as refused:
            box.map_port(PORT, host_port=following)
        assert refused.value.code == "PORT_IN_USE"
        with pytest.raises(AlreadyExists):
            garden.create(ContainerSpec(port_mappings=(PortMapping(following, 1),)))
        listener.close()
        assert box.map_port(PORT, host_port=following).host_port == following


def test_chosen_host_port_is_used_once(garden: GardenClient) -> None:
    """Inside or outside the pool; the second who asks is told, and gets nothing half done."""
    with garden.create() as first, garden.create() as second:
        mapped = first.map_port(PORT)
        with pytest.raises(AlreadyExists) as refused:
            second.map_port(PORT, host_port=mapped.host_port)
        assert refused.value.code == "PORT_IN_USE"
        assert second.info().mapped_ports == ()
        with pytest.raises(AlreadyExists):
            garden.create(ContainerSpec(port_mappings=(PortMapping(mapped.host_port, 1),)))
        udp = second.map_port(PORT, host_port=mapped.host_port, protocol=PortProtocol.UDP)
        assert udp.host_port == mapped.host_port


@pytest.mark.parametrize("privileged", [False, True])
def test_a_policy_may_be_long(garden: GardenClient, server_ip: str, privileged: bool) -> None:
    """Its text is longer than what fits one message to a worker, when it is set and at create."""
    others = tuple(
        EgressRule(
            protocol=EgressProtocol.TCP,
            networks=tuple(f"192.0.{number >> 8}.{number & 255}/32" for number in (first, first + 2000)),
            ports=tuple(PortRange(port) for port in range(1, 16, 2)),
        )
        for first in range(1000)
    )
    policy = EgressPolicy(EgressAction.DENY, (*others, *allow(server_ip, PORT).rules))
    with garden.create(ContainerSpec(egress=policy, privileged=privileged)) as box:
        assert ask(box, server_ip) == "hello"
        assert box.egress().rules[-1].packets > 0
        box.set_egress(CLOSED)
        assert ask(box, server_ip) == ""
        box.set_egress(policy)
        assert ask(box, server_ip) == "hello"


@pytest.mark.parametrize("at_create", [False, True])
def test_a_datagram_flow_from_before_a_mapping_finds_it(garden: GardenClient, at_create: bool) -> None:
    """A sender that never pauses, as of logs, keeps its flow in the host's table, and with it where it leads."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, free_port() as port:

        def arrives(box: Container) -> bool:
            with suppress(
                OSError
            ):  # refused: by the host, or then by the container, where nobody listens either
                sender.sendto(b"ping", ("127.0.0.1", port))
            names, values = (line.split() for line in text_of(box, "grep ^Udp: /proc/net/snmp").splitlines())
            return int(values[names.index("NoPorts")]) > 0

        with garden.create() as other:
            assert not arrives(other)
        mapping = PortMapping(port, PORT, PortProtocol.UDP)
        with garden.create(ContainerSpec(port_mappings=(mapping,) if at_create else ())) as box:
            if not at_create:
                assert not arrives(box)
                assert box.map_port(PORT, host_port=port, protocol=PortProtocol.UDP).host_port == port
            wait_until(lambda: arrives(box), "a datagram")


@contextmanager
def free_port() -> Iterator[int]:
    """A UDP port of the host's that nobody listens at."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    yield port


def test_container_reaches_itself_and_localhost(garden: GardenClient) -> None:
    """H2: by address, by its hostname, and through loopback, whatever its egress policy."""
    with garden.create(ContainerSpec(handle="myself", egress=CLOSED)) as box:
        serve(box, "me")
        for address in ("127.0.0.1", "localhost", box.info().container_ip, "myself"):
            assert ask(box, address) == "me", address


def test_traffic_is_counted(garden: GardenClient, server_ip: str) -> None:
    """Bytes and packets as the container sees them."""
    with garden.create() as box:
        before = box.metrics()
        assert ask(box, server_ip) == "hello"
        after = box.metrics()
        assert after.network_tx_packets > before.network_tx_packets
        assert after.network_rx_packets > before.network_rx_packets
        assert after.network_rx_bytes > before.network_rx_bytes + len("hello")


def test_name_files_are_the_containers_own(garden: GardenClient) -> None:
    """N30 to N33: content, owner, and who may write; the host's files are untouched."""
    before = Path("/etc/resolv.conf").read_bytes(), Path("/etc/hosts").read_bytes()
    with garden.create(ContainerSpec(handle="names")) as box:
        info = box.info()
        assert text_of(box, "cat /etc/hosts") == f"127.0.0.1 localhost\n{info.container_ip} names\n"
        assert text_of(box, "stat -c '%u %g %a' /etc/hosts /etc/resolv.conf") == "0 0 644\n0 0 644\n"
        assert code_of(box, "echo '192.0.2.1 extra' >>/etc/hosts; echo '# x' >>/etc/resolv.conf") == 0
        assert code_of(box, "echo x >>/etc/hosts", user="65534") == 1
    assert before == (Path("/etc/resolv.conf").read_bytes(), Path("/etc/hosts").read_bytes())


def test_closed_by_default_and_chosen_dns_servers() -> None:
    """Server settings: the default policy, and what containers find in resolv.conf."""
    flags = ("--default-egress", "deny", "--dns-server", "192.0.2.53", "--dns-server", "192.0.2.54")
    with (
        running_server(*flags) as server,
        GardenClient(server.address) as garden,
        garden.create() as one,
        garden.create() as two,
    ):
        serve(one, "one")
        address = one.info().container_ip
        assert two.egress().default_action is EgressAction.DENY
        assert ask(two, address) == ""
        two.set_egress(OPEN)
        assert ask(two, address) == "one"
        assert text_of(two, "cat /etc/resolv.conf") == "nameserver 192.0.2.53\nnameserver 192.0.2.54\n"


def test_containers_cannot_reach_the_hosts_own_services(garden: GardenClient) -> None:
    """A listener on the bridge's address is the host's, not theirs, however open their policy is."""
    with garden.create(ContainerSpec(egress=OPEN)) as box, socket.socket() as listener:
        listener.bind((box.info().host_ip, 0))
        listener.listen(1)
        listener.settimeout(0.2)
        assert ask(box, box.info().host_ip, listener.getsockname()[1]) == ""
        with pytest.raises(TimeoutError):
            listener.accept()


def test_addresses_are_unique_and_used_again(garden: GardenClient) -> None:
    """No two living containers share one; a freed one serves the next."""
    boxes = [garden.create() for _ in range(5)]
    addresses = [box.info().container_ip for box in boxes]
    assert len(set(addresses)) == 5
    boxes[2].destroy()
    with garden.create() as again:
        assert again.info().container_ip == addresses[2]
    for box in (*boxes[:2], *boxes[3:]):
        box.destroy()


def test_table_that_somebody_removed_comes_back_with_all_that_was_in_it(
    garden: GardenClient, garden_server: ServerProcess, server: Container
) -> None:
    """`nft flush ruleset` of another tool must not cost the containers their network until a restart."""
    table = f"garden_{Config(state_dir=garden_server.place / 'state').tag}"
    mapped = server.map_port(PORT)
    with garden.create(ContainerSpec(egress=CLOSED, privileged=True)) as closed:
        subprocess.run(["nft", "delete", "table", "inet", table], check=True, timeout=20)
        with garden.create() as newcomer:
            assert ask(newcomer, server.info().container_ip) == "hello"
            assert ask_from_host("127.0.0.1", mapped.host_port) == "hello"
            assert ask(closed, server.info().container_ip) == ""
        rules = subprocess.run(
            ["nft", "list", "table", "inet", table], check=True, capture_output=True, timeout=20
        )
        assert closed.info().container_ip in rules.stdout.decode()


@pytest.mark.parametrize("words", ["delete table inet", "flush table inet", "flush chain inet"])
def test_table_that_lost_its_rules_is_put_back_by_itself(
    garden: GardenClient, garden_server: ServerProcess, server: Container, words: str
) -> None:
    """Long before the janitor would come by: a reload of nftables.service flushes everything."""
    table = f"garden_{Config(state_dir=garden_server.place / 'state').tag}"
    chain = ["forward"] if "chain" in words else []
    mapped, events = server.map_port(PORT), garden.events()
    next(events)
    with garden.create(ContainerSpec(egress=CLOSED, privileged=True)) as closed:
        subprocess.run(["nft", *words.split(), table, *chain], check=True, timeout=20)
        told = next(each for each in events if each.kind is EventKind.LEAK_FOUND)
        assert (told.details["name"], told.details["put_back"]) == (f"table inet {table}", "yes")
        assert ask_from_host("127.0.0.1", mapped.host_port) == "hello"
        assert ask(closed, server.info().container_ip) == ""


def test_table_that_somebody_removed_is_back_after_a_restart(no_trace: None) -> None:
    """Whatever happened while no server ran."""
    with running_server() as running, GardenClient(running.address) as client:
        serve(client.create(ContainerSpec(handle="served")), "hello")
        mapped = client.container("served").map_port(PORT)
        running.stop()
        table = f"garden_{Config(state_dir=running.place / 'state').tag}"
        subprocess.run(["nft", "delete", "table", "inet", table], check=True, timeout=20)
        running.start()
        assert ask_from_host("127.0.0.1", mapped.host_port) == "hello"


def test_N17_freed_port_is_not_given_out_again_right_after_a_restart(no_trace: None) -> None:
    """Whoever still talks to the old container's port shall find it closed, not find a stranger."""
    with running_server() as running, GardenClient(running.address) as client:
        with client.create() as box:
            first = box.map_port(80).host_port
        running.kill()
        running.start()
        with client.create() as box:
            assert box.map_port(80).host_port == first + 1
