"""Names, MACs and addresses of a container's link, worked out before anything is touched.

    container's namespace          host's namespace
    ┌─────────────────────┐        ┌───────────────────────────────────────────────┐
    │ eth0  10.254.0.7/32 │────────│ gdn3fa1-7   (no address; route to 10.254.0.7) │
    │ default via .0.1    │  veth  │ gdn-3fa1    10.254.0.1/32, the gateway        │
    └─────────────────────┘        └───────────────────────────────────────────────┘

Every link is its own point-to-point wire into the host's routing, so there is no broadcast domain to share:
docs/decisions/0003-network.md says why there is no switching bridge.

An IPv6 address is not leased: it is the IPv4 address in the last 32 bits of the server's IPv6 pool.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

CONTAINER_LINK = "eth0"
MAX_LINK_NAME_BYTES = 15  # IFNAMSIZ - 1, netdevice(7)
MAX_ALIAS_BYTES = 255  # IFALIASZ - 1, linux/if.h
DEFAULT_MTU_BYTES = 1500
MIN_IPV6_MTU_BYTES = 1280  # RFC 8200 §5: a link with less has no IPv6
MAX_PREFIX_LENGTH_V6 = 96  # what follows holds an IPv4 address
MIN_MTU_BYTES = 68  # RFC 791: every link carries 68 bytes

_OFFSET = re.compile(r"[1-9a-f][0-9a-f]{0,5}")  # in a pool of /8 or smaller
_ADDRESS = re.compile(r"[0-3][0-9a-v]{6}")
_DIGITS = "0123456789abcdefghijklmnopqrstuv"
_TAG = re.compile(r"[0-9a-f]{4}")


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What one server instance owns on the host.

    Attributes:
        tag: four lower-case hexadecimal digits, one server instance's mark on everything it makes.
        pool: the containers' network.
        gateway: the host's address in it, and every container's default gateway.
        pool_v6: likewise, at most MAX_PREFIX_LENGTH_V6 long; None: containers have no IPv6.
    """

    tag: str
    pool: IPv4Network
    gateway: IPv4Address
    pool_v6: IPv6Network | None = None

    def __post_init__(self) -> None:
        if not _TAG.fullmatch(self.tag):
            raise ValueError(f"tag {self.tag!r} is not four lower-case hexadecimal digits")
        if self.gateway not in self.pool:
            raise ValueError(f"gateway {self.gateway} is not in {self.pool}")
        if self.pool_v6 is not None and self.pool_v6.prefixlen > MAX_PREFIX_LENGTH_V6:
            raise ValueError(f"{self.pool_v6} has no room for IPv4 addresses")

    def address_v6(self, address: IPv4Address) -> IPv6Address | None:
        """The IPv6 address that goes with an IPv4 one; None without a pool of them."""
        return None if self.pool_v6 is None else self.pool_v6[int(address)]

    def network_v6(self, network: IPv4Network) -> IPv6Network | None:
        """The IPv6 addresses that go with a subnet's; None without a pool of them."""
        first = self.address_v6(network.network_address)
        return None if first is None else IPv6Network((first, MAX_PREFIX_LENGTH_V6 + network.prefixlen))

    def network_v4(self, network: IPv6Network) -> IPv4Network | None:
        """The IPv4 addresses whose IPv6 ones are in a network; None: no container's are."""
        if self.pool_v6 is None:
            return None
        all_v6 = IPv6Network((self.pool_v6.network_address, MAX_PREFIX_LENGTH_V6))
        if network.supernet_of(all_v6):
            return IPv4Network("0.0.0.0/0")
        if not network.subnet_of(all_v6):
            return None
        first = IPv4Address(int(network.network_address) & 0xFFFF_FFFF)
        return IPv4Network((first, network.prefixlen - MAX_PREFIX_LENGTH_V6))

    @property
    def gateway_v6(self) -> IPv6Address | None:
        """The host's address in the IPv6 pool."""
        return self.address_v6(self.gateway)

    @property
    def anchor_link(self) -> str:
        """The link that carries the gateway address."""
        return f"gdn-{self.tag}"

    @property
    def link_prefix(self) -> str:
        """What the names of all containers' host links begin with; the anchor's does not."""
        return f"gdn{self.tag}-"

    @property
    def table(self) -> str:
        """The server's own nftables table, family inet."""
        return f"garden_{self.tag}"

    @property
    def anchor_mac(self) -> bytes:
        """The MAC of the anchor, which no frame ever carries."""
        return b"\x0a\x00" + self.gateway.packed

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process; `from_json` is the inverse."""
        pool_v6 = {} if self.pool_v6 is None else {"pool_v6": str(self.pool_v6)}
        return {"tag": self.tag, "pool": str(self.pool), "gateway": str(self.gateway), **pool_v6}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HostPlan:
        """Rebuild from `to_json`."""
        pool_v6 = value.get("pool_v6")
        return cls(
            value["tag"],
            IPv4Network(value["pool"]),
            IPv4Address(value["gateway"]),
            None if pool_v6 is None else IPv6Network(pool_v6),
        )


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """One container's veth pair.

    Attributes:
        host_link: name of the host's end, `gdn<tag>-<n>`.
        container_link: name inside the container.
        host_mac: MAC of the host's end, as in `06:00:0a:fe:00:07`.
        container_mac: MAC of the container's end.
        address: the container's.
        gateway: the host's.
        mtu_bytes: of both ends.
        alias: what `ip link` shows beside the host's end: the container's handle.
        address_v6: the container's; empty: it has none.
        gateway_v6: the host's.
    """

    host_link: str
    container_link: str
    host_mac: str
    container_mac: str
    address: str
    gateway: str
    mtu_bytes: int
    alias: str
    address_v6: str = ""
    gateway_v6: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LinkPlan:
        """Rebuild from `to_json`."""
        return cls(**value)


def plan_link(
    host: HostPlan,
    address: IPv4Address,
    *,
    handle: str,
    mtu_bytes: int,
    address_v6: IPv6Address | None = None,
) -> LinkPlan:
    """Derive a container's link from its address alone, so that a restarted server derives the same.

    MACs are locally administered (second-lowest bit of the first byte, IEEE 802-2014 §8.2) and hold the
    address, which makes them unique on the host's side and readable in a capture.
    """
    return LinkPlan(
        host_link=host_link_name(host, address),
        container_link=CONTAINER_LINK,
        host_mac=format_mac(b"\x06\x00" + address.packed),
        container_mac=format_mac(b"\x02\x00" + address.packed),
        address=str(address),
        gateway=str(host.gateway),
        mtu_bytes=mtu_bytes,
        alias=_truncate(handle, MAX_ALIAS_BYTES),
        address_v6="" if address_v6 is None else str(address_v6),
        gateway_v6="" if address_v6 is None else str(host.gateway_v6),
    )


def host_link_name(host: HostPlan, address: IPv4Address) -> str:
    """The name of a container's link on the host.

    The offset of its address in the pool, in hexadecimal; of one outside, in a subnet that the caller has chosen, the
    whole address, seven digits to the base of 32.
    """
    if address in host.pool:
        name = f"{host.link_prefix}{int(address) - int(host.pool.network_address):x}"
    else:
        name = host.link_prefix + "".join(_DIGITS[int(address) >> shift & 31] for shift in range(30, -1, -5))
    assert len(name) <= MAX_LINK_NAME_BYTES, name
    return name


def address_of_link(host: HostPlan, name: str) -> IPv4Address | None:
    """The address that a link's name stands for; None if no container's link can have that name."""
    digits = name.removeprefix(host.link_prefix)
    if digits != name and _ADDRESS.fullmatch(digits):
        address = IPv4Address(sum(_DIGITS.index(d) << 5 * i for i, d in enumerate(reversed(digits))))
        return None if address in host.pool else address
    if digits == name or not _OFFSET.fullmatch(digits):
        return None
    offset = int(digits, 16)
    if not 0 < offset < host.pool.num_addresses - 1:
        return None
    address = host.pool[offset]
    return None if address == host.gateway else address


def choose_mtu(uplink_mtu_bytes: int | None, *, wanted_bytes: int | None = None) -> int:
    """The containers' MTU: what was asked for, else the uplink's but at most 1500.

    A container's packets leave through the uplink, so a larger MTU would only be cut there (or, with "don't
    fragment" set and ICMP filtered on the way, vanish); loopback-only hosts and jumbo frames get 1500.
    """
    if wanted_bytes is not None:
        return max(wanted_bytes, MIN_MTU_BYTES)
    return min(uplink_mtu_bytes or DEFAULT_MTU_BYTES, DEFAULT_MTU_BYTES)


def parse_mac(text: str) -> bytes:
    """`02:00:0a:fe:00:07` as six bytes."""
    return bytes.fromhex(text.replace(":", ""))


def format_mac(mac: bytes) -> str:
    """Six bytes as `02:00:0a:fe:00:07`."""
    return mac.hex(":")


def _truncate(text: str, limit_bytes: int) -> str:
    return text.encode()[:limit_bytes].decode(errors="ignore")
