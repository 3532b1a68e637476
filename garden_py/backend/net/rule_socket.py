"""Sockets that rules are replaced by, one for each network namespace, and when they are closed.

A socket acts on the namespace that it was made in, and on nothing else. What is sent by it are our own messages, and
no answer but errors is read; so the worker sends them itself, while what has to act inside is done by a child that has
no privilege outside (agent/netrules).

Closing a socket waits, with the namespace's nftables locked, until the kernel has freed the rules just replaced (a
grace period of RCU, 10 to 20 ms; nft_rcv_nl_event in net/netfilter/nf_tables_api.c). So it rests for a second first, in
which further changes use it.

Source: netlink(7); linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import os
import socket
import time

from garden_py.agent.nft import BatchRefused, NftError, raise_send_buffer, send_batch
from garden_py.backend.net.nfnetlink import open_socket_in
from garden_py.backend.net.nftables import Transaction, UnknownText, encode

REST_S = 1.0
"""How long a socket is kept; so long it may keep the namespace of a dead container alive."""
MAX_RESTING = 32
_TIMEOUT_S = 10.0


class RuleSockets:
    """The sockets of one worker; `close_rested` now and then, `close` in the end."""

    def __init__(self) -> None:
        self._resting: dict[tuple[int, int], tuple[float, socket.socket]] = {}

    def run(self, text: str, netns_fd: int | None = None) -> None:
        """Apply `text` as one transaction in a network namespace; without `netns_fd` in the caller's own.

        Raises:
            NftError: refused; nothing was changed.
        """
        transaction = encode_rules(text)
        namespace = _identify(netns_fd)
        _, opened = self._resting.pop(namespace, (0.0, None))
        try:
            if opened is None:
                opened = open_rule_socket(netns_fd)
        except OSError as error:
            raise NftError(f"no socket: {error.strerror}", text) from error
        try:
            send(opened, transaction, text)
        except BaseException:
            opened.close()
            raise
        self._resting[namespace] = (time.monotonic(), opened)
        self._close_surplus()

    @property
    def has_resting(self) -> bool:
        """Whether `close_rested` will have something to do."""
        return bool(self._resting)

    def close_rested(self) -> None:
        """Close those that nobody has used for REST_S."""
        oldest_kept = time.monotonic() - REST_S
        while self._resting and next(iter(self._resting.values()))[0] <= oldest_kept:
            self._close_oldest()

    def close(self) -> None:
        """Close all; safe to call twice."""
        while self._resting:
            self._close_oldest()

    def _close_surplus(self) -> None:
        while len(self._resting) > MAX_RESTING:
            self._close_oldest()

    def _close_oldest(self) -> None:
        self._resting.pop(next(iter(self._resting)))[1].close()


def open_rule_socket(netns_fd: int | None = None) -> socket.socket:
    """A socket for transactions of any size; of the caller's own namespace without `netns_fd`."""
    opened = open_socket_in(netns_fd, _TIMEOUT_S)
    raise_send_buffer(opened)
    return opened


def send(opened: socket.socket, transaction: Transaction, text: str) -> None:
    """Have the kernel carry out a transaction.

    Args:
        opened: by open_rule_socket.
        transaction: of nftables.encode.
        text: that it was made from, for who is told of the failure.

    Raises:
        NftError: refused; nothing was changed.
    """
    try:
        send_batch(opened, transaction.batch, len(transaction.lines))
    except BatchRefused as error:
        raise NftError(f"{transaction.line(error.number)}: {os.strerror(error.errno)}", text) from error
    except OSError as error:
        raise NftError(f"no answer: {error.strerror or error}", text) from error


def _identify(netns_fd: int | None) -> tuple[int, int]:
    if netns_fd is None:
        return (0, 0)
    status = os.fstat(netns_fd)
    return (status.st_dev, status.st_ino)


def encode_rules(text: str) -> Transaction:
    """As nftables.encode; NftError for what that does not know."""
    try:
        return encode(text)
    except UnknownText as error:
        raise NftError(str(error), text) from error
