"""A host, an outside world and containers made of network namespaces: the real host is not touched.

The test process itself becomes the host: it moves into a fresh network namespace for the length of a test.
Containers and the outside are processes in namespaces of their own that carry out small orders (`Probe`).
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

from garden_py.agent.rtnetlink import Rtnetlink, VethEnd
from garden_py.backend.net import firewall, host_firewall
from garden_py.backend.net.apply import HostNetwork
from garden_py.backend.net.host_firewall import HostPolicy, PortMapping, PortProtocol
from garden_py.backend.net.messages import Attachment
from garden_py.backend.net.plan import HostPlan, LinkPlan, plan_link
from garden_py.model.netrule import EgressPolicy

TAG = "7e57"
HOST_IP = "192.0.2.1"  # TEST-NET-1, RFC 5737
OUTSIDE_IP = "192.0.2.2"
HOST_IP_V6 = "2001:db8:fe::1"  # RFC 3849
OUTSIDE_IP_V6 = "2001:db8:fe::2"
CLONE_NEWNET = 0x40000000

_PROBE = r"""
import errno, json, os, select, socket, struct, sys, threading
connections, answers = [], []

def serve(listener):
    while True:
        peer, address = listener.accept()
        threading.Thread(target=echo, args=(peer, address), daemon=True).start()

def echo(peer, address):
    peer.sendall((address[0] + "\n").encode())
    while data := peer.recv(4096):
        peer.sendall(data)

def listen(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()

def connect(address, port, source, patience_s):
    bound = (source, 0) if source else None
    peer = socket.create_connection((address, port), timeout=patience_s, source_address=bound)
    connections.append(peer)
    return peer.makefile().readline().strip()

def exchange(index):
    connections[index].sendall(b"ping")
    return connections[index].recv(4).decode()

def ping(address):
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s:
        s.settimeout(20.0)
        head = struct.pack(">BBHHH", 8, 0, 0, 7, 1)
        checksum = ~sum(struct.unpack(">4H", head)) & 0xFFFF
        s.sendto(head[:2] + struct.pack(">H", checksum) + head[4:], (address, 0))
        while True:
            data = s.recv(256)
            if data[20] in (0, 3):
                return data[20]

def frame(data, bypass=False):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.setsockopt(263, 20, int(bypass))  # SOL_PACKET, PACKET_QDISC_BYPASS
        s.bind(("eth0", 0))
        s.send(bytes.fromhex(data))

def forge(source, source_port, destination, port):
    udp = struct.pack(">HHHH", source_port, port, 8, 0)
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 28, 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as s:
        s.sendto(head + udp, (destination, 0))

def raw_v6(packet, destination):
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as s:
        s.sendto(bytes.fromhex(packet), (destination, 0))

def send_from(port, address, to_port):
    family, anywhere = (socket.AF_INET6, "::") if ":" in address else (socket.AF_INET, "0.0.0.0")
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.bind((anywhere, port))
        s.sendto(b"", (address, to_port))

def run(*argv):
    import subprocess
    subprocess.run(argv, check=True, capture_output=True)

def output(*argv):
    import subprocess
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

def read(path):
    return open(path).read()

print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    try:
        reply = {"value": globals()[order[0]](*order[1:])}
    except (OSError, TimeoutError) as error:
        timed_out = isinstance(error, TimeoutError) and error.errno is None
        reply = {"error": "timeout" if timed_out else errno.errorcode.get(error.errno, str(error))}
    print(json.dumps(reply), flush=True)
"""


class Refused(Exception):
    """An order failed; the text is the errno's name or "timeout"."""


class Probe:
    """A process in a network namespace of its own, in a user namespace too unless `privileged`."""

    def __init__(self, *, privileged: bool = False) -> None:
        flags = ["--net"] if privileged else ["--user", "--map-root-user", "--net"]
        argv = ["unshare", *flags, sys.executable, "-I", "-c", _PROBE]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}
        base = f"/proc/{self._process.pid}/ns"
        self.netns_fd = os.open(f"{base}/net", os.O_RDONLY | os.O_CLOEXEC)
        self.userns_fd = None if privileged else os.open(f"{base}/user", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        for fd in (self.netns_fd, self.userns_fd):
            if fd is not None:
                os.close(fd)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait(10)

    def order(self, *words: Any) -> Any:
        """Have the process call one of its functions; Refused if that fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        if "error" in reply:
            raise Refused(reply["error"])
        return reply["value"]

    def try_connect(self, address: str, port: int, source: str = "", *, patience_s: float = 20.0) -> str:
        """The client address that the server saw, or the error's name."""
        try:
            return str(self.order("connect", address, port, source, patience_s))
        except Refused as refused:
            return str(refused)


class Container(Probe):
    """A probe that has been attached to the server's network."""

    link: LinkPlan
    address: str


class Lab:
    """The host: a namespace with an uplink to an outside machine, and a HostNetwork at work in it.

    Args:
        undo: for what is to be closed.
        pool_v6: of containers; None: they have no IPv6.
    """

    def __init__(self, undo: ExitStack, pool_v6: IPv6Network | None = None) -> None:
        self._undo = undo
        pool = IPv4Network("10.254.0.0/22")
        self.plan = HostPlan(TAG, pool, pool[1], pool_v6)
        self.outside = Probe()
        undo.callback(self.outside.close)
        self._add_uplink()
        self.network = HostNetwork(self.plan)
        undo.callback(self.network.close)
        # A new namespace copies the setting of the host (ip-sysctl.rst, devconf_inherit_init_net), where another
        # server may have turned it on.
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("0")
        if pool_v6 is not None:
            self._add_uplink_v6(pool_v6)
        self.report = self.network.ensure_host(HostPolicy())

    def container(self, number: int, policy: EgressPolicy, *, privileged: bool = False) -> Container:
        """A namespace with address NUMBER of the pool and this policy."""
        probe = Container(privileged=privileged)
        self._undo.callback(probe.close)
        address = self.plan.pool[number]
        probe.link = plan_link(
            self.plan,
            address,
            handle=f"container-{number}",
            mtu_bytes=self.report.mtu_bytes,
            address_v6=self.plan.address_v6(address),
        )
        probe.address = probe.link.address
        self.network.attach_container(self.attachment(probe, policy), probe.netns_fd, probe.userns_fd)
        return probe

    def attachment(self, probe: Container, policy: EgressPolicy) -> Attachment:
        is_privileged = probe.userns_fd is None
        host_side = policy if is_privileged else None
        return Attachment(
            link=probe.link,
            host_rules=host_firewall.compile_attach(self.plan, probe.link, host_side_policy=host_side),
            container_rules="" if is_privileged else self._container_rules(probe, policy),
        )

    def _container_rules(self, probe: Container, policy: EgressPolicy) -> str:
        return firewall.compile_container_ruleset(policy, has_ipv6=bool(probe.link.address_v6))

    def replace(self, probe: Container, policy: EgressPolicy) -> None:
        if probe.userns_fd is None:
            rules = host_firewall.compile_host_side_policy(self.plan, probe.link, policy)
            self.network.replace_host_side_egress(rules)
        else:
            rules = self._container_rules(probe, policy)
            self.network.replace_egress(rules, probe.netns_fd, probe.userns_fd)

    def detach(self, probe: Container, mappings: tuple[PortMapping, ...] = ()) -> None:
        rules = host_firewall.compile_detach(
            self.plan, probe.link, mappings=mappings, has_host_side_policy=probe.userns_fd is None
        )
        self.network.detach_container(probe.link, rules, had_ports=bool(mappings))

    def map_tcp(self, host_port: int, probe: Container, container_port: int) -> PortMapping:
        address = IPv4Address(probe.address)
        mapping = PortMapping(
            PortProtocol.TCP, host_port, address, container_port, self.plan.address_v6(address)
        )
        self.network.map_port(mapping)
        return mapping

    @contextmanager
    def serve(self, address: str, port: int) -> Iterator[None]:
        """A service of the host itself that tells each client the address it came from."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, port), family=family) as listener:
            thread = threading.Thread(target=_greet, args=(listener,))
            thread.start()
            try:
                yield
            finally:
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accept(2) of the thread
                thread.join(10)

    def dropped(self, comment: str) -> int:
        """Packets that chain antispoof has dropped under this comment."""
        listed = nft("-j", "list", "chain", "inet", self.plan.table, "antispoof")
        rules = [entry["rule"] for entry in json.loads(listed)["nftables"] if "rule" in entry]
        counted = [
            int(expression["counter"]["packets"])
            for rule in rules
            if rule.get("comment") == comment
            for expression in rule["expr"]
            if "counter" in expression
        ]
        assert counted, comment
        return sum(counted)

    def _add_uplink_v6(self, pool_v6: IPv6Network) -> None:
        with Rtnetlink() as netlink:
            link = netlink.find_link("uplink")
            assert link is not None
            netlink.set_address(link.index, IPv6Address(HOST_IP_V6), 64)
            netlink.set_route(IPv6Network("::/0"), link_index=link.index, gateway=IPv6Address(OUTSIDE_IP_V6))
        self.outside.order("run", "ip", "address", "add", f"{OUTSIDE_IP_V6}/64", "dev", "eth0", "nodad")
        self.outside.order("run", "ip", "route", "add", str(pool_v6), "via", HOST_IP_V6)
        self.outside.order("listen", OUTSIDE_IP_V6, 80)

    def _add_uplink(self) -> None:
        with Rtnetlink() as netlink:
            netlink.set_link_up(1)
            far = VethEnd("eth0", b"\x02\x00\x00\x00\x00\x02", self.outside.netns_fd)
            netlink.add_veth(VethEnd("uplink", b"\x02\x00\x00\x00\x00\x01"), far, mtu=1400)
            link = netlink.find_link("uplink")
            assert link is not None
            netlink.set_address(link.index, IPv4Address(HOST_IP), 24)
            netlink.set_link_up(link.index)
            netlink.set_route(
                IPv4Network("0.0.0.0/0"), link_index=link.index, gateway=IPv4Address(OUTSIDE_IP)
            )
        self.outside.order("run", "ip", "link", "set", "lo", "up")
        self.outside.order("run", "ip", "addr", "add", f"{OUTSIDE_IP}/24", "dev", "eth0")
        self.outside.order("run", "ip", "link", "set", "eth0", "up")
        self.outside.order("listen", OUTSIDE_IP, 80)


def _greet(listener: socket.socket) -> None:
    while True:
        try:
            peer, address = listener.accept()
        except OSError:
            return
        with peer:
            peer.sendall(f"{address[0]}\n".encode())


def nft(*words: str, text: str | None = None) -> str:
    """Run the nft program: an independent witness of what the library did."""
    return subprocess.run(["nft", *words], input=text, capture_output=True, text=True, check=True).stdout


@contextmanager
def private_netns() -> Iterator[None]:
    """Move this thread into a new network namespace and back; what was made in it vanishes with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        yield
    finally:
        if libc.setns(home, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(home)


@contextmanager
def open_lab(pool_v6: IPv6Network | None = None) -> Iterator[Lab]:
    """A lab for one test; everything it made is gone afterwards."""
    with private_netns(), ExitStack() as undo:
        yield Lab(undo, pool_v6)
