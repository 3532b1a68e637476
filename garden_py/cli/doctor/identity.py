"""Checks of identity and resources: capabilities, uid ranges, memory, open files, process numbers."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from garden_py.cli.doctor.finding import Finding, Level

# By bit number; linux/capability.h of Linux 6. Later ones are shown by number.
_WORDS: Final = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
    "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT "
    "SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE "
    "AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ "
    "PERFMON BPF CHECKPOINT_RESTORE"
)
_CAPABILITIES: Final = tuple(_WORDS.split())
# Without these no container can be made.
_NEEDED_WORDS: Final = (
    "CHOWN DAC_OVERRIDE FOWNER KILL MKNOD NET_ADMIN SETFCAP SETGID SETPCAP SETUID SYS_ADMIN SYS_CHROOT"
)

_CONTAINER_BYTES: Final = 10 << 20
"""What an idle container may cost in memory: the agent, its kernel objects, its share of the server."""
_WANTED_OPEN_FILES: Final = 65_536


@dataclass(frozen=True, slots=True)
class IdRange:
    """Host ids from start, so many; and who says so."""

    start: int
    count: int
    source: str

    def overlaps(self, other: IdRange) -> bool:
        """Whether any id is in both."""
        return self.start < other.start + other.count and other.start < self.start + self.count


def capability_names(mask: int) -> list[str]:
    """Names of the bits of a mask, lowest first. Pure."""
    return [
        _CAPABILITIES[bit] if bit < len(_CAPABILITIES) else f"CAP_{bit}"
        for bit in range(mask.bit_length())
        if mask >> bit & 1
    ]


def check_capabilities() -> Finding:
    """What is missing from the bounding set can be given to nobody (capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    bounding = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapBnd:"))
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    missing = capability_names(((1 << (last + 1)) - 1) & ~bounding)
    if not missing:
        return Finding("capabilities", Level.OK, "all are in the bounding set")
    names = ", ".join(missing)
    if needed := sorted(set(_NEEDED_WORDS.split()) & set(missing)):
        return Finding(
            "capabilities",
            Level.FAIL,
            f"missing: {names}",
            f"no container can be made without {', '.join(needed)}",
            "start the server without a reduced bounding set",
        )
    return Finding(
        "capabilities",
        Level.WARN,
        f"missing: {names}",
        "privileged containers get all but these; without SYS_RESOURCE nobody raises a hard rlimit",
        "start the server without a reduced bounding set",
    )


def check_uid_pool(start: int, count: int) -> Finding:
    """Whether somebody else uses the host ids that containers are to be given."""
    pool = IdRange(start, count, "pool")
    claims = [*_assigned_ranges(), *_mapped_ranges()]
    taken = sorted({claim.source for claim in claims if claim.overlaps(pool)})
    found = f"{start} to {start + count - 1}"
    if not taken:
        return Finding("uid pool", Level.OK, f"{found} are used by nobody")
    return Finding(
        "uid pool",
        Level.WARN,
        f"{found} overlap with {', '.join(taken[:5])}" + (f" and {len(taken) - 5} more" if taken[5:] else ""),
        "unless those are containers of this server, processes here and there could be the same user",
        "garden server --uid-pool-start above all of them",
    )


def parse_subids(text: str, source: str) -> list[IdRange]:
    """Lines `user:start:count` of subuid(5). Pure."""
    ranges = []
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
            ranges.append(IdRange(int(fields[1]), int(fields[2]), f"{source} ({fields[0]})"))
    return ranges


def parse_id_map(text: str, source: str) -> list[IdRange]:
    """Lines of /proc/PID/uid_map, leaving out what maps the host's own ids onto themselves. Pure."""
    ranges = []
    for line in text.splitlines():
        inside, outside, count = map(int, line.split())
        if inside != outside:
            ranges.append(IdRange(outside, count, source))
    return ranges


def _assigned_ranges() -> list[IdRange]:
    return [
        each
        for path in (Path("/etc/subuid"), Path("/etc/subgid"))
        if path.exists()
        for each in parse_subids(path.read_text(errors="replace"), str(path))
    ]


def _mapped_ranges() -> list[IdRange]:
    ranges = []
    for path in Path("/proc").glob("[0-9]*/uid_map"):
        try:
            ranges += parse_id_map(path.read_text(), f"process {path.parent.name}")
        except OSError:
            continue  # the process has ended meanwhile (ESRCH)
    return ranges


def check_memory() -> Finding:
    """Room for containers, by the memory that an idle one costs."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available_bytes = int(facts["MemAvailable"].split()[0]) << 10
    room = available_bytes // _CONTAINER_BYTES
    found = f"{available_bytes >> 20} MiB available, room for about {room} idle containers"
    if room < 10:
        return Finding("memory", Level.WARN, found, "creates may fail", "free some, or --max-containers")
    return Finding("memory", Level.OK, found)


def check_open_files() -> Finding:
    """The server holds a few descriptors per container and per stream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= _WANTED_OPEN_FILES:
        return Finding("open files", Level.OK, "unlimited" if hard < 0 else f"up to {hard}")
    return Finding(
        "open files",
        Level.WARN,
        f"at most {hard}",
        f"room for about {hard // 16} containers, and no nofile limit above it",
        "ulimit -Hn 1048576, or LimitNOFILE= of the unit",
    )


def check_process_numbers() -> Finding:
    """All containers share the host's process numbers."""
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    if most > 32_768:
        return Finding("process numbers", Level.OK, f"up to {most}")
    return Finding(
        "process numbers",
        Level.WARN,
        f"up to {most} for all containers together",
        "many busy containers run out of them",
        "sysctl kernel.pid_max=4194304",
    )
