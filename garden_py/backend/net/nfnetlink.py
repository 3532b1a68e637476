"""nfnetlink: sockets, and requests of the subsystems that libnftables does not speak with.

Source: netlink(7); linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from threading import Thread

from garden_py.agent.nft import open_netfilter_socket
from garden_py.agent.rtnetlink import NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, pack_message, split_messages

_RECEIVE_BYTES = 1 << 17
_CLONE_NEWNET = 0x40000000  # linux/sched.h


def open_socket_in(netns_fd: int | None, timeout_s: float) -> socket.socket:
    """As open_netfilter_socket, of another network namespace; None: the caller's own.

    Raises:
        OSError: it cannot be joined.
    """
    if netns_fd is None:
        return open_netfilter_socket(timeout_s)
    outcome: list[socket.socket | OSError] = []

    def visit() -> None:
        # A thread of its own, which ends in the namespace that it has gone to: nobody has to come back.
        try:
            _join(netns_fd)
            outcome.append(open_netfilter_socket(timeout_s))
        except OSError as error:
            outcome.append(error)

    visitor = Thread(target=visit, name="nfnetlink")
    visitor.start()
    visitor.join()
    found = outcome[0]
    if isinstance(found, OSError):
        raise found
    return found


def _join(netns_fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(netns_fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")


def pack_request(
    subsystem: int,
    message: int,
    body: bytes,
    *,
    flags: int,
    family: int = socket.AF_UNSPEC,
    resource: int = 0,
    sequence: int = 1,
) -> bytes:
    """One request; several can be sent together.

    Args:
        subsystem: NFNL_SUBSYS_*.
        message: of that subsystem.
        body: its attributes.
        flags: NLM_F_* besides REQUEST.
        family: AF_*.
        resource: what the subsystem takes it for, such as a group.
        sequence: that its answer has.
    """
    payload = struct.pack(">BBH", family, 0, resource) + body
    return pack_message(subsystem << 8 | message, flags | NLM_F_REQUEST, sequence, payload)


def read_answers(
    opened: socket.socket, sequence: int = 1, *, ignored: tuple[int, ...] = ()
) -> Iterator[bytes]:
    """Payloads of what the kernel answers, until it has acknowledged or listed all of a request.

    Args:
        opened: by open_netfilter_socket.
        sequence: of the request. Those before it answer here, too, if they are refused.
        ignored: errnos that are none.

    Raises:
        OSError: refused.
    """
    while True:
        for kind, _flags, answered, payload in split_messages(opened.recv(_RECEIVE_BYTES)):
            if kind not in (NLMSG_DONE, NLMSG_ERROR):
                yield payload
                continue
            (code,) = struct.unpack_from("=i", payload)
            if code and -code not in ignored:
                raise OSError(-code, os.strerror(-code))
            if answered == sequence:
                return
