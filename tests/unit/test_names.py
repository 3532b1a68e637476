"""The files that make names work in a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from garden_py.backend.rootfs.host_names import read_if_there
from garden_py.backend.rootfs.names import (
    add_own_name,
    build_hosts,
    build_resolv_conf,
    choose_resolv_conf,
    find_resolver_problem,
)

STUB = """# This is /run/systemd/resolve/stub-resolv.conf managed by man:systemd-resolved(8).
# Do not edit.

nameserver 127.0.0.53
options edns0 trust-ad
search .
"""


def test_hosts_has_localhost_and_the_container() -> None:
    """N30: in this order; without an address there is only localhost."""
    assert build_hosts("10.0.0.2", "", "box") == "127.0.0.1 localhost\n10.0.0.2 box\n"
    assert build_hosts("", "", "box") == "127.0.0.1 localhost\n"
    assert build_hosts("10.0.0.2", "fd00::a00:2", "box").splitlines() == [
        "127.0.0.1 localhost", "::1 localhost", "10.0.0.2 box", "fd00::a00:2 box",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1 localhost\n", "127.0.0.1 localhost\n127.0.0.1 box\n"),
        ("127.0.0.1 localhost", "127.0.0.1 localhost\n127.0.0.1 box\n"),
        ("", "127.0.0.1 box\n"),
        ("192.0.2.1 site box # mine\n", "192.0.2.1 site box # mine\n"),
        ("192.0.2.1 boxes # box\n", "192.0.2.1 boxes # box\n127.0.0.1 box\n"),
    ],
)
def test_hosts_of_a_container_in_the_hosts_network(host: str, expected: str) -> None:
    """The host's own, in which it finds itself by name, too (statement H2)."""
    assert add_own_name(host, "box") == expected


@pytest.mark.parametrize(
    ("host", "servers", "expected"),
    [
        ("nameserver 192.0.2.1\n", (), "nameserver 192.0.2.1\n"),
        ("nameserver 127.0.0.53\n", (), "nameserver 10.0.0.1\n"),
        (STUB, (), "nameserver 10.0.0.1\noptions edns0 trust-ad\nsearch .\n"),
        ("nameserver 127.0.0.1\nnameserver ::1\n", (), "nameserver 10.0.0.1\n"),
        ("; nameserver 192.0.2.1\n", (), ""),
        ("search a b\nnameserver 127.0.0.1\nnameserver 192.0.2.9\n", (), "search a b\nnameserver 192.0.2.9\n"),
        ("search a\nnameserver 192.0.2.1\n", ("192.0.2.7", "192.0.2.8"),
         "nameserver 192.0.2.7\nnameserver 192.0.2.8\n"),
        ("nameserver ::1\n", (), "nameserver 10.0.0.1\n"),
        ("nameserver ::1\nnameserver fd00::53\n", (), "nameserver fd00::53\n"),
        ("nameserver fe80::1%eth0\nnameserver 192.0.2.1\n", (), "nameserver 192.0.2.1\n"),
        ("", (), ""),
        ("\n  \n", (), ""),
    ],
)  # fmt: skip
def test_resolv_conf(host: str, servers: tuple[str, ...], expected: str) -> None:
    """N31: the server's setting wins; the host's loopback is not the container's."""
    assert build_resolv_conf(host, servers, "10.0.0.1") == expected


def test_additional_entries_and_servers_come_last() -> None:
    """Statements N30 and N31: after the container's own name; after the host's or the setting's servers."""
    hosts = build_hosts("10.0.0.2", "", "box", ("10.1.1.1 other", "10.1.1.2 third"))
    assert hosts.splitlines()[1:] == ["10.0.0.2 box", "10.1.1.1 other", "10.1.1.2 third"]
    more = ("9.9.9.9",)
    assert build_resolv_conf("nameserver 8.8.8.8\nsearch x\n", (), "10.0.0.1", more) == (
        "nameserver 8.8.8.8\nsearch x\nnameserver 9.9.9.9\n"
    )
    assert build_resolv_conf("", ("1.1.1.1",), "10.0.0.1", more) == "nameserver 1.1.1.1\nnameserver 9.9.9.9\n"
    assert build_resolv_conf("nameserver 127.0.0.53\n", (), "10.0.0.1", more) == (
        "nameserver 10.0.0.1\nnameserver 9.9.9.9\n"
    )


@pytest.mark.parametrize(
    ("own", "upstream", "is_upstream"),
    [
        (STUB, "# of resolved\nnameserver 192.0.2.1\nsearch site\n", True),
        (STUB, "nameserver 127.0.0.1\n", False),
        (STUB, "", False),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.9\n", "nameserver 192.0.2.1\n", False),
        ("", "nameserver 192.0.2.1\n", True),
    ],
)
def test_servers_behind_the_hosts_own_resolver(own: str, upstream: str, is_upstream: bool) -> None:
    """As Docker does: where the host asks itself, containers ask whom its resolver asks."""
    assert choose_resolv_conf(own, upstream) == (upstream if is_upstream else own)


@pytest.mark.parametrize(
    ("text", "gateway_answers", "has_ipv6", "problem"),
    [
        ("search site\n", True, True, "names no DNS server"),
        ("nameserver 10.0.0.1\n", False, False, "nothing listens"),
        ("nameserver 10.0.0.1\n", True, False, ""),
        ("nameserver 10.0.0.1\nnameserver 192.0.2.1\n", False, False, ""),
        ("nameserver 10.0.0.1\nnameserver fd00::53\n", False, False, "nothing listens"),
        ("nameserver fd00::53\n", False, False, "no IPv6"),
        ("nameserver fd00::53\n", False, True, ""),
    ],
)
def test_who_gets_no_answer_is_told_before(
    text: str, gateway_answers: bool, has_ipv6: bool, problem: str
) -> None:
    """In the log of the server and by the doctor, with what to set."""
    found, remedy = find_resolver_problem(
        text, "10.0.0.1", gateway_answers=gateway_answers, has_ipv6=has_ipv6
    )
    assert problem in found
    assert bool(problem) == bool(found)
    assert ("--dns-server" in remedy) == bool(problem)


def test_hosts_files_in_any_encoding_are_read(tmp_path: Path) -> None:
    """Comments of old ones are in Latin-1: in the host's network no container could be made."""
    hosts = tmp_path / "hosts"
    hosts.write_bytes(b"127.0.0.1 localhost # f\xfcr uns\n")
    assert read_if_there(hosts).startswith("127.0.0.1 localhost # f")
    assert read_if_there(tmp_path / "none") == ""
