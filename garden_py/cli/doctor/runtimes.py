"""Checks of the OCI runtimes: which version, and which of its known holes are closed.

A distribution closes holes without changing the upstream version, so the package's own changelog is asked as
well. A hole counts as closed if the upstream version has the fix or the changelog names it; otherwise it is
reported as open *as far as can be seen* (a private build may have closed it without saying so).
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from garden_py.cli.doctor.finding import Finding, Level

_TIMEOUT_S: Final = 10.0

Version = tuple[int, int, int, int]
"""major, minor, patch, release candidate (a final release sorts after all of its candidates)."""

_FINAL: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Hole:
    """A known way out of a container.

    Attributes:
        name: CVE number.
        fixed_in: upstream versions with the fix, one for each maintained series, ascending.
        what: the class of hole in few words.
        here: why it is out of reach, or harder, in containers that garden makes; empty if it is not.
    """

    name: str
    fixed_in: tuple[str, ...]
    what: str
    here: str = ""


# Source: the security advisories of opencontainers/runc on GitHub.
RUNC_HOLES: Final = (
    Hole("CVE-2019-5736", ("1.0.0-rc7",), "host binary overwritten through /proc/self/exe"),
    Hole("CVE-2021-30465", ("1.0.0-rc95",), "mount target swapped for a symlink"),
    Hole("CVE-2021-43784", ("1.0.3",), "bind mount sources overflow a netlink length"),
    Hole("CVE-2022-29162", ("1.1.2",), "inheritable capabilities", "garden gives none"),
    Hole("CVE-2023-25809", ("1.1.5",), "writable /sys/fs/cgroup"),
    Hole("CVE-2023-27561", ("1.1.5",), "/proc replaced by a volume", "garden refuses mounts at /proc"),
    Hole("CVE-2023-28642", ("1.1.5",), "/proc as a symlink bypasses AppArmor"),
    Hole("CVE-2024-21626", ("1.1.12",), "leaked descriptor and working directory"),
    Hole("CVE-2024-45310", ("1.1.14", "1.2.0-rc.3"), "empty files made on the host through a swapped mount"),
    Hole("CVE-2025-31133", ("1.2.8", "1.3.3", "1.4.0-rc.3"), "masked path replaced through /dev/null"),
    Hole(
        "CVE-2025-52565",
        ("1.2.8", "1.3.3", "1.4.0-rc.3"),
        "/dev/console mount redirected",
        "garden never lets runc make a terminal",
    ),
    Hole("CVE-2025-52881", ("1.2.8", "1.3.3", "1.4.0-rc.3"), "writes to /proc redirected"),
    Hole("CVE-2026-41579", ("1.3.6", "1.4.3", "1.5.0-rc.3"), "/dev of the image is a symlink"),
)
# Source: the security advisories of containers/crun on GitHub.
CRUN_HOLES: Final = (
    Hole("CVE-2022-27650", ("1.4.4",), "inheritable capabilities", "garden gives none"),
    Hole(
        "CVE-2025-24965",
        ("1.20",),
        "krun configuration leaves the root",
        "garden does not use the krun handler",
    ),
)


@dataclass(frozen=True, slots=True)
class Runtime:
    """An installed runtime: what it says of itself and what its package says of it."""

    name: str
    path: str
    version: str
    package: str
    changelog: str


def parse_version(text: str) -> Version | None:
    """`1.1.5+ds1`, `1.4.0-rc.3`, `1.20` as numbers that compare in release order; None if it is no version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-rc\.?(\d+))?", text)
    if match is None:
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0), int(match[4] or _FINAL)


def is_fixed(version: Version, fixed_in: tuple[str, ...]) -> bool:
    """Whether a version has a fix that went into several series.

    Args:
        version: what is installed.
        fixed_in: the first fixed version of each series, ascending. A series newer than the last has the fix;
            one between two of them has it only from the next one's version on.
    """
    for text in fixed_in:
        fixed = parse_version(text)
        if fixed is not None and version[:2] == fixed[:2]:
            return version >= fixed
    newest = parse_version(fixed_in[-1])
    return newest is not None and version > newest


def open_holes(version: Version, changelog: str, holes: tuple[Hole, ...]) -> list[Hole]:
    """The holes that neither the version nor the package's changelog says to be closed. Pure."""
    return [hole for hole in holes if not is_fixed(version, hole.fixed_in) and hole.name not in changelog]


def check_runtimes(wanted: str) -> list[Finding]:
    """Both runtimes, if they are there; the one that the server is to use must be."""
    findings = []
    for name, holes in (("runc", RUNC_HOLES), ("crun", CRUN_HOLES)):
        runtime = find_runtime(name)
        if runtime is not None:
            findings.append(judge_runtime(runtime, holes))
        elif name == wanted:
            findings.append(
                Finding(name, Level.FAIL, "not installed", "no container can be made", f"apt install {name}")
            )
        else:
            findings.append(Finding(name, Level.OK, f"not installed; {wanted} is used"))
    return findings


def judge_runtime(runtime: Runtime, holes: tuple[Hole, ...]) -> Finding:
    """What is to be said of an installed runtime. Pure."""
    found = f"{runtime.version} at {runtime.path}" + (
        f", package {runtime.package}" if runtime.package else ""
    )
    version = parse_version(runtime.version)
    if version is None:
        return Finding(
            runtime.name, Level.WARN, found, "its version cannot be read, so its holes are unknown"
        )
    unfixed = open_holes(version, runtime.changelog, holes)
    if not unfixed:
        return Finding(runtime.name, Level.OK, f"{found}; no known hole is open")
    described = [
        f"{hole.name} ({hole.what}{f'; here: {hole.here}' if hole.here else ''})" for hole in unfixed
    ]
    source = "its version and its package's changelog" if runtime.changelog else "its version alone"
    return Finding(
        runtime.name,
        Level.WARN,
        found,
        f"open, as far as {source} can tell: " + ", ".join(described),
        f"a newer {runtime.name}: {_newest_fix(unfixed)} or later of its series closes all of them",
    )


def _newest_fix(holes: list[Hole]) -> str:
    last = max(holes, key=lambda hole: parse_version(hole.fixed_in[-1]) or (0, 0, 0, 0))
    return ", ".join(last.fixed_in)


def find_runtime(name: str) -> Runtime | None:
    """The runtime on PATH, asked for its version; None if there is none."""
    path = shutil.which(name)
    if path is None:
        return None
    words = _output([path, "--version"]).split()
    version = words[2] if len(words) > 2 and words[1] == "version" else ""
    package = _output(["dpkg-query", "--show", "--showformat", "${Version}", name]) if _has_dpkg() else ""
    return Runtime(name, path, version, package, _read_changelog(name) if package else "")


def _has_dpkg() -> bool:
    return shutil.which("dpkg-query") is not None


def _output(argv: list[str]) -> str:
    """Stdout of a command; empty if it fails, which the caller reports as not known."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read_changelog(package: str) -> str:
    """The Debian changelog of an installed package; empty if the image was stripped of it."""
    path = Path(f"/usr/share/doc/{package}/changelog.Debian.gz")
    if not path.exists():
        return ""
    with gzip.open(path, "rt", errors="replace") as file:
        return file.read()
