"""What a test could leave on the host: mounts, loops, cgroups, links, routes, nft tables, netns, processes."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from kit.cgroups import servers_cgroups
from kit.patience import FACTOR
from kit.sharing import is_apart

SETTLE_S = 10.0 * FACTOR
# In command lines; a linter that is given the package, beside chaos, is none of them.
_OURS = ("/dev/.garden", "-m garden_py", "/garden_py/", "runc --root", "crun --root")


def snapshot() -> dict[str, set[str]]:
    """Everything of interest there is now, by kind."""
    return {
        "mounts": _mounts(),
        "cgroups": set(map(str, servers_cgroups())),
        "links": _lines(["ip", "-o", "link", "show"], column=1),
        "routes": _unreachable(),
        "nft": set(_lines(["nft", "list", "tables"])),
        "netns": set(os.listdir("/run/netns")) if Path("/run/netns").exists() else set(),
        "processes": _processes(),
        "loops": _loops(),
    }


def _mounts() -> set[str]:
    found = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return found - {
        "/run/netns"
    }  # `ip netns` makes it once for the host, with its first namespace (ip-netns(8))


def _lines(argv: list[str], column: int | None = None) -> set[str]:
    output = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20 * FACTOR).stdout
    lines = [line for line in output.splitlines() if line.strip()]
    return set(lines) if column is None else {line.split()[column] for line in lines}


def _unreachable() -> set[str]:
    """Routes of pools and subnets."""
    return {
        line
        for family in ("-4", "-6")
        for line in _lines(["ip", family, "route", "show", "type", "unreachable"])
    }


def _loops() -> set[str]:
    """Loop devices of stores. The host's are none of those who run apart from it, and make none (mark `host`)."""
    found: set[str] = set()
    if is_apart():
        return found
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # detached meanwhile
            if "store.img" in (text := file.read_text()):
                found.add(f"{file} {text}")
    return found


def _processes() -> set[str]:
    """Processes that garden makes: agents, launchers, servers, runtimes; not those that run apart from the host."""
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            command = (
                Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
            state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
            apart = ":/apart-" in Path(f"/proc/{entry}/cgroup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ours = any(word in command for word in _OURS)
        if ours and state != "Z" and not apart and "pytest" not in command:
            found.add(f"{entry} {command[:120]}")
    return found


def assert_no_trace(before: dict[str, set[str]]) -> None:
    """Compare with an earlier snapshot; the kernel gets a few seconds to finish what it does asynchronously."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        now = snapshot()
        left = {kind: sorted(now[kind] - before[kind]) for kind in now if now[kind] - before[kind]}
        if not left:
            return
        assert time.monotonic() < deadline, f"left on the host: {left}"
        time.sleep(0.1)
