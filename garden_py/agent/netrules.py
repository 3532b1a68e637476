"""Act inside a container's network namespace, from a child that is gone a few milliseconds later.

    host helper (single-threaded)              child
        fork ────────────────────────────────►  setns(network namespace), setns(user namespace)
                                                IPv6 off, lo up, eth0: address, up, neighbour, routes
                                                nft transaction, counters
        read the pipe  ◄──────────────────────  length, {"ok": ...} or {"step", "errno", "message"}
        waitpid, later ◄──────────────────────  _exit

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
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Any, NoReturn

from garden_py.agent.nft import Nft, NftError, load_library, read_counters
from garden_py.agent.rtnetlink import Rtnetlink, RtnetlinkError

CLONE_NEWUSER = 0x10000000  # linux/sched.h
CLONE_NEWNET = 0x40000000
_LENGTH = struct.Struct("=I")
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
    """What is loaded before the fork, so that a child neither imports nor opens a library.

    Attributes:
        libc: for setns(2), which Python has since 3.12 only.
        libnftables: from nft.load_library.
        finishing: pids of children that have reported and not been waited for.
    """

    libc: ctypes.CDLL
    libnftables: ctypes.CDLL
    finishing: list[int] = field(default_factory=list)


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
    reap_finished(tools)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_child(partial(_act, tools, userns_fd, netns_fd, request), writer)
    os.close(writer)
    tools.finishing.append(pid)
    try:
        report = _read_report(reader, time.monotonic() + deadline_s)
    except TimeoutError as error:
        os.kill(pid, signal.SIGKILL)
        raise NetrulesError("deadline", errno.ETIMEDOUT, f"no answer within {deadline_s} s") from error
    finally:
        os.close(reader)
    if "ok" in report:
        result: dict[str, Any] = report["ok"]
        return result
    raise NetrulesError(report["step"], report["errno"], report["message"])


def reap_finished(tools: Tools, *, wait: bool = False) -> None:
    """Collect children that have ended; `wait` for those that are still ending.

    Called by each `inject` for the ones before it. A child has done its work when it reports; its end takes
    some 15 ms more, because closing an nfnetlink socket waits until the kernel has freed the replaced rules
    (a grace period of RCU, see nft_rcv_nl_event in net/netfilter/nf_tables_api.c). Nobody needs to wait for
    that, nor for a child that is stuck in the kernel.
    """
    still_ending = []
    for pid in tools.finishing:
        try:
            if os.waitpid(pid, 0 if wait else os.WNOHANG)[0] == 0:
                still_ending.append(pid)
        except ChildProcessError:
            continue  # somebody who waits for any child of this process was faster
    tools.finishing[:] = still_ending


def _read_report(reader: int, deadline: float) -> dict[str, Any]:
    """The child's report; TimeoutError if the deadline (monotonic seconds) passes first."""
    (length,) = _LENGTH.unpack(_read_exactly(reader, _LENGTH.size, deadline))
    report: dict[str, Any] = json.loads(_read_exactly(reader, length, deadline))
    return report


def _read_exactly(reader: int, length: int, deadline: float) -> bytes:
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    data = b""
    while len(data) < length:
        left_ms = int((deadline - time.monotonic()) * 1000)
        if left_ms <= 0 or not poller.poll(left_ms):
            raise TimeoutError
        chunk = os.read(reader, length - len(data))
        if not chunk:
            raise NetrulesError("child", 0, "the child ended without a report")
        data += chunk
    return data


def _run_child(act: Callable[[], dict[str, Any]], writer: int) -> NoReturn:
    """Report what `act` gives or raises, and end without running the parent's exit handlers."""
    report: dict[str, Any] = {"step": "child", "errno": 0, "message": "died of an unexpected exception"}
    try:
        report = {"ok": act()}
    except NetrulesError as error:
        report = {"step": error.step, "errno": error.errno, "message": error.message}
    finally:
        # `finally` and _exit, so that not even a bug lets two copies of the parent's program run on.
        data = json.dumps(report).encode()
        data = _LENGTH.pack(len(data)) + data
        while data:
            data = data[os.write(writer, data) :]
        os._exit(0)


def _act(tools: Tools, userns_fd: int | None, netns_fd: int, request: dict[str, Any]) -> dict[str, Any]:
    _setns(tools, netns_fd, CLONE_NEWNET)
    # Between the two setns: the socket must belong to this network namespace, and only root of the host may
    # give it a send buffer for a whole policy. It is closed by _exit, after the report (see reap_finished).
    nft = Nft(tools.libnftables)
    if userns_fd is not None:
        _setns(tools, userns_fd, CLONE_NEWUSER)
    if "interface" in request:
        _configure_interface(request["interface"])
    if "nft" in request:
        _try_nft("nft", lambda: nft.run(request["nft"]))
    if not request.get("counters"):
        return {}
    listed = _try_nft("counters", lambda: nft.run_json("list table inet garden"))
    return {"counters": read_counters(listed)}


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
