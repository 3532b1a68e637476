"""Links, and what is in the server's nftables table. `net/survey.py` says how elements are written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from garden_py.backend.ledger.book import Book, Holding, Mapping, Shared
from garden_py.backend.net.host_firewall import BASE_CHAINS, egress_chain_of
from garden_py.backend.net.plan import HostPlan, address_of_link, host_link_name
from garden_py.backend.net.survey import Survey
from garden_py.model.leak import Direction, Leak, LeakKind

_EGRESS_CHAIN = re.compile(r"egress_([0-9a-v]+)")
_OTHER_POOL = "there are containers with addresses outside of --network-pool, and it may be one of theirs"
_SHARED = "shared by all containers"
_WITHOUT_RULES = "somebody has taken its rules away"


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen.

    Attributes:
        aliases: of links: the handles that they were made for.
        is_needed: false: a running server's containers are connected by a plugin, all of them.
    """

    host: HostPlan
    survey: Survey
    aliases: dict[str, str] = field(default_factory=dict)
    is_needed: bool = True


def look(host: HostPlan, survey: Survey, addresses: set[str], *, is_needed: bool = True) -> Sight:
    """Add to a survey the aliases of links whose address was not claimed when the look began; see Sight."""
    strangers = [name for name in survey.links if str(address_of_link(host, name)) not in addresses]
    return Sight(host, survey, {name: _read_alias(name) for name in strangers}, is_needed)


def _read_alias(link: str) -> str:
    try:
        return Path(f"/sys/class/net/{link}/ifalias").read_text().strip()
    except OSError:  # gone, or the driver has none: it only helps people
        return ""


def judge(book: Book, seen: Sight) -> list[Leak]:
    """Links, elements and chains that no row claims, and those that a row lacks."""
    # A pool that was configured differently when a container was made: its link's name means another address then.
    known_pool = all(IPv4Address(address) in seen.host.pool for address in book.pool_addresses)
    found = _orphans(book, seen, keep="" if known_pool else _OTHER_POOL)
    found += _judge_shared(book, seen)
    if seen.survey.table:  # else that is all there is to say
        found += [leak for holding in book.settled for leak in _missing_elements(holding, seen)]
    found += [
        Leak(LeakKind.LINK, Direction.MISSING, link, holding.handle)
        for holding in book.settled
        if (link := _link_of(holding, seen.host)) and link not in seen.survey.links
    ]
    return found


def _orphans(book: Book, seen: Sight, *, keep: str) -> list[Leak]:
    found: list[Leak] = []
    for name, kind in seen.survey.links.items():
        address = address_of_link(seen.host, name)
        if str(address) in book.addresses:
            continue
        why = keep
        if address is None:
            why = "the server gives no link such a name"
        elif kind != "veth":
            why = f"it is a {kind or 'device'}, and the server makes veth pairs"
        handle = seen.aliases.get(name, "")
        found.append(Leak(LeakKind.LINK, Direction.ORPHAN, name, handle, keep_because=why))
    # A server may have had another IPv6 pool when a container was made: what stands for its address there is claimed.
    claimed = {
        element
        for holding in book.holdings
        for element in _elements_of(holding, seen.host, (holding.address, holding.address_v6))
    }
    for element in seen.survey.elements:
        if element not in claimed:
            known = element.partition(" ")[0] in ("member", "portmap", "egress")
            why = keep if known else "the server makes no such set"
            found.append(Leak(LeakKind.NFT_ELEMENT, Direction.ORPHAN, element, keep_because=why))
    chains = {
        _chain_of(holding, seen.host)
        for holding in book.holdings
        if holding.privileged and _link_of(holding, seen.host)
    }
    for chain in seen.survey.chains:
        if chain not in BASE_CHAINS and chain not in chains:
            why = keep if _EGRESS_CHAIN.fullmatch(chain) else "the server makes no such chain"
            found.append(Leak(LeakKind.NFT_CHAIN, Direction.ORPHAN, chain, keep_because=why))
    return found


def _elements_of(holding: Holding, host: HostPlan, addresses: Iterable[str]) -> list[str]:
    found: list[str] = []
    link = _link_of(holding, host)
    for address in filter(None, addresses if link else ()):
        found.append(f"member {link} {address}")
        found += [portmap_element(address, mapping) for mapping in holding.mappings]
        if holding.privileged:
            found.append(f"egress {address} {_chain_of(holding, host)}")
    return found


def _known_addresses(holding: Holding, host: HostPlan) -> list[str]:
    """Those that the host's table must know: not an IPv6 address of a pool that the server had before."""
    address_v6 = host.address_v6(IPv4Address(holding.address)) if holding.address else None
    is_known = address_v6 is not None and holding.address_v6 == str(address_v6)
    return [holding.address, holding.address_v6] if is_known else [holding.address]


def portmap_element(address: str, mapping: Mapping) -> str:
    """How a survey writes a mapped port."""
    return f"portmap {mapping.protocol} {mapping.host_port} {address} {mapping.container_port}"


def _link_of(holding: Holding, host: HostPlan) -> str:
    """The name of its link; empty without an address, or with one of another pool."""
    if not holding.address or not (holding.in_subnet or IPv4Address(holding.address) in host.pool):
        return ""
    return host_link_name(host, IPv4Address(holding.address))


def _chain_of(holding: Holding, host: HostPlan) -> str:
    return egress_chain_of(_link_of(holding, host))


def _missing_elements(holding: Holding, seen: Sight) -> list[Leak]:
    wanted = _elements_of(holding, seen.host, _known_addresses(holding, seen.host))
    lacking = set(wanted) - set(seen.survey.elements)
    return [
        Leak(LeakKind.NFT_ELEMENT, Direction.MISSING, element, holding.handle) for element in sorted(lacking)
    ]


def _judge_shared(book: Book, seen: Sight) -> list[Leak]:
    there = {
        (LeakKind.LINK, seen.host.anchor_link): seen.survey.anchor,
        (LeakKind.NFT_CHAIN, f"table inet {seen.host.table}"): seen.survey.table,
    }
    match book.shared if seen.is_needed else Shared.ORPHANED:
        case Shared.REQUIRED:
            missing = [
                Leak(k, Direction.MISSING, n, detail=_SHARED)
                for (k, n), is_there in there.items()
                if not is_there
            ]
            if seen.survey.table and not seen.survey.in_force:
                table = f"table inet {seen.host.table}"
                missing.append(Leak(LeakKind.NFT_CHAIN, Direction.MISSING, table, detail=_WITHOUT_RULES))
            return missing
        case Shared.ORPHANED:
            return [
                Leak(k, Direction.ORPHAN, n, detail=_SHARED) for (k, n), is_there in there.items() if is_there
            ]
        case Shared.ALLOWED:
            return []
