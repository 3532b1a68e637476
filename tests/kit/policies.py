"""Any egress policy, for property tests."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from hypothesis import strategies as st

from garden_py.model.netrule import (
    AddressRange,
    DefaultAction,
    EgressPolicy,
    EgressRule,
    IcmpMatch,
    PortRange,
    Protocol,
    RuleAction,
)


def address_ranges() -> st.SearchStrategy[AddressRange]:
    """Of both versions: any, and the networks that people write."""

    def pairs(kind: type[IPv4Address] | type[IPv6Address], bits: int) -> st.SearchStrategy[AddressRange]:
        number = st.integers(0, 2**bits - 1)
        return st.tuples(number, number).map(lambda p: AddressRange(kind(min(p)), kind(max(p))))

    def networks(kind: type[IPv4Address] | type[IPv6Address], bits: int) -> st.SearchStrategy[AddressRange]:
        def build(drawn: tuple[int, int]) -> AddressRange:
            number, varying = drawn
            start = number >> varying << varying
            return AddressRange(kind(start), kind(start | (1 << varying) - 1))

        return st.tuples(st.integers(0, 2**bits - 1), st.integers(0, bits)).map(build)

    return (
        pairs(IPv4Address, 32)
        | pairs(IPv6Address, 128)
        | networks(IPv4Address, 32)
        | networks(IPv6Address, 128)
    )


def port_ranges() -> st.SearchStrategy[PortRange]:
    """One port, or from one to another."""
    number = st.integers(1, 65535)
    return st.tuples(number, number).map(lambda p: PortRange(min(p), max(p))) | number.map(
        lambda n: PortRange(n, n)
    )


@st.composite
def egress_rules(draw: st.DrawFn) -> EgressRule:
    """Any rule."""
    protocol = draw(st.sampled_from(Protocol))
    has_ports = protocol in (Protocol.TCP, Protocol.UDP)
    icmp = st.none() | st.builds(IcmpMatch, st.integers(0, 255), st.none() | st.integers(0, 255))
    return EgressRule(
        protocol=protocol,
        networks=tuple(draw(st.lists(address_ranges(), max_size=3))),
        ports=tuple(draw(st.lists(port_ranges(), max_size=3))) if has_ports else (),
        icmp=draw(icmp) if protocol is Protocol.ICMP else None,
        log=draw(st.booleans()),
        action=draw(st.sampled_from(RuleAction)),
    )


def egress_policies() -> st.SearchStrategy[EgressPolicy]:
    """Any policy of a few rules; connections may have been cut."""
    rules = st.lists(egress_rules(), max_size=5).map(tuple)
    return st.builds(EgressPolicy, st.sampled_from(DefaultAction), rules, st.integers(0, 0x2_0000))
