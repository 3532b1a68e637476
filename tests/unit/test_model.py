"""The rules of the nouns: what is refused, and the field that is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.model.errors import InvalidRequest
from garden_py.model.files import BindMount
from garden_py.model.handle import hostname_for, hostname_problem, make_name, name_problem
from garden_py.model.lifecycle import FOLLOWERS, State, may_follow
from garden_py.model.limits import (
    MEMORY_FLOOR_BYTES,
    SWAP_UNLIMITED,
    Limits,
    shares_from_weight,
    weight_from_shares,
)
from garden_py.model.process import (
    ARG_MAX_BYTES,
    ExitStatus,
    ProcessSpec,
    WindowSize,
    check_process,
    parse_signal,
    signal_name,
)
from garden_py.model.spec import ContainerSpec, PortMapping, Transport, check_container


def violations(check: Any, spec: Any) -> set[str]:
    """The fields that a check refuses."""
    try:
        check(spec)
    except InvalidRequest as refused:
        return {violation.field for violation in refused.violations}
    return set()


# --- names


@pytest.mark.parametrize("name", ["a", "_x", "0", "A.b-c_d", "x" * 128, "a.."])
def test_good_names(name: str) -> None:
    """Everything a scheduler uses as an id."""
    assert name_problem(name) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "a\0b", "a\n", "ä", "٣", "x" * 129, "x" * 300]
)
def test_bad_names(name: str) -> None:
    """Nothing that could be a path, an option, or two different names for one file."""
    assert name_problem(name)


def test_made_names_are_good_names() -> None:
    """The server keeps its own rules."""
    assert name_problem(make_name()) is None


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", fullmatch=True))
def test_hostname_from_any_handle_has_the_right_length(handle: str) -> None:
    """H1: the last 49 characters, and never empty."""
    hostname = hostname_for(handle)
    assert 1 <= len(hostname) <= 49
    assert handle.endswith(hostname) or hostname == "container"
    assert not hostname.startswith((".", "-"))


def test_hostname_of_a_long_handle() -> None:
    """The example of statement H1."""
    handle = "7132-ec774112a9cd-101f8293-230e-4fa8-4138-e8244e6dcfa1"
    assert hostname_for(handle) == "ec774112a9cd-101f8293-230e-4fa8-4138-e8244e6dcfa1"


@pytest.mark.parametrize("hostname", ["", "-a", "a-", "a" * 64, "a b", "a\0"])
def test_bad_hostnames(hostname: str) -> None:
    """hostname(7)."""
    assert hostname_problem(hostname)


# --- lifecycle


def test_destroying_is_reachable_from_every_state_and_left_only_for_unkillable() -> None:
    """A container can always be destroyed, and nothing brings back what is being destroyed."""
    for state in State:
        assert may_follow(state, State.DESTROYING) or state is State.DESTROYING
    assert FOLLOWERS[State.DESTROYING] == {State.UNKILLABLE}
    assert not may_follow(State.BROKEN, State.ACTIVE)


# --- limits


@pytest.mark.parametrize(
    ("limits", "fields"),
    [
        (Limits(memory_bytes=MEMORY_FLOOR_BYTES - 1), {"spec.limits.memory_bytes"}),
        (Limits(memory_bytes=1 << 63), {"spec.limits.memory_bytes"}),
        (Limits(cpu_weight=0), {"spec.limits.cpu_weight"}),
        (Limits(cpu_weight=10_001), {"spec.limits.cpu_weight"}),
        (Limits(cpu_quota_us=999), {"spec.limits.cpu_quota_us"}),
        (Limits(cpu_quota_us=5000, cpu_period_us=999), {"spec.limits.cpu_period_us"}),
        (Limits(cpu_quota_us=5000, cpu_period_us=1_000_001), {"spec.limits.cpu_period_us"}),
        (Limits(cpu_period_us=50_000), {"spec.limits.cpu_period_us"}),
        (Limits(pids=4_194_305), {"spec.limits.pids"}),
        (Limits(memory_bytes=1 << 30, swap_bytes=1 << 63), {"spec.limits.swap_bytes"}),
        (Limits(memory_bytes=0, swap_bytes=0), {"spec.limits.swap_bytes"}),
        (Limits(swap_bytes=1), {"spec.limits.swap_bytes"}),
        (Limits(memory_bytes=1 << 30, swap_bytes=0), set()),
        (Limits(memory_bytes=1 << 30, swap_bytes=SWAP_UNLIMITED), set()),
        (Limits(memory_bytes=MEMORY_FLOOR_BYTES, cpu_weight=1, cpu_quota_us=1000, pids=1), set()),
        (Limits(memory_bytes=0, cpu_quota_us=0, pids=0), set()),
    ],
)
def test_limits_of_containers_and_processes(limits: Limits, fields: set[str]) -> None:
    """The same rule in both places, and unlimited is allowed where it says so."""
    assert violations(check_container, ContainerSpec(limits=limits)) == fields
    assert violations(check_process, ProcessSpec(path="x", limits=limits)) == fields


def test_limits_over_older_ones() -> None:
    """A field without a statement keeps the older value; zero is a statement."""
    older = Limits(memory_bytes=1, cpu_weight=2, pids=3)
    assert Limits(memory_bytes=0, pids=9).over(older) == Limits(memory_bytes=0, cpu_weight=2, pids=9)
    named, other = (("core", 1), ("nofile", 2)), (("nofile", 3), ("as", 4))
    assert Limits(rlimits=other).over(Limits(rlimits=named)).rlimits == (
        ("as", 4),
        ("core", 1),
        ("nofile", 3),
    )
    limited = Limits(memory_bytes=1, swap_bytes=2)
    assert Limits(memory_bytes=3).over(limited) == Limits(memory_bytes=3, swap_bytes=2)
    assert Limits(memory_bytes=0).over(limited) == Limits(
        memory_bytes=0
    )  # there is nothing it could be on top of
    assert Limits().empty()
    assert not Limits(pids=0).empty()


@pytest.mark.parametrize(
    ("shares", "weight"),
    [(0, 1), (2, 1), (10, 4), (50, 10), (100, 17), (280, 37), (512, 59), (1024, 100),
     (1028, 101), (8192, 532), (262_144, 10_000)],
)  # fmt: skip
def test_weight_from_shares(shares: int, weight: int) -> None:
    """The examples of statement CP2."""
    assert weight_from_shares(shares) == weight


@given(st.integers(1, 10_000))
def test_shares_keep_the_ratio_to_the_default(weight: int) -> None:
    """Two containers share a v1 host as they would a v2 host."""
    assert shares_from_weight(weight) == max(2, round(weight * 10.24))


# --- containers


def mounts(*pairs: tuple[str, str]) -> tuple[BindMount, ...]:
    return tuple(BindMount(source, destination) for source, destination in pairs)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"handle": "a/b"}, {"spec.handle"}),
        ({"hostname": "-"}, {"spec.hostname"}),
        ({"image": "relative"}, {"spec.image"}),
        ({"image": "/with\0nul"}, {"spec.image"}),
        ({"image": "docker:///Busybox"}, {"spec.image"}),
        ({"image": "raw:///srv/image"}, set()),
        ({"env": ("NOVALUE",)}, {"spec.env[0]"}),
        ({"env": ("A=1", "=x", "B=\0")}, {"spec.env[1]", "spec.env[2]"}),
        ({"properties": (("", "x"),)}, {"spec.properties"}),
        ({"properties": (("k", "v" * (1 << 20)),)}, {"spec.properties"}),
        ({"grace_time_s": -1.0}, {"spec.grace_time"}),
        ({"grace_time_s": 1e12}, {"spec.grace_time"}),
        ({"bind_mounts": mounts(("relative", "/x"))}, {"spec.bind_mounts[0].source"}),
        ({"bind_mounts": mounts(("/a", "x"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "/"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "//"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "/proc"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "/x/../proc/1"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "/sys/fs/cgroup"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "/dev/null"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "//proc/x"))}, {"spec.bind_mounts[0].destination"}),
        ({"bind_mounts": mounts(("/a", "/x"), ("/b", "/x/"))}, {"spec.bind_mounts[1].destination"}),
        ({"bind_mounts": mounts(("/a", "/process"), ("/a", "/system"))}, set()),
        ({"port_mappings": (PortMapping(70_000, 1),)}, {"spec.port_mappings[0].host_port"}),
        ({"port_mappings": (PortMapping(1, 70_000),)}, {"spec.port_mappings[0].container_port"}),
        ({"port_mappings": (PortMapping(5, 1), PortMapping(5, 2))}, {"spec.port_mappings[1].host_port"}),
        ({"port_mappings": (PortMapping(5, 1), PortMapping(5, 1, Transport.UDP))}, set()),
        ({"port_mappings": (PortMapping(0, 1), PortMapping(0, 1))}, set()),
        (
            {"limits": Limits(rlimits=(("files", 1), ("core", -1), ("as", 9)))},
            {"spec.limits.rlimits[files]", "spec.limits.rlimits[core]"},
        ),
    ],
)  # fmt: skip
def test_container_specs(changes: dict[str, Any], fields: set[str]) -> None:
    """Each bad field is named, and only those."""
    assert violations(check_container, replace(ContainerSpec(handle="box"), **changes)) == fields


# --- processes


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"path": ""}, {"spec.path"}),
        ({"path": "a\0b"}, {"spec.path"}),
        ({"id": "a/b"}, {"spec.id"}),
        ({"args": ("a", "b\0")}, {"spec.args"}),
        ({"args": ("x" * ARG_MAX_BYTES,)}, {"spec.args"}),
        ({"env": ("A",)}, {"spec.env[0]"}),
        ({"dir": "relative"}, {"spec.dir"}),
        ({"user": "a\0"}, {"spec.user"}),
        ({"tty": WindowSize(70_000, 1)}, {"spec.tty"}),
        ({"limits": Limits(rlimits=(("nofile", 1),))}, {"spec.limits.rlimits"}),
        (
            {"limits": Limits(network_rx_bytes_per_s=1 << 20, io_read_ops_per_s=9)},
            {"spec.limits.network_rx_bytes_per_s", "spec.limits.io_read_ops_per_s"},
        ),
        ({"rlimits": (("files", 1),)}, {"spec.rlimits[files]"}),
        ({"rlimits": (("nofile", -1),)}, {"spec.rlimits[nofile]"}),
        ({"rlimits": (("nofile", 1 << 64),)}, {"spec.rlimits[nofile]"}),
        ({"output_retention_bytes": 1}, {"spec.output_retention_bytes"}),
        ({"rlimits": (("nofile", (1 << 64) - 1),), "dir": "/x", "tty": WindowSize(0, 0)}, set()),
    ],
)
def test_process_specs(changes: dict[str, Any], fields: set[str]) -> None:
    """Each bad field is named, and only those."""
    assert violations(check_process, replace(ProcessSpec(path="true"), **changes)) == fields


@pytest.mark.parametrize(
    ("text", "number"),
    [("TERM", 15), ("SIGTERM", 15), ("term", 15), ("9", 9), ("USR1", 10), ("64", 64), ("RTMIN", 34)],
)
def test_signals_by_name_and_number(text: str, number: int) -> None:
    """As kill(1) takes them."""
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "-1", "NOPE", "SIG", "١٥", "15.0", "SIG15"])
def test_unknown_signals(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="unknown signal"):
        parse_signal(text)


def test_signal_names() -> None:
    """Real-time signals without a name get a number."""
    assert (signal_name(9), signal_name(40)) == ("SIGKILL", "signal 40")


@pytest.mark.parametrize(
    ("status", "code"), [(ExitStatus(0, None), 0), (ExitStatus(255, None), 255), (ExitStatus(None, 9), 137)]
)
def test_shell_codes(status: ExitStatus, code: int) -> None:
    """128 + signal, as a shell has it."""
    assert status.shell_code() == code
