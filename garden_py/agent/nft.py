"""nftables in-process: one call, one transaction, through libnftables; or as messages that somebody else has made.

Running the `nft` program costs a fork, an exec and the loading of its libraries for each change. The library
is the same parser and the same netlink code without that. Text in, text or JSON out, so everything that can
be said in an nft file can be said here, and what was said can be pasted into `nft -f -` to try again.

Source: libnftables(3), nft(8).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import socket
import struct
from types import TracebackType
from typing import Any

from garden_py.agent.rtnetlink import NLMSG_ERROR, split_messages

SONAME = "libnftables.so.1"
_OUTPUT_JSON = 1 << 4  # NFT_CTX_OUTPUT_JSON, libnftables(3)
_NETLINK_NETFILTER = 12  # linux/netlink.h
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_SEND_BUFFER_BYTES = 64 << 20  # a cap, not an allocation; 10,000 rules need about 5 MiB
_RECEIVE_BYTES = 1 << 17


class NftError(Exception):
    """The kernel or the parser refused a transaction; nothing of it was applied.

    Attributes:
        message: the first line of what libnftables says, with file position and the kernel's reason.
        commands: the text that was refused, to be replayed with `nft -f -`.
    """

    def __init__(self, message: str, commands: str) -> None:
        super().__init__(message)
        self.message = message
        self.commands = commands


def load_library() -> ctypes.CDLL:
    """Load and declare libnftables. OSError if the host lacks it (Debian package `libnftables1`)."""
    library = ctypes.CDLL(SONAME, use_errno=True)
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = ctypes.c_void_p
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_int
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_ctx_output_set_flags.restype = None
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_run_cmd_from_buffer.restype = ctypes.c_int
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_free.restype = None
    return library


class Nft:
    """A libnftables context, bound to the network namespace in which it was made (its netlink socket is).

    After a setns(2) into a network namespace make a new one; to send much, before one into a user namespace, since only
    root of the host may raise the send buffer. Not for use by two threads at once.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._library = library or load_library()
        socket_fd = _next_fd()
        self._context = self._library.nft_ctx_new(0)
        if not self._context:
            raise MemoryError("nft_ctx_new")
        _raise_send_buffer_of(socket_fd)
        for prepare in (self._library.nft_ctx_buffer_output, self._library.nft_ctx_buffer_error):
            if prepare(self._context) != 0:
                self.close()
                raise MemoryError("nft_ctx_buffer_output")

    def __enter__(self) -> Nft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and its socket; safe to call twice."""
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None

    def run(self, commands: str) -> str:
        """Apply `commands` as one transaction, or list something; return what `nft` would print.

        Raises:
            NftError: refused; nothing was changed.
        """
        self._library.nft_ctx_output_set_flags(self._context, 0)
        return self._run(commands)

    def run_json(self, command: str) -> list[dict[str, Any]]:
        """Run a listing command and return the objects of libnftables-json(5), without the metainfo one."""
        self._library.nft_ctx_output_set_flags(self._context, _OUTPUT_JSON)
        objects = json.loads(self._run(command))["nftables"]
        return [o for o in objects if "metainfo" not in o]

    def _run(self, commands: str) -> str:
        status = self._library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output: bytes = self._library.nft_ctx_get_output_buffer(self._context) or b""
        errors: bytes = self._library.nft_ctx_get_error_buffer(self._context) or b""
        if status != 0:
            text = errors.decode(errors="replace").strip()
            raise NftError(text.splitlines()[0] if text else f"status {status}", commands)
        return output.decode(errors="replace")


def _next_fd() -> int:
    """The descriptor that open(2) or socket(2) will return next: the lowest that is free."""
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return fd


def _raise_send_buffer_of(socket_fd: int) -> None:
    """The library does not tell the descriptor of its context's socket; we know it, and make sure of it."""
    with socket.socket(fileno=os.dup(socket_fd)) as netlink:
        if (netlink.family, netlink.proto) != (socket.AF_NETLINK, _NETLINK_NETFILTER):
            raise OSError(errno.ENOTSOCK, "libnftables did not open its netlink socket first")
        raise_send_buffer(netlink)


def raise_send_buffer(netlink: socket.socket) -> None:
    """Let a socket send a transaction of any size in the one message that makes it atomic.

    libnftables tries this itself when it sends, but SO_SNDBUFFORCE (socket(7)) needs CAP_NET_ADMIN in the
    initial user namespace, and without it a policy of some 1,000 rules fails with EMSGSIZE.
    """
    try:
        netlink.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
    except PermissionError:
        return  # a development run without root: small transactions work


class BatchRefused(Exception):
    """The kernel refused a transaction; nothing of it was applied.

    Attributes:
        number: of the message that it refused, from 1; 0: the transaction as such.
        errno: why.
    """

    def __init__(self, number: int, errno_: int) -> None:
        super().__init__(f"message {number}: {os.strerror(errno_)}")
        self.number = number
        self.errno = errno_


def open_netfilter_socket(timeout_s: float) -> socket.socket:
    """Of the network namespace of the calling thread; an answer that takes longer is a TimeoutError."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    opened.settimeout(timeout_s)
    return opened


def open_batch_socket(timeout_s: float) -> socket.socket:
    """One for transactions of any size; see Nft for when to open it."""
    opened = open_netfilter_socket(timeout_s)
    raise_send_buffer(opened)
    return opened


def send_batch(opened: socket.socket, batch: bytes, count: int) -> None:
    """Have the kernel carry out a transaction.

    It has answered when it has taken the messages: with an error for each that it refuses, for the last in any case.

    Args:
        opened: by open_batch_socket, or another netfilter socket.
        batch: its messages; their sequence numbers are 1 to `count`, and the last one asks for an answer.
        count: see there.

    Raises:
        BatchRefused: nothing was changed.
        OSError: it gave no answer.
    """
    opened.send(batch)
    is_done = False
    while not is_done:
        for kind, _flags, sequence, payload in split_messages(opened.recv(_RECEIVE_BYTES)):
            if kind != NLMSG_ERROR:
                continue
            (code,) = struct.unpack_from("=i", payload)
            if code:
                raise BatchRefused(sequence, -code)
            is_done = sequence == count


def is_missing(error: NftError) -> bool:
    """Whether the refusal was ENOENT: the table, chain or element does not exist."""
    return "No such file or directory" in error.message


def is_taken(error: NftError) -> bool:
    """Whether the refusal was EEXIST: the key of a map stands for something else."""
    return "File exists" in error.message


def read_counters(objects: list[dict[str, Any]]) -> list[dict[str, int | str]]:
    """The counters of the commented rules in a JSON listing, in the order of the chain.

    Returns:
        `{"rule": INDEX or "default"..., "packets": N, "bytes": N}`; a rule that compiled to several nft rules
        is summed up.
    """
    sums: dict[int | str, list[int]] = {}
    for entry in objects:
        rule = entry.get("rule")
        if rule is None or "comment" not in rule:
            continue
        numbered = re.fullmatch(r"rule ([0-9]+)", rule["comment"])
        key: int | str = int(numbered[1]) if numbered else str(rule["comment"])
        for expression in rule["expr"]:
            counter = expression.get("counter")
            if isinstance(counter, dict):
                total = sums.setdefault(key, [0, 0])
                total[0] += counter["packets"]
                total[1] += counter["bytes"]
    return [{"rule": key, "packets": packets, "bytes": size} for key, (packets, size) in sums.items()]
