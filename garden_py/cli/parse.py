"""Text of the command line into values and back. Pure; a refusal is a BadInput that says what is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from garden_py.model import size

if TYPE_CHECKING:
    from garden_py.client import BindMount, PortMapping, Stream

_NUMBER: Final = r"[0-9]{1,40}(?:\.[0-9]{1,40})?"
_DURATION: Final = re.compile(rf"(?:{_NUMBER}(?:ms|s|m|h|d))+")
_DURATION_PART: Final = re.compile(rf"({_NUMBER})(ms|s|m|h|d)")
_DURATION_MAX_S: Final = 315_576_000_000
"""What google.protobuf.Duration holds: ten thousand years."""
_DURATION_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

RLIM_INFINITY: Final = (1 << 64) - 1
SWAP_UNLIMITED: Final = (1 << 64) - 1
CPU_PERIOD_US: Final = 100_000
"""The kernel's default CFS period, against which percents count. Source: kernel docs, sched-bwc.rst."""


class BadInput(ValueError):
    """An argument that cannot be what it should be."""


def parse_size(text: str) -> int:
    """Bytes; see model.size."""
    try:
        return size.parse_size(text)
    except ValueError as error:
        raise BadInput(str(error)) from error


def parse_swap(text: str) -> int:
    """Bytes of swap; `unlimited` is SWAP_UNLIMITED."""
    return SWAP_UNLIMITED if text == "unlimited" else parse_size(text)


def parse_duration(text: str) -> timedelta:
    """`90s`, `1h30m`, `500ms`, `2d`; a bare number is seconds."""
    bare = text.strip()
    if re.fullmatch(_NUMBER, bare):
        bare += "s"
    if not _DURATION.fullmatch(bare):
        raise BadInput(f"{text!r} is not a duration; write e.g. 90s, 1h30m, 500ms")
    seconds = sum(float(count) * _DURATION_UNITS_S[unit] for count, unit in _DURATION_PART.findall(bare))
    if seconds > _DURATION_MAX_S:
        raise BadInput(f"{text!r} is more than ten thousand years")
    return timedelta(seconds=seconds)


def parse_grace_time(text: str) -> timedelta:
    """A duration, or `never`, which the server writes as zero."""
    return timedelta(0) if text == "never" else parse_duration(text)


def parse_cpu_quota(text: str) -> int:
    """Microseconds of CPU time per period: `50000`, or `150%` of one processor; 0 is unlimited."""
    match = re.fullmatch(rf"({_NUMBER})(%?)", text.strip())
    if match is None or (not match[2] and "." in match[1]):
        raise BadInput(f"{text!r} is not a CPU quota; write µs per period, e.g. 50000, or 150% of one CPU")
    quota_us = int(float(match[1]) * CPU_PERIOD_US / 100) if match[2] else int(match[1])
    if not quota_us and float(match[1]):
        raise BadInput(f"{text!r} is less than a microsecond per period; 0 is unlimited")
    return quota_us


def parse_pairs(texts: Sequence[str], what: str) -> dict[str, str]:
    """`K=V` texts as a mapping; the last one wins.

    Args:
        texts: as given.
        what: what they are, for the refusal.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BadInput(f"{what} {text!r} is not of the form NAME=VALUE")
        pairs[key] = value
    return pairs


def parse_rlimits(texts: Sequence[str]) -> dict[str, int]:
    """`nofile=1024` texts by name; `unlimited` is the largest value, RLIM_INFINITY (getrlimit(2))."""
    limits: dict[str, int] = {}
    for text in texts:
        ((name, value),) = parse_pairs([text], "rlimit").items()
        if name in limits:
            raise BadInput(f"rlimit {name} is given twice")
        if value == "unlimited":
            limits[name] = RLIM_INFINITY
        elif re.fullmatch(r"[0-9]{1,40}", value):
            limits[name] = int(value)
        else:
            raise BadInput(f"rlimit {name}={value!r} is neither a number nor unlimited")
    return limits


def format_rlimits(limits: Mapping[str, int]) -> str:
    """`core=unlimited nofile=1024`, in order of names."""
    return " ".join(
        f"{name}={'unlimited' if value == RLIM_INFINITY else value}" for name, value in sorted(limits.items())
    )


def parse_mount(text: str) -> BindMount:
    """`[container:]SRC:DST[:ro|rw]`, read-only unless told."""
    from garden_py.client.values import BindMount, MountMode, MountOrigin

    modes = {"ro": MountMode.READ_ONLY, "rw": MountMode.READ_WRITE}
    inside = text.startswith("container:")
    parts = text.removeprefix("container:").split(":")
    if len(parts) == 2:
        parts.append("ro")
    if len(parts) != 3 or parts[2] not in modes or not parts[0] or not parts[1]:
        raise BadInput(f"mount {text!r} is not of the form [container:]SRC:DST[:ro|rw]")
    origin = MountOrigin.CONTAINER if inside else MountOrigin.HOST
    return BindMount(parts[0], parts[1], modes[parts[2]], origin)


def parse_port(text: str) -> PortMapping:
    """`[HOST:]CONTAINER[/tcp|udp]`; without HOST the server picks a free port."""
    from garden_py.client.values import PortMapping, PortProtocol

    match = re.fullmatch(r"(?:([0-9]{1,40}):)?([0-9]{1,40})(?:/(tcp|udp))?", text)
    if match is None:
        raise BadInput(f"port {text!r} is not of the form [HOST:]CONTAINER[/tcp|udp]")
    for port in (match[1] or "0", match[2]):
        if int(port) > 65535:
            raise BadInput(f"port {text!r}: {port} is not within 1..65535")
    return PortMapping(int(match[1] or 0), int(match[2]), PortProtocol[(match[3] or "tcp").upper()])


def parse_signal(text: str) -> int | str:
    """`9`, `KILL` or `SIGKILL`."""
    if re.fullmatch(r"[0-9]{1,40}", text):
        return int(text)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+-]*", text):
        raise BadInput(f"{text!r} is not a signal; write a number or a name, e.g. TERM")
    return text.upper()


def parse_place(text: str) -> tuple[str | None, str]:
    """A place that `cp` copies from or to.

    Returns:
        Handle and path for `HANDLE:PATH`; None and the text for a local path or `-`. A local path that
        contains a colon is written with a leading `/` or `./`.
    """
    handle, colon, path = text.partition(":")
    if not colon or not handle or "/" in handle or text.startswith("."):
        return None, text
    if not path:
        raise BadInput(f"{text!r} names no path in the container; write {handle}:/ for its root")
    return handle, path


def format_size(count: int) -> str:
    """At most four significant characters: `512B`, `64.0M`, `1.5G`."""
    size = float(count)
    for unit in ("B", "K", "M", "G"):
        if size < 1024:
            return f"{int(size)}B" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"


def format_duration(span: timedelta) -> str:
    """The two largest units: `3d4h`, `2m10s`, `5s`; below a second in milliseconds. None is negative: clocks differ."""
    span = max(span, timedelta())
    seconds = int(span.total_seconds())
    if seconds == 0:
        return f"{span.microseconds // 1000}ms" if span else "0s"
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])


def format_port(mapping: PortMapping) -> str:
    """`8080->80/tcp`."""
    return f"{mapping.host_port}->{mapping.container_port}/{mapping.protocol.name.lower()}"


def stream_named(stderr: bool) -> Stream:
    """The stream that a `--stderr` flag asks for."""
    from garden_py.client.values import Stream

    return Stream.STDERR if stderr else Stream.STDOUT
