"""Whether the server's table still is in force.

`nft flush ruleset`, with which a reload of nftables.service begins, takes it away from under all containers. A look
costs seven small messages and no process.

Source: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

from garden_py.agent.nft import open_netfilter_socket
from garden_py.agent.rtnetlink import NLMSG_ERROR, parse_attributes, split_messages
from garden_py.backend.net.nfnetlink import pack_request
from garden_py.backend.net.nft_messages import chain_name

_NFTABLES: Final = 10  # NFNL_SUBSYS_NFTABLES
_GET_CHAIN: Final = 4  # NFT_MSG_GETCHAIN
_INET: Final = 1  # NFPROTO_INET
_CHAIN_USE: Final = 6  # NFTA_CHAIN_USE: its rules, and what jumps to it
_GENERIC_BYTES: Final = 4  # struct nfgenmsg
_RECEIVE_BYTES: Final = 1 << 16
_TIMEOUT_S: Final = 2.0


class TableProbe:
    """Looks at chains of a table of family inet, in the network namespace of the caller.

    Args:
        table: its name.
        chains: that have a rule each while it is in force.
    """

    def __init__(self, table: str, chains: tuple[str, ...]) -> None:
        self._count = len(chains)
        self._requests = b"".join(
            pack_request(
                _NFTABLES, _GET_CHAIN, chain_name(table, name), flags=0, family=_INET, sequence=number
            )
            for number, name in enumerate(chains)
        )

    def is_whole(self) -> bool:
        """Whether every chain is there and has rules.

        Raises:
            OSError: the kernel does not say.
        """
        with open_netfilter_socket(_TIMEOUT_S) as opened:
            opened.send(self._requests)
            return all(map(self._has_rules, self._answers(opened)))

    def _answers(self, opened: socket.socket) -> list[bytes]:
        """What the kernel says of each chain; b"" for one that is not there."""
        found: list[bytes] = []
        while len(found) < self._count:
            for kind, _flags, _sequence, payload in split_messages(opened.recv(_RECEIVE_BYTES)):
                if kind != NLMSG_ERROR:
                    found.append(payload)
                    continue
                (code,) = struct.unpack_from("=i", payload)
                if -code != errno.ENOENT:
                    raise OSError(-code, os.strerror(-code))
                found.append(b"")
        return found

    @staticmethod
    def _has_rules(answer: bytes) -> bool:
        return any(
            kind == _CHAIN_USE and int.from_bytes(value) > 0
            for kind, value in parse_attributes(answer[_GENERIC_BYTES:])
        )
