"""Text of the command line: what is read, what is refused, and how it is shown."""

from __future__ import annotations

from datetime import timedelta

import pytest

from garden_py.cli import parse
from garden_py.cli.copying import Kind, place_copy
from garden_py.cli.terminal import DetachScanner
from garden_py.client import BindMount, MountMode, MountOrigin, PortMapping, PortProtocol


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("65536", 65536), ("64M", 64 << 20), ("64m", 64 << 20), ("64MB", 64 << 20), ("64MiB", 64 << 20),
        ("1.5G", 3 << 29), ("1 T", 1 << 40), ("512b", 512),
    ],
)  # fmt: skip
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    """As docker and Garden take them."""
    assert parse.parse_size(text) == size


def test_sizes_are_exact() -> None:
    """A float would round it up."""
    assert parse.parse_size("9223372036854775807") == 2**63 - 1


@pytest.mark.parametrize("text", ["", "M", "12Q", "-1", "1e6", "64MM", "0x10", "٣", "9" * 5000])
def test_other_sizes_are_refused(text: str) -> None:
    """A mistyped limit must not become another limit."""
    with pytest.raises(parse.BadInput, match="is not a size"):
        parse.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1h30m", 5400), ("500ms", 0.5), ("2d", 172800), ("0", 0)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """A bare number is seconds."""
    assert parse.parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "1x", "h", "-5s", "1h 30m", "٣s", "9" * 20 + "d", "9" * 400])
def test_other_durations_are_refused(text: str) -> None:
    """Seconds taken for minutes would destroy containers too early."""
    with pytest.raises(parse.BadInput):
        parse.parse_duration(text)


@pytest.mark.parametrize(("text", "quota"), [("50000", 50000), ("150%", 150_000), ("0.5%", 500), ("0", 0)])
def test_cpu_quota_is_microseconds_or_percent(text: str, quota: int) -> None:
    """Percent of one processor, against the period of 100 ms."""
    assert parse.parse_cpu_quota(text) == quota


def test_never_is_a_grace_time() -> None:
    """Zero on the wire."""
    assert parse.parse_grace_time("never") == timedelta(0)


@pytest.mark.parametrize("text", ["1.5", "x", "-1", "%", "٣%", "9" * 400 + "%", "9" * 5000])
def test_other_cpu_quotas_are_refused(text: str) -> None:
    """1.5 could mean processors; better to ask."""
    with pytest.raises(parse.BadInput):
        parse.parse_cpu_quota(text)


def test_mounts_are_read_only_unless_told() -> None:
    """The safe mode is the short one."""
    assert parse.parse_mount("/a:/b") == BindMount("/a", "/b", MountMode.READ_ONLY)
    assert parse.parse_mount("/a:/b:rw") == BindMount("/a", "/b", MountMode.READ_WRITE)
    inside = BindMount("/a", "/b", MountMode.READ_WRITE, MountOrigin.CONTAINER)
    assert parse.parse_mount("container:/a:/b:rw") == inside
    for text in ("/a", "/a:/b:rx", ":/b", "/a:", "/a:/b:rw:z", "container:/a"):
        with pytest.raises(parse.BadInput):
            parse.parse_mount(text)


def test_ports_take_host_and_protocol() -> None:
    """HOST:CONTAINER as docker has it."""
    assert parse.parse_port("80") == PortMapping(0, 80, PortProtocol.TCP)
    assert parse.parse_port("8080:80") == PortMapping(8080, 80, PortProtocol.TCP)
    assert parse.parse_port("53/udp") == PortMapping(0, 53, PortProtocol.UDP)
    for text in ("", "x", "1:2:3", "80/icmp", "٨٠", "9" * 5000):
        with pytest.raises(parse.BadInput, match="is not of the form"):
            parse.parse_port(text)
    for text in ("70000", "99999:1", "1:123456/udp"):
        with pytest.raises(parse.BadInput, match=r"is not within 1\.\.65535"):
            parse.parse_port(text)


def test_pairs_split_at_the_first_equals_sign() -> None:
    """Values may hold more of them."""
    assert parse.parse_pairs(["A=1=2", "B="], "variable") == {"A": "1=2", "B": ""}
    with pytest.raises(parse.BadInput, match="variable 'A'"):
        parse.parse_pairs(["A"], "variable")


def test_rlimits_are_numbers_or_unlimited() -> None:
    """RLIM_INFINITY is the largest number of the wire's type."""
    assert parse.parse_rlimits(["nofile=1024", "core=unlimited"]) == {"nofile": 1024, "core": 2**64 - 1}
    with pytest.raises(parse.BadInput):
        parse.parse_rlimits(["nofile=many"])
    for text in ("nofile=٣", "nofile=" + "9" * 5000):
        with pytest.raises(parse.BadInput):
            parse.parse_rlimits([text])
    with pytest.raises(parse.BadInput, match="nofile is given twice"):
        parse.parse_rlimits(["nofile=100", "core=0", "nofile=200"])
    assert parse.format_rlimits({"nofile": 9, "core": 2**64 - 1}) == "core=unlimited nofile=9"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/x", ("web", "/x")), ("web:rel", ("web", "rel")), ("/x:y", (None, "/x:y")), ("./x:y", (None, "./x:y")),
        ("plain", (None, "plain")), ("-", (None, "-")), ("a/b:c", (None, "a/b:c")),
    ],
)  # fmt: skip
def test_places_tell_containers_from_local_paths(text: str, place: tuple[str | None, str]) -> None:
    """A local path with a colon needs a slash before it."""
    assert parse.parse_place(text) == place


def test_a_handle_without_a_path_is_refused() -> None:
    """The root of a container is asked for by its name."""
    with pytest.raises(parse.BadInput, match="web:/"):
        parse.parse_place("web:")


@pytest.mark.parametrize(
    ("name", "target", "kind", "is_dir", "placed"),
    [
        ("f", "/etc", Kind.DIRECTORY, False, ("/etc", "f")),
        ("f", "/etc/g", Kind.MISSING, False, ("/etc", "g")),
        ("f", "/etc/g", Kind.OTHER, False, ("/etc", "g")),
        ("f", "/new/", Kind.MISSING, False, ("/new/", "f")),
        ("d", "/srv", Kind.DIRECTORY, True, ("/srv", "d")),
        ("d", "/new", Kind.MISSING, True, ("/", "new")),
        (".", "/new", Kind.MISSING, True, ("/new", ".")),
        ("f", "here", Kind.MISSING, False, (".", "here")),
        ("f", ".", Kind.DIRECTORY, False, (".", "f")),
    ],
)
def test_copies_are_placed_as_docker_places_them(
    name: str, target: str, kind: Kind, is_dir: bool, placed: tuple[str, str]
) -> None:
    """A table that users know by heart."""
    assert place_copy(name, target, kind, source_is_directory=is_dir) == placed


def test_a_directory_cannot_replace_a_file() -> None:
    """Docker refuses it too; anything else would destroy the file."""
    with pytest.raises(parse.BadInput):
        place_copy("d", "/etc/passwd", Kind.OTHER, source_is_directory=True)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (64 << 20, "64.0M"), (1 << 40, "1.0T")]
)
def test_sizes_are_shown_short(size: int, text: str) -> None:
    """They stand in narrow columns."""
    assert parse.format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.25, "250ms"), (61, "1m1s"), (90061, "1d1h"), (3600, "1h"), (-5, "0s")]
)
def test_durations_are_shown_in_two_units(seconds: float, text: str) -> None:
    """More would be noise."""
    assert parse.format_duration(timedelta(seconds=seconds)) == text


def test_detach_keys_are_found_across_reads() -> None:
    """A terminal delivers one key per read."""
    scanner = DetachScanner()
    assert scanner.feed(b"ls\r") == (b"ls\r", False)
    assert scanner.feed(b"\x10") == (b"", False)
    assert scanner.feed(b"\x11") == (b"", True)


def test_half_of_the_detach_keys_is_passed_on_with_what_follows() -> None:
    """Ctrl-P alone is history in every shell."""
    scanner = DetachScanner()
    assert scanner.feed(b"\x10") == (b"", False)
    assert scanner.feed(b"a") == (b"\x10a", False)
    assert scanner.feed(b"\x10\x10") == (b"\x10", False)
    assert scanner.feed(b"\x11") == (b"", True)
