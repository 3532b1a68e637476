"""The doctor's judgement, on hosts that are not this one."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from garden_py.cli.doctor.finding import Doubt, Level, judge
from garden_py.cli.doctor.identity import IdRange, capability_names, parse_id_map, parse_subids
from garden_py.cli.doctor.kernel import read_v1_controllers
from garden_py.cli.doctor.network import overlapping_routes
from garden_py.cli.doctor.runtimes import (
    CRUN_HOLES,
    RUNC_HOLES,
    Runtime,
    judge_runtime,
    open_holes,
    parse_version,
)
from garden_py.cli.doctor.storage import mount_of, parse_mountinfo


def names_of_open_holes(version: str, changelog: str = "") -> set[str]:
    parsed = parse_version(version)
    assert parsed is not None
    return {hole.name for hole in open_holes(parsed, changelog, RUNC_HOLES)}


def test_release_candidates_sort_before_their_release() -> None:
    """A fix in rc.3 is in the release, not in rc.2."""
    texts = ["1.0.0-rc7", "1.0.0-rc95", "1.0.0", "1.1.5+ds1", "1.2.0", "1.4.0-rc.2", "1.4.0-rc.3", "1.4.0"]
    versions = [parse_version(text) for text in texts]
    assert versions == sorted(versions, key=lambda version: version or (0, 0, 0, 0))
    assert parse_version("unknown") is None


@pytest.mark.parametrize(
    ("version", "vulnerable"),
    [
        ("1.2.7", True),
        ("1.2.8", False),
        ("1.3.2", True),
        ("1.3.3", False),
        ("1.4.0-rc.2", True),
        ("1.4.0", False),
        ("1.1.15", True),
    ],
)
def test_a_fix_counts_from_the_first_version_of_its_series(version: str, vulnerable: bool) -> None:
    """1.3.2 is later than 1.2.8 and still lacks the fix of November 2025."""
    assert ("CVE-2025-31133" in names_of_open_holes(version)) is vulnerable


def test_a_hole_that_the_packages_changelog_names_is_closed() -> None:
    """Debian's 1.1.5+ds1-1+deb12u1 has the fix of 1.1.12 without its version."""
    assert "CVE-2024-21626" in names_of_open_holes("1.1.5+ds1")
    assert "CVE-2024-21626" not in names_of_open_holes("1.1.5+ds1", "* CVE-2024-21626: several breakouts")


def test_a_runtime_without_open_holes_is_all_right() -> None:
    """And one that does not tell its version is not."""
    new = Runtime("crun", "/usr/bin/crun", "1.21", "", "")
    assert judge_runtime(new, CRUN_HOLES).level is Level.OK
    mute = Runtime("crun", "/usr/bin/crun", "", "", "")
    assert judge_runtime(mute, CRUN_HOLES).level is Level.WARN


def test_what_cannot_be_known_is_said() -> None:
    """Without a changelog only the version speaks."""
    finding = judge_runtime(Runtime("runc", "/usr/sbin/runc", "1.1.5", "", ""), RUNC_HOLES)
    assert finding.level is Level.WARN
    assert "its version alone" in finding.cost


def test_routes_into_the_pool_are_found_and_the_default_route_is_not() -> None:
    """/proc/net/route holds addresses as the kernel does, lowest byte first."""
    table = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "br0\t0000FE0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    )
    found = overlapping_routes(ipaddress.IPv4Network("10.254.0.0/22"), table)
    assert found == [(ipaddress.IPv4Network("10.254.0.0/24"), "br0")]


def test_the_state_directory_is_on_the_longest_mount_above_it() -> None:
    """And on the later one of two at the same place."""
    mounts = parse_mountinfo(
        "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
        "30 22 8:2 / /var rw - xfs /dev/sdb rw,prjquota\n"
        "31 22 8:3 / /var/lib\\040x rw - btrfs /dev/sdc rw\n"
        "32 22 0:9 / /var rw - tmpfs none rw\n"
    )
    assert mount_of(Path("/var/lib/garden"), mounts).kind == "tmpfs"
    assert mount_of(Path("/var/lib x/garden"), mounts).kind == "btrfs"
    assert mount_of(Path("/srv"), mounts).kind == "ext4"
    assert "prjquota" in mounts[1].options


def test_version_1_controllers_are_read_from_the_mounts() -> None:
    """A controller without a mounted hierarchy is no use."""
    text = (
        "40 30 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "41 30 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "42 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    assert read_v1_controllers(text) == {"cpu", "cpuacct", "memory"}


def test_capabilities_have_names() -> None:
    """Bits of a later kernel have numbers."""
    assert capability_names(1 << 0 | 1 << 21 | 1 << 24 | 1 << 60) == [
        "CHOWN",
        "SYS_ADMIN",
        "SYS_RESOURCE",
        "CAP_60",
    ]


def test_uid_claims_are_read_and_compared() -> None:
    """The host's own identity map claims nothing."""
    (claim,) = parse_subids("alice:100000:65536\n# comment\nbroken\n", "/etc/subuid")
    assert claim == IdRange(100000, 65536, "/etc/subuid (alice)")
    assert claim.overlaps(IdRange(165535, 1, "pool"))
    assert not claim.overlaps(IdRange(165536, 1, "pool"))
    assert parse_id_map("         0          0 4294967295\n", "process 1") == []
    assert parse_id_map("0 200000 65536\n", "process 7") == [IdRange(200000, 65536, "process 7")]


def test_a_failed_trial_says_its_cost() -> None:
    """And a successful one does not."""
    doubt = Doubt(Level.FAIL, "nothing works", "fix it")
    assert judge("x", "broken", "fine", doubt).cost == "nothing works"
    assert judge("x", "", "fine", doubt).cost == ""
