"""Bind mounts: what of the host a container or process sees."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from enum import Enum

from .errors import FieldViolation

# Mounting over these would hide what the isolation and the agent depend on (runc CVE-2019-19921 class).
GUARDED_DESTINATIONS = ("/proc", "/sys", "/dev")


class MountMode(Enum):
    """Whether a bind mount may be written."""

    READ_ONLY = "ro"
    READ_WRITE = "rw"


class MountOrigin(Enum):
    """Whose path the source of a bind mount is."""

    HOST = "host"
    CONTAINER = "container"


@dataclass(frozen=True, slots=True)
class BindMount:
    """A file or directory shown at another place in the container.

    Attributes:
        source: absolute path; must exist when the container is made.
        destination: absolute path in the container.
        origin: whether source is a path of the host, or of the container's own root file system, in which links are
            followed as a process in it would.
    """

    source: str
    destination: str
    mode: MountMode = MountMode.READ_ONLY
    origin: MountOrigin = MountOrigin.HOST


def mount_violations(mounts: tuple[BindMount, ...], prefix: str) -> list[FieldViolation]:
    """Bind mounts whose paths are none, or that would hide what containers depend on."""
    found: list[FieldViolation] = []
    seen: set[str] = set()
    for i, mount in enumerate(mounts):
        at = f"{prefix}[{i}]"
        if not mount.source.startswith("/") or "\0" in mount.source:
            found.append(FieldViolation(f"{at}.source", "must be an absolute path"))
        # normpath keeps exactly two leading slashes (POSIX lets them mean something else; Linux does not).
        destination = posixpath.normpath("/" + mount.destination.lstrip("/"))
        if not mount.destination.startswith("/") or "\0" in mount.destination:
            found.append(FieldViolation(f"{at}.destination", "must be an absolute path"))
        elif ".." in mount.destination.split("/"):
            found.append(FieldViolation(f"{at}.destination", "must not contain '..'"))
        elif destination == "/":
            found.append(FieldViolation(f"{at}.destination", "must not be the root directory"))
        elif any(f"{destination}/".startswith(f"{guarded}/") for guarded in GUARDED_DESTINATIONS):
            found.append(FieldViolation(f"{at}.destination", "must not be at or below /proc, /sys or /dev"))
        elif destination in seen:
            found.append(FieldViolation(f"{at}.destination", f"{destination} is mounted twice"))
        seen.add(destination)
    return found
