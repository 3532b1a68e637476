"""What the rules tell of connections, brought to the container that tried to make them.

An unprivileged container's rules are in its own network namespace, and so is the socket that hears of them. The host's
table, which has the rules of privileged containers and refuses what no container may do, tells on one socket for all.
Only a policy that can refuse or log anything is listened to.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from garden_py.backend.host.threads import in_thread
from garden_py.backend.net.firewall import ALLOW_PREFIX, CAUSE_MARKS, LOG_GROUP, can_refuse
from garden_py.backend.net.nflog import LoggedPacket, open_group, parse_flow, parse_messages
from garden_py.model.connection import Connection
from garden_py.model.netrule import AddressRange, Cause, Decision, EgressPolicy, RuleAction
from garden_py.observe.apart import apart

log = structlog.get_logger()
_RECEIVE_BYTES = 65536
_RECEIVES_AT_ONCE = 4
_CAUSES = {mark: cause for cause, mark in CAUSE_MARKS.items()}


class ConnectionLog:
    """The sockets of one server.

    Args:
        report: told of each connection: (handle, connection).
        owner_of: the container that has a link of the host, by the link's name; empty for none.
    """

    def __init__(self, report: Callable[[str, Connection], None], owner_of: Callable[[str], str]) -> None:
        self._report = report
        self._owner_of = owner_of
        self._sockets: dict[str, socket.socket] = {}

    async def watch_host(self, group: int) -> None:
        """Listen to the host's table. Without it, what that refuses is counted only, and the log says so."""
        try:
            opened = await in_thread(partial(open_group, group))
        except OSError as error:
            log.warning("network.no_connection_events", group=group, error=str(error))
            return
        self._add("", opened)

    async def watch(
        self, handle: str, netns_path: str, policy: EgressPolicy, denied: Sequence[AddressRange]
    ) -> None:
        """Listen to a container's own rules if they can have anything to say; again is fine.

        Raises:
            OSError: its namespace cannot be entered.
        """
        if handle in self._sockets or not can_tell(policy, denied):
            return
        opened = await in_thread(partial(_open_in, netns_path))
        if handle in self._sockets:
            opened.close()
            return
        self._add(handle, opened)

    def unwatch(self, handle: str) -> None:
        """Stop; a socket would keep the namespace. Absent is fine."""
        opened = self._sockets.pop(handle, None)
        if opened is not None:
            asyncio.get_running_loop().remove_reader(opened)
            opened.close()

    def close(self) -> None:
        """Stop listening to all."""
        for handle in list(self._sockets):
            self.unwatch(handle)

    def _add(self, handle: str, opened: socket.socket) -> None:
        self._sockets[handle] = opened
        apart(asyncio.get_running_loop().add_reader, opened, self._readable, handle, opened)

    def _readable(self, handle: str, opened: socket.socket) -> None:
        for _ in range(_RECEIVES_AT_ONCE):
            try:
                data = opened.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:  # ENOBUFS: more came than fits; the counters know
                log.debug("network.connection_events_lost", handle=handle, error=str(error))
                return
            for packet in parse_messages(data):
                self._tell(handle or self._sender(packet), packet)

    def _sender(self, packet: LoggedPacket) -> str:
        try:
            return self._owner_of(socket.if_indextoname(packet.in_index))
        except OSError:  # its link is gone by now
            return ""

    def _tell(self, handle: str, packet: LoggedPacket) -> None:
        flow, decision = parse_flow(packet.payload), read_decision(packet)
        if handle and flow is not None and decision is not None:
            self._report(handle, Connection(decision, flow))


def can_tell(policy: EgressPolicy, denied: Sequence[AddressRange]) -> bool:
    """Whether a policy refuses or logs anything."""
    return can_refuse(policy, denied) or any(rule.log for rule in policy.rules)


def read_decision(packet: LoggedPacket) -> Decision | None:
    """What the rule that logged a packet has decided; None if it is none of ours. See firewall.refuse."""
    if packet.prefix.startswith(ALLOW_PREFIX):
        number = packet.prefix.removeprefix(ALLOW_PREFIX)
        return Decision(RuleAction.ALLOW, Cause.RULE, int(number)) if number.isdecimal() else None
    cause = _CAUSES.get(packet.mark)
    if cause is not None:
        return Decision(RuleAction.DENY, cause)
    return Decision(RuleAction.DENY, Cause.RULE, packet.mark - 1) if packet.mark else None


def _open_in(netns_path: str) -> socket.socket:
    fd = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return open_group(LOG_GROUP, fd)
    finally:
        os.close(fd)
