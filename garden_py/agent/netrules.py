"""Act inside a container's network namespace, from a short-lived child process.

    host helper (single-threaded)              child
        fork ────────────────────────────────►  closes every other descriptor
        length, request ─────────────────────►  setns(network namespace), setns(user namespace)
                                                IPv6 off but where asked for, lo up, eth0: address, up, …
                                                nft transaction, counters
                        ◄─────────────────────  length, {"ok": ...} or {"step", "errno", "message"}
        length, request ─────────────────────►  (again, if it comes within a second)
        waitpid, later  ◄─────────────────────  _exit

Joining the user namespace takes from the child every privilege on the host: it is root of the container's
network and of nothing else. Nothing in the container ever holds CAP_NET_ADMIN, so what is set here stays.
setns(2) wants a single-threaded process to join a user namespace, hence the fork and not a thread.

Why the child rests for a moment instead of ending at once: who has asked for counters often asks again, and forking
another child takes longer than the answer. (Policies of a running container are replaced without one:
backend/net/rule_socket.)

Source: setns(2), user_namespaces(7), network_namespaces(7).
"""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, NoReturn

from garden_py.agent.nft import (
    BatchRefused,
    Nft,
    NftError,
    load_library,
    open_batch_socket,
    read_counters,
    send_batch,
)
from garden_py.agent.rtnetlink import Link, Rate, Rtnetlink, RtnetlinkError

CLONE_NEWUSER = 0x10000000  # linux/sched.h
CLONE_NEWNET = 0x40000000
_LENGTH = struct.Struct("=I")
DEFAULT_DEADLINE_S = 20.0
"""Far above the tenths of a second that the largest policy takes; beyond it the kernel is stuck."""
ROUTED_REALM = 103
"""Realm of a container's routes: by it the rules tell packets that IP has sent from frames made by hand."""
REST_S = 1.0
"""How long a child waits for another request; so long it may keep the namespace of a dead container alive."""
MAX_RESTING = 32
LOCAL_ROUTE_S = 10.0


class NetrulesError(Exception):
    """A step inside the namespace failed; the steps before it took effect, the transaction of nft is atomic.

    Attributes:
        step: setns, sysctl, link, nft, counters, deadline or child.
        errno: the kernel's number, 0 if there is none.
        message: the kernel's or libnftables' words.
        refused: of step nft, the number of the message that was refused.
    """

    def __init__(self, step: str, errno_: int, message: str, refused: int = 0) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step
        self.errno = errno_
        self.message = message
        self.refused = refused


@dataclass(frozen=True, slots=True)
class _Child:
    """A forked child and our end of its socket pair."""

    pid: int
    channel: socket.socket


@dataclass(frozen=True, slots=True)
class Tools:
    """What is loaded before the fork, so that a child neither imports nor opens a library, and the children.

    Attributes:
        libc: for setns(2), which Python has since 3.12 only.
        libnftables: from nft.load_library.
        resting: children that wait for another request, by the identity of their network namespace.
        unreaped: pids of all children that have not been waited for.
    """

    libc: ctypes.CDLL
    libnftables: ctypes.CDLL
    resting: dict[tuple[int, int], _Child] = field(default_factory=dict)
    unreaped: list[int] = field(default_factory=list)


def load_tools() -> Tools:
    """Load the C library and libnftables once per process; OSError if one is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
    libc.setns.restype = ctypes.c_int
    return Tools(libc, load_library())


def inject(
    tools: Tools,
    userns_fd: int | None,
    netns_fd: int,
    request: dict[str, Any],
    *,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> dict[str, Any]:
    """Carry out `request` inside the namespaces and return what it found.

    Args:
        tools: from load_tools; whoever made it calls `end_children` in the end.
        userns_fd: the container's user namespace; None for a privileged container, which has none.
        netns_fd: its network namespace.
        request: any of these keys, done in this order:
            "interface": {"name", "address", "gateway", "gateway_mac", "address_v6", "gateway_v6"}: lo up, the
            link up with its addresses, and the routes; without the last two no IPv6; safe to repeat.
            "loopback": True: IPv6 off, lo up, and nothing else.
            "rate": {"name", "bytes_per_s", "burst_bytes"}: what the link may send; 0 bytes per second: all it can.
            "read_rate": NAME: tell that.
            "rules": one transaction of nftables, from pack_batch.
            "counters": True: read the rule counters of table `inet garden`.
        deadline_s: the child is killed after that many seconds.

    Returns:
        {}, {"counters": [{"rule": int | str, "packets": int, "bytes": int}, ...]} or
        {"rate": [bytes per second, burst in bytes] or None}.

    Raises:
        NetrulesError: a step failed, or the deadline passed (errno ETIMEDOUT).
    """
    reap_children(tools)
    deadline = time.monotonic() + deadline_s
    status = os.fstat(netns_fd)
    namespace = (status.st_dev, status.st_ino)
    report = None
    child = tools.resting.pop(namespace, None)
    if child is not None:
        report = _ask_resting(child, request, deadline)
    if child is None or report is None:
        child = _fork_child(tools, userns_fd, netns_fd)
        report = _ask(child, request, deadline)
    # A container whose link is being made needs no second visit soon; one whose rules change may.
    if "interface" in request or "ok" not in report:
        child.channel.close()
    else:
        _let_rest(tools, namespace, child)
    if "ok" in report:
        result: dict[str, Any] = report["ok"]
        return result
    raise NetrulesError(report["step"], report["errno"], report["message"], report["refused"])


def pack_batch(batch: bytes, count: int) -> dict[str, Any]:
    """A transaction for `inject`; see nft.send_batch."""
    return {"batch": base64.b64encode(batch).decode(), "count": count}


def reap_children(tools: Tools, *, wait: bool = False) -> None:
    """Collect children that have ended; with `wait`, also those that are about to."""
    left = []
    for pid in tools.unreaped:
        try:
            if os.waitpid(pid, 0 if wait else os.WNOHANG)[0] == 0:
                left.append(pid)
        except ChildProcessError:
            continue  # somebody who waits for any child of this process was faster
    tools.unreaped[:] = left


def end_children(tools: Tools) -> None:
    """Dismiss resting children and wait for their end; safe to call twice."""
    for child in tools.resting.values():
        child.channel.close()
    tools.resting.clear()
    reap_children(tools, wait=True)


# --- the helper's side ---


def _fork_child(tools: Tools, userns_fd: int | None, netns_fd: int) -> _Child:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _run_child(tools, userns_fd, netns_fd, theirs)
    theirs.close()
    tools.unreaped.append(pid)
    return _Child(pid, ours)


def _let_rest(tools: Tools, namespace: tuple[int, int], child: _Child) -> None:
    tools.resting[namespace] = child
    if len(tools.resting) > MAX_RESTING:
        oldest = next(iter(tools.resting))
        tools.resting.pop(oldest).channel.close()  # it reads the end of the stream, and ends


def _ask_resting(child: _Child, request: dict[str, Any], deadline: float) -> dict[str, Any] | None:
    """Ask a child that may have ended meanwhile: None then, and asking another one is safe."""
    try:
        return _ask(child, request, deadline)
    except NetrulesError as error:
        if error.step != "child":
            raise
        return None


def _ask(child: _Child, request: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Send a request and read the report; on any failure the channel is closed and the child ends."""
    try:
        _send(child.channel, request, deadline)
        return _receive(child.channel, deadline)
    except TimeoutError as error:
        child.channel.close()
        os.kill(child.pid, signal.SIGKILL)  # not reaped yet: its channel is open, so it has not ended
        raise NetrulesError("deadline", errno.ETIMEDOUT, "no answer in time") from error
    except (EOFError, ConnectionError) as error:
        child.channel.close()
        raise NetrulesError("child", 0, "the child ended without a report") from error


# --- both sides ---


def _send(channel: socket.socket, value: dict[str, Any], deadline: float) -> None:
    data = json.dumps(value).encode()
    _set_timeout(channel, deadline)
    channel.sendall(_LENGTH.pack(len(data)) + data)


def _receive(channel: socket.socket, deadline: float) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size, deadline))
    value: dict[str, Any] = json.loads(_receive_exactly(channel, length, deadline))
    return value


def _receive_exactly(channel: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        _set_timeout(channel, deadline)
        chunk = channel.recv(length - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _set_timeout(channel: socket.socket, deadline: float) -> None:
    """Let the next call end at the deadline (monotonic seconds); TimeoutError if that is past."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    channel.settimeout(left_s)


# --- the child's side ---


def _run_child(tools: Tools, userns_fd: int | None, netns_fd: int, channel: socket.socket) -> NoReturn:
    """Serve requests until none comes for REST_S, and end without running the parent's exit handlers."""
    try:
        _close_all_but({channel.fileno(), netns_fd} | ({userns_fd} if userns_fd is not None else set()))
        inside: _Inside | None = None
        while True:
            request = _receive(channel, time.monotonic() + REST_S)
            try:
                inside = inside or _Inside(tools, userns_fd, netns_fd)
                report: dict[str, Any] = {"ok": inside.act(request)}
            except NetrulesError as error:
                report = {
                    "step": error.step,
                    "errno": error.errno,
                    "message": error.message,
                    "refused": error.refused,
                }
            except Exception as error:  # noqa: BLE001 - a bug of ours, of which nobody would hear otherwise
                report = {
                    "step": "child",
                    "errno": 0,
                    "message": f"{type(error).__name__}: {error}",
                    "refused": 0,
                }
            _send(channel, report, time.monotonic() + REST_S)
    except (TimeoutError, EOFError, ConnectionError):
        os._exit(0)  # dismissed
    finally:
        # Not even a bug may let two copies of the parent's program run on. The parent reads the end of the
        # stream and says so.
        os._exit(1)


def _close_all_but(kept: set[int]) -> None:
    """Close what the parent had open, other children's channels among it; 0 to 2 stay."""
    low = 3
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


class _Inside:
    """A child in the namespaces, which it joins."""

    def __init__(self, tools: Tools, userns_fd: int | None, netns_fd: int) -> None:
        self._libnftables = tools.libnftables
        self._nft: Nft | None = None
        _setns(tools, netns_fd, CLONE_NEWNET)
        # Between the two steps: the socket must belong to this network namespace, and only root of the host may
        # give it a send buffer for a whole policy.
        self._rules = open_batch_socket(DEFAULT_DEADLINE_S)
        if userns_fd is not None:
            _setns(tools, userns_fd, CLONE_NEWUSER)

    def act(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out a request; see `inject`."""
        if "interface" in request:
            _configure_interface(request["interface"])
        if "loopback" in request:
            _bring_up_loopback()
        if "rate" in request:
            _try_link(partial(_set_rate, request["rate"]))
        if "read_rate" in request:
            return {"rate": _try_link(partial(_read_rate, request["read_rate"]))}
        if "rules" in request:
            self._apply(**request["rules"])
        return {"counters": self._count()} if request.get("counters") else {}

    def _apply(self, batch: str, count: int) -> None:
        try:
            send_batch(self._rules, base64.b64decode(batch), count)
        except BatchRefused as error:
            raise NetrulesError("nft", error.errno, os.strerror(error.errno), error.number) from error
        except OSError as error:
            raise NetrulesError("nft", error.errno or 0, f"no answer: {error}") from error

    def _count(self) -> list[dict[str, int | str]]:
        # Made when it is needed: it takes as long as all the rest of a child.
        self._nft = self._nft or Nft(self._libnftables)
        try:
            return read_counters(self._nft.run_json("list table inet garden"))
        except NftError as error:
            raise NetrulesError("counters", 0, error.message) from error


def _setns(tools: Tools, fd: int, kind: int) -> None:
    if tools.libc.setns(fd, kind) != 0:
        code = ctypes.get_errno()
        raise NetrulesError("setns", code, os.strerror(code))


def _configure_interface(interface: dict[str, Any]) -> None:
    try:
        if interface.get("address_v6"):
            _enable_ipv6(interface["name"])
        else:
            _disable_ipv6()
    except OSError as error:
        raise NetrulesError("sysctl", error.errno or 0, str(error)) from error
    try:
        with Rtnetlink() as netlink:
            _bring_up(netlink, interface)
    except RtnetlinkError as error:
        raise NetrulesError("link", error.errno or 0, str(error)) from error


def _try_link(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except RtnetlinkError as error:
        raise NetrulesError("link", error.errno or 0, str(error)) from error


def _set_rate(wanted: dict[str, Any]) -> None:
    with Rtnetlink() as netlink:
        link = _find_link(netlink, wanted["name"])
        if wanted["bytes_per_s"]:
            netlink.set_rate(link.index, Rate(wanted["bytes_per_s"], wanted["burst_bytes"]))
        else:
            netlink.clear_rate(link.index)


def _read_rate(name: str) -> list[int] | None:
    with Rtnetlink() as netlink:
        rate = netlink.rate(_find_link(netlink, name).index)
    return None if rate is None else [rate.bytes_per_s, rate.burst_bytes]


def _find_link(netlink: Rtnetlink, name: str) -> Link:
    link = netlink.find_link(name)
    if link is None:
        raise RtnetlinkError(errno.ENODEV, f"link {name}")
    return link


def _bring_up_loopback() -> None:
    try:
        _disable_ipv6()
        with Rtnetlink() as netlink:
            netlink.set_link_up(1)
    except OSError as error:  # RtnetlinkError is one
        raise NetrulesError("link", error.errno or 0, str(error)) from error


def _disable_ipv6() -> None:
    """No IPv6 in this namespace but ::1 on lo. /proc/sys/net is the namespace's of who opens it, proc(5)."""
    if not os.path.isdir("/proc/sys/net/ipv6"):
        return  # a kernel without IPv6
    for link, value in (("default", b"1"), ("all", b"1"), ("lo", b"0")):
        _write(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6", value)


def _enable_ipv6(link: str) -> None:
    """IPv6 on one link, with the addresses that it is given and no others, and on lo; nobody's advice is taken."""
    _write("/proc/sys/net/ipv6/conf/default/disable_ipv6", b"1")
    _write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", b"0")
    # addr_gen_mode 1: no link-local address, which nobody could be reached by (ip-sysctl.rst).
    settings = (
        ("addr_gen_mode", b"1"),
        ("accept_ra", b"0"),
        ("accept_redirects", b"0"),
        ("disable_ipv6", b"0"),
    )
    for name, value in settings:
        _write(f"/proc/sys/net/ipv6/conf/{link}/{name}", value)


def _bring_up(netlink: Rtnetlink, interface: dict[str, Any]) -> None:
    netlink.set_link_up(1)  # lo is always the first link of a namespace
    link = _find_link(netlink, interface["name"])
    address, gateway = IPv4Address(interface["address"]), IPv4Address(interface["gateway"])
    netlink.set_address(link.index, address, 32)
    netlink.set_link_up(link.index)
    # Nobody but the host is at the other end; a fixed neighbour saves the ARP round and cannot be forged.
    mac = bytes.fromhex(interface["gateway_mac"].replace(":", ""))
    netlink.set_neighbour(link.index, gateway, mac)
    netlink.set_route(IPv4Network(gateway), link_index=link.index, realm=ROUTED_REALM)
    everywhere = IPv4Network("0.0.0.0/0")
    netlink.set_route(everywhere, link_index=link.index, gateway=gateway, realm=ROUTED_REALM)
    if interface.get("address_v6"):
        gateway_v6 = IPv6Address(interface["gateway_v6"])
        netlink.set_address(link.index, IPv6Address(interface["address_v6"]), 128)
        netlink.set_neighbour(link.index, gateway_v6, mac)
        netlink.set_route(IPv6Network(gateway_v6), link_index=link.index)
        netlink.set_route(IPv6Network("::/0"), link_index=link.index, gateway=gateway_v6)
        _await_local(netlink, IPv6Address(interface["address_v6"]))


def _await_local(netlink: Rtnetlink, address: IPv6Address) -> None:
    """Wait until answers to an address arrive: its route is made by a worker of the kernel (addrconf_dad_start)."""
    deadline = time.monotonic() + LOCAL_ROUTE_S
    while not netlink.is_local(address):
        if time.monotonic() > deadline:
            raise RtnetlinkError(errno.ETIMEDOUT, f"local route {address}")
        time.sleep(0.0005)


def _write(path: str, value: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
