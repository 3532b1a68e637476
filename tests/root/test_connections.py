"""What becomes of connections is visible: events, explanations, denied networks, and the cutting of what was open."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit.garden import PATIENCE, code_of, events_of, text_of, wait_until
from kit.server import ServerProcess, running_server

from garden_py.client import (
    BindMount,
    Container,
    ContainerSpec,
    Destination,
    EgressAction,
    EgressCause,
    EgressPolicy,
    EgressProtocol,
    EgressRule,
    Event,
    EventKind,
    GardenClient,
    IcmpMatch,
    InvalidArgument,
    PortRange,
)

pytestmark = pytest.mark.root

PORT = 7000
CLOSED = EgressPolicy(EgressAction.DENY)
OPEN = EgressPolicy(EgressAction.ALLOW)
TCP, UDP, ICMP = EgressProtocol.TCP, EgressProtocol.UDP, EgressProtocol.ICMP
both = pytest.mark.parametrize("privileged", [False, True])


def rule(
    address: str, *ports: int, action: EgressAction = EgressAction.ALLOW, log: bool = False
) -> EgressRule:
    return EgressRule(action, TCP, (address,), tuple(PortRange(port) for port in ports), log=log)


def serve(container: Container, port: int = PORT) -> str:
    """Have a container send back on every connection what comes; its address."""
    container.start(["nc", "-ll", "-p", str(port), "-e", "cat"])
    listening = f"grep -q ':{port:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6"
    wait_until(lambda: code_of(container, listening) == 0, "the listener")
    return container.info().container_ip


def connects(container: Container, address: str, port: int = PORT) -> bool:
    return text_of(container, f"echo hello | nc -w 10 {address} {port} || true").strip() == "hello"


def next_connection(events: Iterator[Event], kind: EventKind) -> dict[str, str]:
    return dict(next(event.details for event in events if event.kind is kind))


def neighbour_of(gateway: str) -> str:
    """An address of the same pool that no container has."""
    return f"{gateway.rpartition('.')[0]}.250"


@pytest.fixture(scope="module")
def server_ip(garden: GardenClient) -> str:
    return serve(garden.create(ContainerSpec(handle="echo")))


# --- events


@pytest.mark.cgroup2
@both
def test_denied_connection_is_an_event_that_names_the_rule(
    garden: GardenClient, server_ip: str, privileged: bool
) -> None:
    """Container, addresses, ports and what decided; of a rule, and of the default."""
    policy = EgressPolicy(EgressAction.DENY, (rule(server_ip, PORT, action=EgressAction.DENY),))
    with garden.create(ContainerSpec(egress=policy, privileged=privileged)) as box:
        events = events_of(garden, box.handle)
        assert not connects(box, server_ip)
        told = next_connection(events, EventKind.CONNECTION_DENIED)
        assert told.pop("source_port").isdecimal()
        assert told == {
            "protocol": "tcp", "source": box.info().container_ip, "destination": server_ip,
            "destination_port": str(PORT), "decided_by": "rule", "rule_number": "1",
            "rule": f"deny tcp:{server_ip}:{PORT}", "count": "1",
        }  # fmt: skip
        assert code_of(box, f"timeout 3 nslookup name {server_ip}") != 0
        told = next_connection(events, EventKind.CONNECTION_DENIED)
        assert (told["protocol"], told["destination_port"], told["decided_by"]) == ("udp", "53", "default")
        assert code_of(box, f"ping -c 1 -W 1 {server_ip}") != 0
        told = next_connection(events, EventKind.CONNECTION_DENIED)
        assert (told["protocol"], told["icmp"], told.get("rule")) == ("icmp", "8/0", None)


@both
def test_allowed_connection_is_an_event_where_its_rule_says_log(
    garden: GardenClient, server_ip: str, privileged: bool
) -> None:
    """Once per connection, however much it carries; without log nothing is told."""
    policy = EgressPolicy(EgressAction.DENY, (rule(server_ip, PORT, log=True), rule(server_ip, PORT + 1)))
    with garden.create(ContainerSpec(egress=policy, privileged=privileged)) as box:
        events = events_of(garden, box.handle)
        assert text_of(box, f"seq 20000 | nc {server_ip} {PORT} | tail -n 1") == "20000\n"
        told = next_connection(events, EventKind.CONNECTION_ALLOWED)
        assert (told["destination"], told["destination_port"], told["rule_number"]) == (
            server_ip,
            str(PORT),
            "1",
        )
        assert not connects(box, server_ip, PORT + 1)  # allowed, and answered by nobody
        assert not connects(box, server_ip, PORT + 2)
        seen = [
            next(e for e in events if e.kind in (EventKind.CONNECTION_ALLOWED, EventKind.CONNECTION_DENIED))
        ]
        assert [event.details["destination_port"] for event in seen] == [str(PORT + 2)]


def test_host_and_forged_sources_are_told_too(garden: GardenClient) -> None:
    """What the host's own table refuses has the container's name on it as well."""
    with garden.create(ContainerSpec(privileged=True)) as box:
        events = events_of(garden, box.handle)
        host_ip = box.info().host_ip
        forged = neighbour_of(host_ip)
        assert not connects(box, host_ip, 22)
        told = next_connection(events, EventKind.CONNECTION_DENIED)
        assert (told["destination"], told["destination_port"], told["decided_by"]) == (host_ip, "22", "host")
        script = f"ip addr add {forged}/32 dev eth0; ping -I {forged} -c 1 -W 1 {host_ip}"
        assert code_of(box, script) != 0
        told = next_connection(events, EventKind.CONNECTION_DENIED)
        assert (told["source"], told["decided_by"]) == (forged, "spoofed")


def test_a_flood_of_refusals_is_bounded_and_counted(garden: GardenClient, server_ip: str) -> None:
    """A thousand tries are some dozens of events at most; the counter has them all, the server answers."""
    with garden.create(ContainerSpec(egress=CLOSED)) as box:
        before = box.metrics()
        cursor = next(garden.events()).cursor
        tries = f"nc -w 1 {server_ip} $i </dev/null 2>/dev/null"
        script = f"i=1; while [ $i -le 1000 ]; do {tries}; i=$((i+1)); done"
        assert code_of(box, f"{script}; true") == 0
        wait_until(lambda: box.egress().default_packets >= 1000, "the counter")
        assert box.metrics().network_tx_packets == before.network_tx_packets
        box.update_properties({"done": "yes"})
        told = []
        for event in garden.events([box.handle], after_cursor=cursor):
            if event.kind is EventKind.PROPERTIES_CHANGED:
                break
            told.append(event)
        refused = [event for event in told if event.kind is EventKind.CONNECTION_DENIED]
        assert 1 <= len(refused) < 500


# --- explanations


@both
def test_explanation_is_what_then_happens(garden: GardenClient, server_ip: str, privileged: bool) -> None:
    """For each kind of answer: what is foretold, and whether a real connection agrees."""
    policy = EgressPolicy(
        EgressAction.DENY, (rule(server_ip, PORT + 1, action=EgressAction.DENY), rule(server_ip))
    )
    with garden.create(ContainerSpec(egress=policy, privileged=privileged)) as box:

        def explain(address: str, port: int) -> tuple[EgressAction, EgressCause, int]:
            found = box.explain_egress(Destination(TCP, address, port))
            assert (found.rule is not None) == (found.cause is EgressCause.RULE)
            return found.action, found.cause, found.rule_number

        allow, deny = EgressAction.ALLOW, EgressAction.DENY
        assert explain(server_ip, PORT) == (allow, EgressCause.RULE, 2)
        assert connects(box, server_ip)
        assert explain(server_ip, PORT + 1) == (deny, EgressCause.RULE, 1)
        assert not connects(box, server_ip, PORT + 1)
        assert explain("192.0.2.9", 80) == (deny, EgressCause.DEFAULT, 0)
        assert explain("2001:db8::1", 80) == (deny, EgressCause.IPV6, 0)
        assert explain("127.0.0.1", 80) == (allow, EgressCause.LOOPBACK, 0)
        box.set_egress(OPEN)
        assert explain(box.info().host_ip, 22) == (deny, EgressCause.HOST, 0)
        assert explain(neighbour_of(box.info().host_ip), 22) == (deny, EgressCause.UNREACHABLE, 0)
        ping = box.explain_egress(Destination(ICMP, box.info().host_ip))
        assert (ping.action, ping.cause) == (allow, EgressCause.DEFAULT)
        assert code_of(box, f"ping -c 1 -W 20 {box.info().host_ip}") == 0


def test_mapped_port_of_the_host_is_explained_as_open(garden: GardenClient) -> None:
    """It leads to a container, whatever the host's own services may be asked."""
    with garden.create() as server, garden.create() as box:
        serve(server, 8000)
        mapped = server.map_port(8000)
        address = box.info().host_ip
        assert connects(box, address, mapped.host_port)
        found = box.explain_egress(Destination(TCP, address, mapped.host_port))
        assert (found.action, found.cause) == (EgressAction.ALLOW, EgressCause.DEFAULT)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (Destination(TCP, "10.0.0.1"), "port"),
        (Destination(UDP, "ten", 53), "address"),
        (Destination(ICMP, "10.0.0.1", 53), "port"),
        (Destination(TCP, "10.0.0.1", 53, IcmpMatch(8)), "icmp"),
        (Destination(TCP, "10.0.0.1", 70_000), "port"),
    ],
)
def test_bad_question_names_its_field(garden: GardenClient, asked: Destination, field: str) -> None:
    with garden.create() as box, pytest.raises(InvalidArgument) as refused:
        box.explain_egress(asked)
    assert [each.field for each in refused.value.fields] == [field]


def test_command_line_explains(garden_server: ServerProcess, garden: GardenClient, server_ip: str) -> None:
    """As a user types it."""

    def garden_command(*words: str) -> str:
        argv = [sys.executable, "-m", "garden_py", "--address", garden_server.address, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout

    policy = EgressPolicy(EgressAction.DENY, (rule(server_ip, PORT),))
    with garden.create(ContainerSpec(egress=policy)) as box:
        asked = f"{server_ip}:{PORT}"
        said = garden_command("egress", "explain", box.handle, "tcp", asked)
        assert said == f"tcp {asked}: allowed by rule 1: tcp:{server_ip}:{PORT}\n"
        said = garden_command("egress", "explain", box.handle, "icmp", "192.0.2.1")
        assert said == "icmp 192.0.2.1:8/0: denied: the policy's default\n"
        garden_command("egress", "set", box.handle, "--default", "deny", "--cut")
        assert not connects(box, server_ip)


# --- established connections


@both
def test_cut_ends_what_the_new_policy_does_not_allow_and_nothing_else(
    garden: GardenClient, server_ip: str, privileged: bool
) -> None:
    """A live stream ends, another one that is still allowed goes on, and so does one from outside."""
    both_open = EgressPolicy(EgressAction.DENY, (rule(server_ip, PORT), rule(server_ip, PORT + 10)))
    with (
        garden.create(ContainerSpec(egress=both_open, privileged=privileged)) as box,
        garden.create() as second,
    ):
        serve(garden.container("echo"), PORT + 10)
        serve(box, 7300)
        visitor = second.run(["nc", box.info().container_ip, "7300"])
        lost = box.run(["nc", server_ip, str(PORT)])
        kept = box.run(["nc", server_ip, str(PORT + 10)])

        def talk(process: Any, word: str) -> str:
            process.stdin.write(f"{word}\n".encode())
            return bytes(next(iter(process)).data).decode().strip()

        for process in (visitor, lost, kept):
            assert talk(process, "before") == "before"
        box.set_egress(EgressPolicy(EgressAction.DENY, (rule(server_ip, PORT + 10),)), cut=True)
        lost.stdin.write(b"after\n")
        assert lost.wait(PATIENCE) is not None
        assert talk(kept, "after") == "after"
        assert talk(visitor, "after") == "after"
        box.set_egress(CLOSED)  # keeps
        assert talk(kept, "again") == "again"
        assert talk(visitor, "again") == "again"
        box.set_egress(CLOSED, cut=True)
        kept.stdin.write(b"last\n")
        assert kept.wait(PATIENCE) is not None
        assert talk(visitor, "last") == "last"
        visitor.signal("KILL")


# --- the server's settings


def test_denied_networks_hold_where_no_rule_says_otherwise(no_trace: None) -> None:
    """N10, N21: refused, counted and told; a rule opens; what was made before the setting follows it."""
    with running_server() as server, GardenClient(server.address) as garden:
        address = serve(garden.create(ContainerSpec(handle="echo")))
        old = garden.create(ContainerSpec(handle="old"))
        old_root = garden.create(ContainerSpec(handle="old-root", privileged=True))
        assert connects(old, address)
        server.stop()
        server.flags += ["--deny-network", "192.0.2.0/24", "--deny-network", "10.0.0.0/8"]
        server.start()
        opened = EgressPolicy(EgressAction.ALLOW, (rule(address, PORT),))
        for box in (old, old_root, garden.create(), garden.create(ContainerSpec(privileged=True))):
            events = events_of(garden, box.handle)
            assert not connects(box, address)
            assert next_connection(events, EventKind.CONNECTION_DENIED)["decided_by"] == "denied_network"
            assert box.egress().denied_network_packets >= 1
            found = box.explain_egress(Destination(TCP, address, PORT))
            assert (found.action, found.cause) == (EgressAction.DENY, EgressCause.DENIED_NETWORK)
            box.set_egress(opened)
            assert connects(box, address)
        server.stop()
        del server.flags[-4:]
        server.start()
        old.set_egress(OPEN)
        assert connects(old, address)


def test_events_of_connections_go_on_after_a_restart(no_trace: None) -> None:
    """The sockets that hear of them were the former server's; counters are the kernel's and stay."""
    with running_server() as server, GardenClient(server.address) as garden:
        address = serve(garden.create(ContainerSpec(handle="echo")))
        boxes = [garden.create(ContainerSpec(egress=CLOSED, privileged=each)) for each in (False, True)]
        assert not any(connects(box, address) for box in boxes)
        counted = boxes[0].egress().default_packets
        server.kill()
        server.start()
        for box in boxes:
            events = events_of(garden, box.handle)
            assert not connects(box, address)
            assert next_connection(events, EventKind.CONNECTION_DENIED)["destination"] == address
        assert boxes[0].egress().default_packets > counted > 0


def test_chosen_dns_server_on_the_host_may_be_asked(no_trace: None) -> None:
    """N28: on port 53 and nothing else, where the host is closed."""
    with running_server("--dns-server", "10.253.253.53") as server, GardenClient(server.address) as garden:
        subprocess.run(["ip", "address", "add", "10.253.253.53/32", "dev", "lo"], check=True, timeout=20)
        try:
            with (
                garden.create() as box,
                socket.create_server(("10.253.253.53", 53)) as names,
                socket.create_server(("10.253.253.53", 54)) as other,
            ):
                for listener, patience_s in ((names, 30), (other, 2)):
                    listener.settimeout(patience_s)
                    box.start(["nc", "-w", "10", "10.253.253.53", str(listener.getsockname()[1])])
                names.accept()[0].close()
                with pytest.raises(TimeoutError):
                    other.accept()
                found = [box.explain_egress(Destination(TCP, "10.253.253.53", port)) for port in (53, 54)]
                assert [each.action for each in found] == [EgressAction.ALLOW, EgressAction.DENY]
        finally:
            subprocess.run(
                ["ip", "address", "delete", "10.253.253.53/32", "dev", "lo"], check=True, timeout=20
            )


def test_no_socket_of_a_container_passes_by_its_rules(garden: GardenClient) -> None:
    """Root of an unprivileged container: frames by hand are dropped at the link, AF_XDP is no socket for it."""
    with garden.create(ContainerSpec(egress=CLOSED)) as box:
        counter = ["nsenter", "-t", str(box.info().pid), "-n", "nft", "list", "table", "netdev", "garden"]

        def dropped() -> int:
            listed = subprocess.run(counter, capture_output=True, text=True, timeout=20, check=True).stdout
            return int(listed.partition("counter packets ")[2].split()[0])

        code_of(box, f"arping -c 1 -w 1 -I eth0 {box.info().host_ip}")
        assert dropped() >= 1
        assert code_of(box, "udhcpc -n -q -t 1 -T 1 -i eth0 >/dev/null 2>&1") != 0
        box.set_egress(OPEN)
        assert subprocess.run(counter, capture_output=True, timeout=20, check=False).returncode != 0
        box.set_egress(CLOSED)
        assert dropped() == 0


def test_xdp_sockets_are_refused(garden: GardenClient, tmp_path: Path) -> None:
    """They would send past netfilter; packet sockets, which cannot, are there."""
    source, program = tmp_path / "try.c", tmp_path / "try"
    source.write_text(
        "#include <errno.h>\n#include <stdio.h>\n#include <sys/socket.h>\n"
        "int main(void) { for (int family = 17; family <= 44; family += 27) { errno = 0; socket(family, SOCK_RAW, 0);"
        ' printf("%d ", errno); } return 0; }\n'
    )
    subprocess.run(["gcc", "-static", "-o", program, source], check=True, timeout=60)
    with garden.create(ContainerSpec(bind_mounts=(BindMount(str(program), "/try"),))) as box:
        assert text_of(box, "/try") == f"0 {errno.EPERM} "


def test_container_of_an_earlier_release_keeps_its_network(no_trace: None) -> None:
    """Its routes have no realm; the server that takes it over gives them one with the rules that ask for it."""
    with running_server() as server, GardenClient(server.address) as garden:
        address = serve(garden.create(ContainerSpec(handle="echo")))
        policy = EgressPolicy(EgressAction.DENY, (rule(address, PORT),))
        box = garden.create(ContainerSpec(handle="old", egress=policy))
        enter = ["nsenter", "-t", str(box.info().pid), "-n"]
        gateway = box.info().host_ip
        server.stop()
        for words in (f"{gateway} dev eth0", f"default via {gateway} dev eth0"):
            subprocess.run([*enter, "ip", "route", "replace", *words.split()], check=True, timeout=20)
        subprocess.run([*enter, "nft", "delete", "table", "netdev", "garden"], check=True, timeout=20)
        server.place.joinpath("state/containers/old/egress-rules").unlink()
        server.start()
        assert connects(box, address)
        assert not connects(box, address, PORT + 1)
