"""From limits to cgroup files and back, for both versions, on directories that only look like cgroups."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from garden_py.backend.cgroup import groups
from garden_py.backend.cgroup.layout import CgroupsMissing, ContainerCgroup, Hierarchies, parse_hierarchies
from garden_py.backend.cgroup.limits import LimitWrite, plan_writes, read_limits, write_limits
from garden_py.backend.cgroup.stats import parse_flat_keyed, read_oom_kills
from garden_py.model.errors import LimitRefused, NotSupported
from garden_py.model.limits import SWAP_UNLIMITED, Limits

ALL = Limits(memory_bytes=1 << 26, cpu_weight=50, cpu_quota_us=20_000, cpu_period_us=50_000, pids=10)
NONE = Limits(memory_bytes=0, cpu_quota_us=0, pids=0)


def texts(writes: list[LimitWrite]) -> list[str]:
    """Each write as `controller/below/file=value`."""
    return ["/".join((w.controller, *w.below, w.file)) + f"={w.value}" for w in writes]


def test_v1_plan() -> None:
    """Swap is limited to the same total; the weight is on the container, everything else on its workload."""
    assert texts(plan_writes(ALL, 1)) == [
        "memory/work/memory.limit_in_bytes=67108864",
        "memory/work/memory.memsw.limit_in_bytes=67108864",
        "cpu/cpu.shares=512",
        "cpu/work/cpu.cfs_period_us=50000",
        "cpu/work/cpu.cfs_quota_us=20000",
        "pids/work/pids.max=10",
    ]


def test_v2_plan() -> None:
    """No swap beside the memory limit; quota and period are one write."""
    assert texts(plan_writes(ALL, 2)) == [
        "memory/work/memory.max=67108864",
        "memory/work/memory.swap.max=0",
        "cpu/cpu.weight=50",
        "cpu/work/cpu.max=20000 50000",
        "pids/work/pids.max=10",
    ]


UNLIMITED = Limits(memory_bytes=0)


@pytest.mark.parametrize(
    ("now", "asked", "memory", "memsw"),
    [
        (UNLIMITED, Limits(memory_bytes=100, swap_bytes=50), 100, 150),
        (UNLIMITED, Limits(memory_bytes=100, swap_bytes=SWAP_UNLIMITED), 100, -1),
        (Limits(memory_bytes=100, swap_bytes=50), Limits(memory_bytes=200), 200, 250),
        (Limits(memory_bytes=100, swap_bytes=50), Limits(memory_bytes=30), 30, 80),
        (Limits(memory_bytes=100, swap_bytes=50), Limits(swap_bytes=0), 100, 100),
        (Limits(memory_bytes=100, swap_bytes=50), Limits(swap_bytes=SWAP_UNLIMITED), 100, -1),
        (Limits(memory_bytes=100, swap_bytes=SWAP_UNLIMITED), Limits(memory_bytes=200), 200, -1),
        (Limits(memory_bytes=100, swap_bytes=SWAP_UNLIMITED), Limits(swap_bytes=1), 100, 101),
        (Limits(memory_bytes=100, swap_bytes=900), Limits(memory_bytes=200, swap_bytes=0), 200, 200),
        (Limits(memory_bytes=100, swap_bytes=0), Limits(memory_bytes=50, swap_bytes=900), 50, 950),
        (Limits(memory_bytes=100, swap_bytes=50), UNLIMITED, -1, -1),
    ],
)
def test_v1_memory_is_never_above_memory_and_swap(
    now: Limits, asked: Limits, memory: int, memsw: int
) -> None:
    """The kernel refuses each single write after which it would be."""
    assert now.memory_bytes is not None
    swap = SWAP_UNLIMITED if now.swap_bytes is None else now.swap_bytes
    values = {"memory.limit_in_bytes": now.memory_bytes or -1, "memory.memsw.limit_in_bytes": -1}
    if now.memory_bytes and swap != SWAP_UNLIMITED:
        values["memory.memsw.limit_in_bytes"] = now.memory_bytes + swap
    for write in plan_writes(asked, 1, now=now):
        values[write.file] = int(write.value)
        low, high = (math.inf if value < 0 else value for value in values.values())
        assert low <= high
    assert list(values.values()) == [memory, memsw]


def test_v2_swap_is_beside_memory() -> None:
    """It stays when memory alone is changed; unlimited is the kernel's word for it."""
    now = Limits(memory_bytes=100, swap_bytes=50)
    assert texts(plan_writes(Limits(memory_bytes=200), 2, now=now)) == [
        "memory/work/memory.max=200",
        "memory/work/memory.swap.max=50",
    ]
    assert texts(plan_writes(Limits(swap_bytes=SWAP_UNLIMITED), 2, now=now)) == [
        "memory/work/memory.max=100",
        "memory/work/memory.swap.max=max",
    ]


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (1, ["memory/work/memory.limit_in_bytes=9", "memory/work/memory.memsw.limit_in_bytes=-1"]),
        (2, ["memory/work/memory.max=9", "memory/work/memory.swap.max=max"]),
    ],
)
def test_server_may_leave_swap_unlimited(version: int, files: list[str]) -> None:
    """For those who say nothing about it (--disable-swap-limit)."""
    asked = Limits(memory_bytes=9)
    found = plan_writes(asked, version, now=UNLIMITED, unstated_swap=SWAP_UNLIMITED)
    assert sorted(texts(found)) == files
    stated = plan_writes(replace(asked, swap_bytes=0), version, now=UNLIMITED, unstated_swap=SWAP_UNLIMITED)
    assert {write.value for write in stated} == ({"9"} if version == 1 else {"9", "0"})


@pytest.mark.parametrize("version", [1, 2])
def test_swap_that_is_not_counted_is_refused(tmp_path: Path, version: int) -> None:
    """Before anything is written; even 0, for nothing would keep it so."""
    cgroup = fake_cgroup(tmp_path, version)
    memory = cgroup.directory("memory", "work")
    (memory / SWAP_FILES[version]).unlink()
    with pytest.raises(NotSupported, match=r"limits\.swap_bytes"):
        write_limits(cgroup, replace(ALL, swap_bytes=0))
    assert not cgroup.directory("pids", "work", "pids.max").exists()


@pytest.mark.parametrize(("version", "expected"), [(1, "cpu/cpu.shares=280"), (2, "cpu/cpu.weight=37")])
def test_shares_go_before_the_weight(version: int, expected: str) -> None:
    """Garden's callers count in shares; v1 takes them as they are, v2 converted (statement CP2)."""
    assert texts(plan_writes(Limits(cpu_weight=50, cpu_shares=280), version)) == [expected]


def test_weight_and_shares_are_one_statement() -> None:
    """The later one counts, whichever of both it is."""
    by_weight, by_shares = Limits(cpu_weight=50), Limits(cpu_shares=280)
    assert by_weight.over(by_shares) == by_weight
    assert by_shares.over(by_weight) == by_shares
    assert Limits(pids=3).over(by_shares) == Limits(pids=3, cpu_shares=280)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, {"memory.limit_in_bytes=-1", "memory.memsw.limit_in_bytes=-1", "cpu.cfs_quota_us=-1", "pids.max=max"}),
        (2, {"memory.max=max", "memory.swap.max=max", "cpu.max=max 100000", "pids.max=max"}),
    ],
)  # fmt: skip
def test_zero_lifts_a_limit(version: int, expected: set[str]) -> None:
    """Each version has its own word for unlimited."""
    assert {text.rpartition("/")[2] for text in texts(plan_writes(NONE, version))} == expected


@pytest.mark.parametrize("version", [1, 2])
def test_no_statement_writes_nothing(version: int) -> None:
    """Unset fields leave the kernel's values alone."""
    assert plan_writes(Limits(), version) == []


@pytest.mark.parametrize("version", [1, 2])
def test_process_with_limits_carries_its_own_weight(version: int) -> None:
    """Below the container there is no other place for it."""
    leaf = ("work", "p-job")
    writes = plan_writes(Limits(cpu_weight=100, pids=5), version, leaf=leaf)
    assert {write.below for write in writes} == {leaf}


V1_UNLIMITED = str((1 << 63) - 4096)
SWAP_FILES = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
FRESH = {
    1: {"memory.limit_in_bytes": V1_UNLIMITED, SWAP_FILES[1]: V1_UNLIMITED},
    2: {"memory.max": "max\n", SWAP_FILES[2]: "max\n", "memory.current": "4096\n"},
}


def fake_cgroup(root: Path, version: int) -> ContainerCgroup:
    names = ("cpu", "cpuacct", "memory", "pids") if version == 1 else ("cpu", "memory", "pids")
    points = {name: root / (name if version == 1 else "unified") for name in names}
    cgroup = ContainerCgroup(Hierarchies(version, points), "garden-test/box")
    for directory in cgroup.all_directories("work"):
        directory.mkdir(parents=True)
    memory = cgroup.directory("memory", "work")
    for file, text in FRESH[version].items():
        (memory / file).write_text(text)
    return cgroup


def test_v1_limits_are_written_and_read_back(tmp_path: Path) -> None:
    """The reader understands what the writer writes."""
    cgroup = fake_cgroup(tmp_path, 1)
    memory = cgroup.directory("memory", "work")
    write_limits(cgroup, ALL)
    assert read_limits(cgroup) == replace(ALL, cpu_shares=512, swap_bytes=0)
    assert (memory / "memory.memsw.limit_in_bytes").read_text() == "67108864"
    (memory / "memory.limit_in_bytes").write_text(V1_UNLIMITED)
    assert read_limits(cgroup).memory_bytes == 0


def test_v2_limits_are_written_and_read_back(tmp_path: Path) -> None:
    """The reader understands what the writer writes, unlimited included."""
    cgroup = fake_cgroup(tmp_path, 2)
    write_limits(cgroup, ALL)
    assert read_limits(cgroup) == replace(ALL, swap_bytes=0)
    write_limits(cgroup, Limits(swap_bytes=SWAP_UNLIMITED))
    assert read_limits(cgroup) == replace(ALL, swap_bytes=SWAP_UNLIMITED)
    write_limits(cgroup, NONE)
    now = read_limits(cgroup)
    assert (now.memory_bytes, now.cpu_quota_us, now.pids, now.cpu_weight) == (0, 0, 0, 50)


def test_v2_limit_below_usage_is_refused(tmp_path: Path) -> None:
    """The kernel would kill for it; the caller is told instead, and nothing is changed."""
    cgroup = fake_cgroup(tmp_path, 2)
    work = cgroup.directory("memory", "work")
    (work / "memory.current").write_text(str(100 << 20))
    with pytest.raises(LimitRefused) as refused:
        write_limits(cgroup, ALL)
    assert refused.value.field == "limits.memory_bytes"
    assert (work / "memory.max").read_text() == "max\n"


HYBRID = """\
30 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 30 0:30 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
"""


def test_hierarchies_of_a_hybrid_host() -> None:
    """Two controllers in one hierarchy are one directory."""
    found = parse_hierarchies(HYBRID, 1)
    assert found.mount_points["cpu"] == found.mount_points["cpuacct"] == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert len(found.distinct()) == 3
    assert found.unified == Path("/sys/fs/cgroup/unified")


def test_hierarchies_of_a_unified_host() -> None:
    """Every controller is in the one directory."""
    found = parse_hierarchies("25 23 0:22 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n", 2)
    assert found.distinct() == [Path("/sys/fs/cgroup")]


@pytest.mark.parametrize(("version", "missing"), [(1, "pids"), (2, "cgroup2")])
def test_missing_controllers_are_named(version: int, missing: str) -> None:
    """The operator learns what to mount."""
    text = HYBRID.replace("pids", "misc").replace("cgroup2", "other")
    with pytest.raises(CgroupsMissing, match=missing):
        parse_hierarchies(text, version)


def test_oom_kills_of_both_versions(tmp_path: Path) -> None:
    """The counter has the same name in two files."""
    for version, file in ((1, "memory.oom_control"), (2, "memory.events")):
        cgroup = fake_cgroup(tmp_path / str(version), version)
        path = cgroup.directory("memory", "work", file)
        path.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
        assert read_oom_kills(cgroup, ("work",)) == 3


def test_group_that_somebody_has_removed_tells_of_no_oom_kill(tmp_path: Path) -> None:
    """A process's end must be told also then."""
    cgroup = ContainerCgroup(Hierarchies(2, {"memory": tmp_path}), "garden-test/absent")
    assert read_oom_kills(cgroup, ("work",)) == 0


def test_flat_keyed_files() -> None:
    """Lines that are no `name number` are left out."""
    assert parse_flat_keyed("a 1\nb 2 3\nc max\n\nd 4\n") == {"a": 1, "d": 4}


def test_removing_what_is_gone_is_fine(tmp_path: Path) -> None:
    """A demolition may find its work done already."""
    cgroup = ContainerCgroup(Hierarchies(2, {"pids": tmp_path}), "garden-test/absent")
    groups.remove(cgroup)
    assert groups.pids_in(cgroup) == []
    groups.kill_all(cgroup)
