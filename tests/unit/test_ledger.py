"""What the ledger thinks of a host that it was shown: claimed, orphaned, missing, or not ours to judge."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from garden_py.backend.cgroup.layout import Hierarchies
from garden_py.backend.depot import why_foreign
from garden_py.backend.host.pids import ProcessIdentity
from garden_py.backend.ledger import cgroups, files, leases, mounts, network, processes
from garden_py.backend.ledger.book import Book, Holding, Mapping, Shared
from garden_py.backend.ledger.compare import Sight, compare
from garden_py.backend.linux.leaks import is_in_use
from garden_py.backend.net.host_firewall import BASE_CHAINS
from garden_py.backend.net.plan import HostPlan, address_of_link
from garden_py.backend.net.survey import Survey, compile_forget, read_chains, read_elements
from garden_py.model.leak import Direction, Leak, LeakKind

HOST = HostPlan("3fa1", IPv4Network("10.254.0.0/24"), IPv4Address("10.254.0.1"))
CPU, FREEZER = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/freezer")
WEB = Holding(
    handle="web",
    runtime_id="0123456789abcdef",
    address="10.254.0.7",
    mappings=(Mapping("tcp", 61001, 8080),),
    uid_slot=3,
    init=ProcessIdentity(4242, 99),
)
ROOT = Holding("root", "fedcba9876543210", "10.254.0.8", privileged=True, init=ProcessIdentity(4243, 99))
SOCKETS = {"web": "a" * 24 + ".sock", "root": "b" * 24 + ".sock"}


def whole_host() -> Sight:
    """A host that has exactly what WEB and ROOT claim."""
    return Sight(
        files=files.Sight(
            containers={"web": "", "root": ""},
            sockets=dict.fromkeys(SOCKETS.values(), ""),
            runtimes={f"runc/{WEB.runtime_id}": "", f"runc/{ROOT.runtime_id}": ""},
            socket_names=SOCKETS,
        ),
        cgroups=cgroups.Sight(
            "garden-3fa1",
            required=frozenset({CPU}),
            parents=frozenset({CPU, FREEZER}),
            groups={"garden-3fa1/web": {CPU, FREEZER}, "garden-3fa1/root": {CPU, FREEZER}},
        ),
        processes=processes.Sight(),
        network=network.Sight(
            HOST,
            Survey(
                links={"gdn3fa1-7": "veth", "gdn3fa1-8": "veth"},
                anchor=True,
                table=True,
                elements=(
                    "member gdn3fa1-7 10.254.0.7",
                    "member gdn3fa1-8 10.254.0.8",
                    "portmap tcp 61001 10.254.0.7 8080",
                    "egress 10.254.0.8 egress_8",
                ),
                chains=(*BASE_CHAINS, "egress_8"),
            ),
        ),
        mounts=mounts.Sight(),
        leases=leases.Sight(
            frozenset({"10.254.0.7", "10.254.0.8"}), frozenset({("tcp", 61001)}), frozenset({3})
        ),
    )


def judged(
    seen: Sight, *holdings: Holding, settled: tuple[Holding, ...] = (), shared: Shared = Shared.REQUIRED
) -> dict[tuple[str, str, str], Leak]:
    found = compare(Book(holdings, settled, shared), seen)
    return {(leak.kind.value, leak.direction.value, leak.name): leak for leak in found}


def test_host_that_has_what_is_claimed_has_no_leak() -> None:
    """Neither way."""
    assert judged(whole_host(), WEB, ROOT, settled=(WEB, ROOT)) == {}


def test_everything_of_a_container_without_a_row_is_an_orphan() -> None:
    """Each kind is named, and may be removed, in an order in which no step needs what a former one took."""
    seen = whole_host()
    seen = replace(
        seen,
        cgroups=replace(seen.cgroups, pids={"garden-3fa1/web": (7, 8)}),
        mounts=mounts.Sight(frozenset({WEB.runtime_id})),
        network=replace(seen.network, aliases={"gdn3fa1-7": "web"}),
    )
    found = judged(seen, ROOT, settled=(ROOT,))
    assert list(found) == [
        ("process", "orphan", "7"),
        ("process", "orphan", "8"),
        ("cgroup", "orphan", "garden-3fa1/web"),
        ("link", "orphan", "gdn3fa1-7"),
        ("nft_element", "orphan", "member gdn3fa1-7 10.254.0.7"),
        ("nft_element", "orphan", "portmap tcp 61001 10.254.0.7 8080"),
        ("mount", "orphan", f"launcher:{WEB.runtime_id}"),
        ("runtime", "orphan", f"runc/{WEB.runtime_id}"),
        ("socket", "orphan", SOCKETS["web"]),
        ("directory", "orphan", "containers/web"),
        ("address", "orphan", "10.254.0.7"),
        ("port", "orphan", "tcp 61001"),
        ("uid_range", "orphan", "3"),
    ]
    assert not any(leak.keep_because for leak in found.values())
    assert {leak.handle for leak in found.values()} == {"web", ""}


def test_privileged_containers_chain_is_an_orphan_after_what_leads_to_it() -> None:
    """Nft refuses to delete a chain that a map still names."""
    found = list(judged(whole_host(), WEB, settled=(WEB,)))
    egress = ("nft_element", "orphan", "egress 10.254.0.8 egress_8")
    assert found.index(egress) < found.index(("nft_chain", "orphan", "egress_8"))


def test_everything_that_a_settled_container_lacks_is_missing() -> None:
    """And nothing of it can be removed, so the handle is told."""
    empty = whole_host()
    empty = replace(
        empty,
        files=files.Sight(socket_names=SOCKETS),
        cgroups=replace(empty.cgroups, groups={"garden-3fa1/web": {FREEZER}}),
        processes=processes.Sight(ended=frozenset({"web"})),
        network=network.Sight(HOST, Survey({}, anchor=True, table=True, chains=BASE_CHAINS)),
        leases=leases.Sight(),
    )
    found = judged(empty, WEB, settled=(WEB,))
    assert set(found) == {
        ("process", "missing", "4242"),
        ("cgroup", "missing", "garden-3fa1/web"),
        ("link", "missing", "gdn3fa1-7"),
        ("nft_element", "missing", "member gdn3fa1-7 10.254.0.7"),
        ("nft_element", "missing", "portmap tcp 61001 10.254.0.7 8080"),
        ("runtime", "missing", WEB.runtime_id),
        ("socket", "missing", SOCKETS["web"]),
        ("directory", "missing", "containers/web"),
    }
    assert {leak.handle for leak in found.values()} == {"web"}
    assert judged(empty, WEB) == {}, "one that is being made or destroyed lacks nothing"


@pytest.mark.parametrize(
    ("shared", "table", "expected"),
    [
        (Shared.REQUIRED, False, {("link", "missing"), ("nft_chain", "missing"), ("cgroup", "missing")}),
        (Shared.ALLOWED, False, set()),
        (Shared.ALLOWED, True, set()),
        (Shared.ORPHANED, True, {("link", "orphan"), ("nft_chain", "orphan"), ("cgroup", "orphan")}),
        (Shared.ORPHANED, False, set()),
    ],
)
def test_shared_parts_are_judged_by_who_needs_them(
    shared: Shared, table: bool, expected: set[tuple[str, str]]
) -> None:
    """A running server needs them, a stopped one's containers do, nobody else does."""
    seen = whole_host()
    parents = frozenset({CPU}) if table else frozenset()
    seen = replace(
        seen,
        files=files.Sight(),
        cgroups=cgroups.Sight("garden-3fa1", frozenset({CPU}), parents),
        network=network.Sight(HOST, Survey({}, anchor=table, table=table)),
        leases=leases.Sight(),
    )
    found = judged(seen, shared=shared)
    assert {(kind, direction) for kind, direction, _ in found} == expected


@pytest.mark.parametrize("shared", [Shared.REQUIRED, Shared.ALLOWED])
def test_a_table_without_rules_is_as_good_as_none(shared: Shared) -> None:
    """Where somebody needs it."""
    survey = Survey({}, anchor=True, table=True, chains=BASE_CHAINS, in_force=False)
    seen = replace(whole_host(), network=network.Sight(HOST, survey))
    found = {each for each in judged(seen, shared=shared) if each[0] == "nft_chain"}
    table = ("nft_chain", "missing", f"table inet {HOST.table}")
    assert found == ({table} if shared is Shared.REQUIRED else set())


def test_what_only_looks_like_ours_is_told_and_kept() -> None:
    """Names alone do not make a thing the server's."""
    seen = whole_host()
    survey = Survey(
        links={"gdn3fa1-zz": "veth", "gdn3fa1-9": "dummy", "gdn3fa1-1": "veth"},
        anchor=True,
        table=True,
        elements=("blocked 1.2.3.4",),
        chains=(*BASE_CHAINS, "mine"),
    )
    seen = replace(
        seen,
        files=files.Sight(
            containers={"backup": "it holds 'notes'"},
            trash={"keep-me": "its name"},
            sockets={"other": "its name"},
            runtimes={"runc/other": "its name"},
        ),
        cgroups=replace(seen.cgroups, groups={".hidden": {CPU}}),
        network=network.Sight(HOST, survey),
        mounts=mounts.Sight(host=frozenset({"/run/garden/mnt/x"})),
        leases=leases.Sight(),
    )
    found = judged(seen)
    assert len(found) == 11
    assert all(leak.keep_because for leak in found.values()), found


def test_link_is_not_judged_by_a_pool_that_its_container_did_not_come_from() -> None:
    """Its number means another address then."""
    old = replace(WEB, address="10.99.0.7")
    found = judged(whole_host(), old, ROOT)
    assert "outside" in found["link", "orphan", "gdn3fa1-7"].keep_because
    assert "outside" in found["nft_element", "orphan", "member gdn3fa1-7 10.254.0.7"].keep_because


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("gdn3fa1-7", "10.254.0.7"),
        ("gdn3fa1-fe", "10.254.0.254"),
        ("gdn3fa1-ff", None),  # broadcast
        ("gdn3fa1-1", None),  # the gateway's
        ("gdn3fa1-0", None),
        ("gdn3fa1-07", None),
        ("gdn3fa1-F", None),
        ("gdnffff-7", None),
        ("gdn-3fa1", None),
        ("gdn3fa1-fffffff", None),
    ],
)
def test_address_of_a_links_name(name: str, address: str | None) -> None:
    """Only names that the server can have given stand for an address."""
    assert address_of_link(HOST, name) == (None if address is None else IPv4Address(address))


def test_listing_of_the_table_is_read_and_each_element_can_be_forgotten() -> None:
    """The shapes that libnftables 1.0.6 gives."""
    objects = [
        {"table": {"family": "inet", "name": "garden_3fa1"}},
        {"set": {"name": "members", "elem": [{"concat": ["gdn3fa1-7", "10.254.0.7"]}]}},
        {"map": {"name": "portmap", "elem": [[{"concat": ["tcp", 80]}, {"concat": ["10.254.0.7", 8080]}]]}},
        {"map": {"name": "egress", "elem": [["10.254.0.7", {"goto": {"target": "egress_7"}}]]}},
        {"set": {"name": "blocked", "elem": ["1.2.3.4"]}},
        {"chain": {"name": "egress_7"}},
        {"rule": {"chain": "egress_7"}},
    ]
    elements = read_elements(objects)
    assert elements == (
        "blocked 1.2.3.4",
        "egress 10.254.0.7 egress_7",
        "member gdn3fa1-7 10.254.0.7",
        "portmap tcp 80 10.254.0.7 8080",
    )
    assert read_chains(objects) == ("egress_7",)
    assert 'delete element inet garden_3fa1 members { "gdn3fa1-7" . 10.254.0.7 }' in compile_forget(
        HOST, elements[2]
    )
    assert "delete element inet garden_3fa1 portmap { tcp . 80 }" in compile_forget(HOST, elements[3])
    assert "delete element inet garden_3fa1 egress { 10.254.0.7 }" in compile_forget(HOST, elements[1])
    with pytest.raises(ValueError, match="blocked"):
        compile_forget(HOST, elements[0])


def test_mount_points_below_private_directories() -> None:
    """Neither the directories themselves nor those whose names only begin alike; escapes are undone."""
    table = "\n".join(
        f"36 35 98:0 / {point} rw - ext4 /dev/sda rw"
        for point in ("/s/containers", "/s/containers/a", "/s/containers-old/a", r"/s/trash/a\040b", "/")
    )
    found = mounts.parse_mount_points(table, [Path("/s/containers"), Path("/s/trash")])
    assert found == {"/s/containers/a", "/s/trash/a b"}


def test_marks_of_a_containers_directory(tmp_path: Path) -> None:
    """Mode, owner, name and contents together tell the server's from somebody else's."""
    own = tmp_path / "web"
    own.mkdir(mode=0o700)
    (own / "config.json").touch()
    assert why_foreign(own) == ""
    (own / "notes").touch()
    assert "notes" in why_foreign(own)
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    assert "755" in why_foreign(shared)
    file = tmp_path / "file"
    file.touch()
    assert "not a directory" in why_foreign(file)
    hidden = tmp_path / ".hidden"
    hidden.mkdir(mode=0o700)
    assert "name" in why_foreign(hidden)


def test_leaks_are_told_apart_by_kind_side_and_name() -> None:
    """Whatever else is known of them."""
    leak = Leak(LeakKind.LINK, Direction.ORPHAN, "gdn3fa1-7")
    assert leak.key == replace(leak, detail="x", handle="y").key
    assert leak.key != replace(leak, direction=Direction.MISSING).key


def test_mapping_is_judged_as_a_whole() -> None:
    """Its port and its address can be taken again by others, and still it belongs to nobody (found by chaos)."""
    first = Holding("first", address="10.9.0.2", mappings=(Mapping("tcp", 61_001, 8080),))
    second = Holding("second", address="10.9.0.3")
    book = Book([first, second], [], Shared.REQUIRED)

    def in_use(name: str) -> bool:
        words = name.split(" ")
        address = IPv4Address(words[3] if words[0] == "portmap" else words[2])
        port = (words[1], int(words[2])) if words[0] == "portmap" else None
        return is_in_use(words, address, port, book)

    assert in_use("portmap tcp 61001 10.9.0.2 8080")
    assert not in_use("portmap tcp 61001 10.9.0.3 8080")
    assert not in_use("portmap tcp 61001 10.9.0.2 9090")
    assert in_use("member gdn-2 10.9.0.2")
    assert not in_use("member gdn-7 10.9.0.7")


def test_places_of_throttled_containers() -> None:
    """A container may be in either place; a twin alone is none, and belongs to nobody without its row."""
    good, bad = "garden-throttled-3fa1/good", "garden-throttled-3fa1/bad"
    seen = cgroups.Sight(
        "garden-3fa1",
        frozenset({CPU}),
        frozenset({CPU}),
        {f"{good}/web": {CPU}, f"{bad}/web": {CPU}, f"{bad}/lost": {CPU}},
        {f"{bad}/lost": (9,)},
    )
    book = Book([WEB], [WEB], Shared.REQUIRED)
    found = [(leak.kind.value, leak.name) for leak in cgroups.judge(book, seen)]
    assert found == [("cgroup", f"{bad}/lost"), ("process", "9")]
    del seen.groups[f"{good}/web"]
    assert any(leak.direction is Direction.MISSING for leak in cgroups.judge(book, seen))


def test_scope_of_systemd_is_a_place_as_well(tmp_path: Path) -> None:
    """Whatever the driver is, containers of the other one are seen; its holder is none; empty, a scope is an orphan."""
    scope = "garden.slice/garden-3fa1.scope"
    for name in ("@holder", "web", "lost"):
        (tmp_path / scope / name).mkdir(parents=True)
    hierarchies = Hierarchies(2, dict.fromkeys(("cpu", "memory", "pids"), tmp_path))
    for parent in (scope, "garden-3fa1"):
        places = cgroups.Places("3fa1", parent, scope)
        seen = cgroups.look(hierarchies, places, {"web"})
        assert seen.groups == {f"{scope}/web": {tmp_path}, f"{scope}/lost": {tmp_path}}
        found = cgroups.judge(Book([WEB], [WEB], Shared.ALLOWED), seen)
        assert [(leak.kind.value, leak.name) for leak in found] == [("cgroup", f"{scope}/lost")]
        orphans = cgroups.judge(Book([], [], Shared.ORPHANED), replace(seen, groups={}))
        assert [leak.name for leak in orphans] == [scope]
    assert cgroups.judge(Book([], [], Shared.REQUIRED), replace(seen, groups={}))[0].name == "garden-3fa1"
