"""What goes to and comes from the process that carries network changes out: plain values, JSON-able."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from garden_py.backend.net.plan import LinkPlan


@dataclass(frozen=True, slots=True)
class Foreign:
    """What somebody else has on the host in one of the server's networks.

    Attributes:
        network: the addresses that it covers.
        what: in words: an address or a route, and of which link.
    """

    network: str
    what: str


@dataclass(frozen=True, slots=True)
class HostReport:
    """What `ensure_host` found and did.

    Attributes:
        ip_forward_turned_on: the host did not forward before; that is left on when the server stops.
        uplink: name of the link of the default route; empty without one.
        mtu_bytes: what containers should use: the uplink's, at most 1500.
        foreign: what is in tolerated pools.
    """

    ip_forward_turned_on: bool
    uplink: str
    mtu_bytes: int
    foreign: tuple[Foreign, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process."""
        return {**asdict(self), "foreign": [asdict(each) for each in self.foreign]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HostReport:
        """Rebuild from `to_json`."""
        return cls(**{**value, "foreign": tuple(Foreign(**each) for each in value["foreign"])})


@dataclass(frozen=True, slots=True)
class Attachment:
    """One container's network, ready to be carried out.

    Attributes:
        link: the veth pair.
        host_rules: from host_firewall.compile_attach (with the policy in it if the container is privileged).
        container_rules: from firewall.compile_container_ruleset; empty for a privileged container.
    """

    link: LinkPlan
    host_rules: str
    container_rules: str

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Attachment:
        """Rebuild from `to_json`."""
        return cls(LinkPlan.from_json(value["link"]), value["host_rules"], value["container_rules"])


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What a container may receive and send, in bytes per second, and either burst in bytes. 0: no limit, no burst."""

    rx_bytes_per_s: int = 0
    tx_bytes_per_s: int = 0
    rx_burst_bytes: int = 0
    tx_burst_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Bandwidth:
        """Rebuild from `to_json`."""
        return cls(**value)


@dataclass(frozen=True, slots=True)
class RuleCounter:
    """How often a rule decided. `rule` is its index in the policy, or "default", "dns", "ipv6"."""

    rule: int | str
    packets: int
    bytes: int
