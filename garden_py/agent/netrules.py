"""Act inside a container's network namespace, from a child that is gone a few milliseconds later.

    host helper (single-threaded)              child
        fork ────────────────────────────────►  setns(user namespace), setns(network namespace)
                                                IPv6 off, lo up, eth0: address, up, neighbour, routes
                                                nft transaction, counters
        read the pipe until it ends  ◄────────  {"ok": ...} or {"step", "errno", "message"}
        waitpid                      ◄────────  _exit

Joining the user namespace takes from the child every privilege on the host: it is root of the container's
network and of nothing else. Nothing in the container ever holds CAP_NET_ADMIN, so what is set here stays.
setns(2) wants a single-threaded process to join a user namespace, hence the fork and not a thread.

Source: setns(2), user_namespaces(7), network_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from garden_py.agent.nft import Nft, NftError, load_library, read_counters
from garden_py.agent.rtnetlink import Rtnetlink, RtnetlinkError

CLONE_NEWUSER = 0x10000000  # linux/sched.h
CLONE_NEWNET = 0x40000000
DEFAULT_DEADLINE_S = 20.0
"""Far above the tenths of a second that the largest policy takes; beyond it the kernel is stuck."""


class NetrulesError(Exception):
    """A step inside the namespace failed; the steps before it took effect, the transaction of nft is atomic.

    Attributes:
        step: setns, sysctl, link, nft, counters, deadline or child.
        errno: the kernel's number, 0 if there is none.
        message: the kernel's or libnftables' words.
    """

    def __init__(self, step: str, errno_: int, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step
        self.errno = errno_
        self.message = message


@dataclass(frozen=True, slots=True)
class Tools:
    """What is loaded before the fork, so that a child neither imports nor opens a library."""

    libc: ctypes.CDLL
    libnftables: ctypes.CDLL


def load_tools() -> Tools:
    """Load the C library and libnftables once per process; OSError if one is missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
    libc.setns.restype = ctypes.c_int
    return Tools(libc, load_library())


def inject(
    userns_fd: int | None,
    netns_fd: int,
    request: dict[str, Any],
    *,
    tools: Tools | None = None,
    deadline_s: float = DEFAULT_DEADLINE_S,
) -> dict[str, Any]:
    """Carry out `request` inside the namespaces and return what it found.

    Args:
        userns_fd: the container's user namespace; None for a privileged container, which has none.
        netns_fd: its network namespace.
        request: any of these keys, done in this order:
            "interface": {"name", "mac"?, "address", "gateway", "gateway_mac"}: IPv6 off, lo up, the link up
            with its address, and the routes; safe to repeat.
            "nft": text of one transaction.
            "counters": True: read the rule counters of table `inet garden`.
        tools: from load_tools; loaded on the spot if None.
        deadline_s: the child is killed after that many seconds.

    Returns:
        {} or {"counters": [{"rule": int | str, "packets": int, "bytes": int}, ...]}.

    Raises:
        NetrulesError: a step failed, or the deadline passed (errno ETIMEDOUT).
    """
    tools = tools or load_tools()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_child(lambda: _act(tools, userns_fd, netns_fd, request), writer)
    os.close(writer)
    try:
        # The pipe is drained before waitpid(2): a child blocked in write(2) would never exit.
        report = _read_all(reader, time.monotonic() + deadline_s)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)  # it has reported and is only exiting, or must not go on
        os.waitpid(pid, 0)
    if report is None:
        raise NetrulesError("deadline", errno.ETIMEDOUT, f"no answer within {deadline_s} s")
    return _parse_report(report)


def _parse_report(report: bytes) -> dict[str, Any]:
    if not report:
        raise NetrulesError("child", 0, "the child ended without a report")
    value: dict[str, Any] = json.loads(report)
    if "ok" in value:
        result: dict[str, Any] = value["ok"]
        return result
    raise NetrulesError(value["step"], value["errno"], value["message"])


def _read_all(reader: int, deadline: float) -> bytes | None:
    """Everything up to the end of the pipe, or None if the deadline (monotonic seconds) passes first."""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    chunks: list[bytes] = []
    while True:
        left_ms = int((deadline - time.monotonic()) * 1000)
        if left_ms <= 0 or not poller.poll(left_ms):
            return None
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def _run_child(act: Callable[[], dict[str, Any]], writer: int) -> None:
    """Report what `act` gives or raises, and end without running the parent's exit handlers."""
    report: dict[str, Any] = {"step": "child", "errno": 0, "message": "died of an unexpected exception"}
    try:
        report = {"ok": act()}
    except NetrulesError as error:
        report = {"step": error.step, "errno": error.errno, "message": error.message}
    finally:
        # `finally` and _exit, so that not even a bug lets two copies of the parent's program run on.
        data = json.dumps(report).encode()
        while data:
            data = data[os.write(writer, data) :]
        os._exit(0)


def _act(tools: Tools, userns_fd: int | None, netns_fd: int, request: dict[str, Any]) -> dict[str, Any]:
    # The user namespace first: being root of the network namespace's owner is what lets us join that.
    if userns_fd is not None:
        _setns(tools, userns_fd, CLONE_NEWUSER)
    _setns(tools, netns_fd, CLONE_NEWNET)
    if "interface" in request:
        _configure_interface(request["interface"])
    result: dict[str, Any] = {}
    if "nft" in request or request.get("counters"):
        with Nft(tools.libnftables) as nft:  # made after setns: its socket belongs to this namespace
            if "nft" in request:
                _try_nft("nft", lambda: nft.run(request["nft"]))
            if request.get("counters"):
                listed = _try_nft("counters", lambda: nft.run_json("list table inet garden"))
                result["counters"] = read_counters(listed)
    return result


def _try_nft(step: str, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except NftError as error:
        raise NetrulesError(step, 0, error.message) from error


def _setns(tools: Tools, fd: int, kind: int) -> None:
    if tools.libc.setns(fd, kind) != 0:
        code = ctypes.get_errno()
        raise NetrulesError("setns", code, os.strerror(code))


def _configure_interface(interface: dict[str, Any]) -> None:
    try:
        _disable_ipv6()
    except OSError as error:
        raise NetrulesError("sysctl", error.errno or 0, str(error)) from error
    try:
        with Rtnetlink() as netlink:
            _bring_up(netlink, interface)
    except RtnetlinkError as error:
        raise NetrulesError("link", error.errno or 0, str(error)) from error


def _disable_ipv6() -> None:
    """No IPv6 in this namespace but ::1 on lo. /proc/sys/net is the namespace's of who opens it, proc(5)."""
    if not os.path.isdir("/proc/sys/net/ipv6"):
        return  # a kernel without IPv6
    for link, value in (("default", b"1"), ("all", b"1"), ("lo", b"0")):
        _write(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6", value)


def _bring_up(netlink: Rtnetlink, interface: dict[str, Any]) -> None:
    netlink.set_link_up(1)  # lo is always the first link of a namespace
    link = netlink.find_link(interface["name"])
    if link is None:
        raise RtnetlinkError(errno.ENODEV, f"link {interface['name']}")
    address, gateway = IPv4Address(interface["address"]), IPv4Address(interface["gateway"])
    netlink.set_address(link.index, address, 32)
    netlink.set_link_up(link.index)
    # Nobody but the host is at the other end; a fixed neighbour saves the ARP round and cannot be forged.
    netlink.set_neighbour(link.index, gateway, bytes.fromhex(interface["gateway_mac"].replace(":", "")))
    netlink.set_route(IPv4Network(gateway), link_index=link.index)
    netlink.set_route(IPv4Network("0.0.0.0/0"), link_index=link.index, gateway=gateway)


def _write(path: str, value: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
