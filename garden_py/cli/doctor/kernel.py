"""Checks of the kernel: namespaces, mounts, cgroups, pidfd, splice, seccomp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from garden_py.backend.cgroup import scope
from garden_py.backend.host import apparmor, syscalls
from garden_py.backend.host.small_files import lines_of, read_mountinfo
from garden_py.cli.doctor.finding import Doubt, Finding, Level, judge
from garden_py.cli.doctor.trial import TRIAL_UID, attempt, scratch_directory, user_namespace

_NEEDED_CONTROLLERS: Final = ("memory", "cpu", "pids")
_WANTED_CONTROLLERS: Final = ("cpuacct", "devices", "freezer", "blkio", "cpuset")


def check_root() -> Finding:
    """Only root may make containers."""
    uid = os.geteuid()
    doubt = Doubt(Level.FAIL, "the server cannot start, and the trials below fail", "run it as root")
    return judge("root", "" if uid == 0 else f"running as uid {uid}", "running as root", doubt)


def check_user_namespaces() -> Finding:
    """Containers without them would share root with the host."""

    def enter() -> None:
        with user_namespace():
            pass

    limit = Path("/proc/sys/user/max_user_namespaces")
    allowed = limit.read_text().strip() if limit.exists() else "?"
    doubt = Doubt(
        Level.FAIL,
        "only privileged containers would be possible",
        "sysctl user.max_user_namespaces=15000; kernel with CONFIG_USER_NS",
    )
    return judge("user namespaces", attempt(enter), f"work; at most {allowed}", doubt)


def check_overlayfs(state_dir: Path) -> Finding:
    """The writable layer of each container is an overlayfs upper directory below the state directory."""
    with scratch_directory(state_dir) as top:
        failure = attempt(lambda: _mount_overlay(top, _make_layers(top)), namespaces=syscalls.CLONE_NEWNS)
    doubt = Doubt(
        Level.FAIL,
        "no container can be made",
        "modprobe overlay; put --state-dir on ext4, xfs or btrfs, not on another overlayfs",
    )
    return judge("overlayfs", failure, f"mounts with its upper layer on {_nearest(state_dir)}", doubt)


def check_idmapped_mounts(state_dir: Path) -> Finding:
    """One unpacked image serves containers with different uid ranges (mount_setattr(2), Linux 5.12)."""

    def map_owner() -> None:
        lower = _map_layer(top, _make_layers(top))
        _expect_owner(lower / "of-root")

    with scratch_directory(state_dir) as top:
        failure = attempt(map_owner, namespaces=syscalls.CLONE_NEWNS)
    return judge("id-mapped mounts", failure, "work", _NO_IDMAP)


def check_idmapped_overlay(state_dir: Path) -> Finding:
    """Overlayfs must take an id-mapped directory as its lower layer (Linux 5.19)."""

    def map_and_overlay() -> None:
        lower = _map_layer(top, _make_layers(top))
        _mount_overlay(top, lower)
        _expect_owner(top / "root" / "of-root")

    with scratch_directory(state_dir) as top:
        failure = attempt(map_and_overlay, namespaces=syscalls.CLONE_NEWNS)
    return judge("overlayfs over id-mapped", failure, "work together", _NO_IDMAP)


_NO_IDMAP: Final = Doubt(
    Level.FAIL,
    "unprivileged containers cannot share an image",
    "Linux 5.19 or later; image and state directory on ext4, xfs or btrfs",
)


def _make_layers(top: Path) -> Path:
    """Directories for one overlay; returns the lower one, which holds a file of root."""
    for name in ("image", "low", "up", "work", "root"):
        (top / name).mkdir()
    (top / "image" / "of-root").touch()
    return top / "image"


def _map_layer(top: Path, image: Path) -> Path:
    with user_namespace() as userns_fd:
        mount_fd = syscalls.clone_mount(image)
        syscalls.set_mount_attributes(mount_fd, 0, userns_fd=userns_fd)
        syscalls.attach_mount(mount_fd, top / "low")
        os.close(mount_fd)
    return top / "low"


def _mount_overlay(top: Path, lower: Path) -> None:
    options = f"lowerdir={lower},upperdir={top / 'up'},workdir={top / 'work'}"
    syscalls.mount("overlay", top / "root", "overlay", 0, options)
    (top / "root" / "written").touch()


def _expect_owner(path: Path) -> None:
    owner = path.stat().st_uid
    if owner != TRIAL_UID:
        raise OSError(f"a file of root appears as uid {owner}, not as the container's root")


def check_pidfd() -> Finding:
    """Signals reach the process that was meant, not a later one with its number (pidfd_open(2), Linux 5.3)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        failure = ""
    except OSError as error:
        failure = str(error)
    return judge(
        "pidfd", failure, "works", Doubt(Level.FAIL, "processes cannot be tracked", "Linux 5.3 or later")
    )


def check_splice(state_dir: Path) -> Finding:
    """Output goes from pipe to file inside the kernel, so a killed server loses none (splice(2))."""

    def move() -> None:
        read_fd, write_fd = os.pipe()
        os.write(write_fd, b"twelve bytes")
        fd = os.open(top / "segment", os.O_RDWR | os.O_CREAT, 0o600)
        if os.splice(read_fd, fd, 12, offset_dst=0) != 12 or os.pread(fd, 12, 0) != b"twelve bytes":
            raise OSError("splice moved something else than it was given")

    with scratch_directory(state_dir) as top:
        failure = attempt(move)
    doubt = Doubt(Level.FAIL, "output cannot be kept", "put --state-dir on ext4, xfs or btrfs")
    return judge("splice to files", failure, f"works on {_nearest(state_dir)}", doubt)


def _nearest(path: Path) -> Path:
    while not path.is_dir():
        path = path.parent
    return path


def check_seccomp() -> Finding:
    """System calls that containers have no use for are refused."""
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    failure = "" if actions.exists() and "errno" in actions.read_text().split() else "not in this kernel"
    doubt = Doubt(Level.FAIL, "containers could make any system call", "kernel with CONFIG_SECCOMP_FILTER")
    return judge("seccomp", failure, "filters work", doubt)


def check_apparmor() -> Finding:
    """Only asked for by `garden server --apparmor`."""
    doubt = Doubt(
        Level.WARN,
        "`garden server --apparmor` refuses to start",
        "kernel with CONFIG_SECURITY_APPARMOR, booted with apparmor=1 security=apparmor",
    )
    return judge("apparmor", apparmor.find_obstacle(), "processes can be confined", doubt)


def check_systemd() -> Finding:
    """Only asked for by `garden server --cgroup-driver systemd`."""
    doubt = Doubt(
        Level.WARN,
        "`garden server --cgroup-driver systemd` refuses to start",
        "boot with systemd as PID 1 and systemd.unified_cgroup_hierarchy=1",
    )
    version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
    return judge("systemd", scope.find_obstacle(version), "can make scopes", doubt)


def check_cgroups() -> Finding:
    """Which version carries the controllers, and which of them are there."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if unified.exists():
        version, present = "version 2", set(unified.read_text().split())
        wanted: tuple[str, ...] = ("io", "cpuset")
    else:
        version, present = "version 1", read_v1_controllers(read_mountinfo())
        wanted = _WANTED_CONTROLLERS
    missing = [name for name in _NEEDED_CONTROLLERS if name not in present]
    if missing:
        return Finding(
            "cgroups",
            Level.FAIL,
            f"{version} without {', '.join(missing)}",
            "limits cannot be enforced",
            "mount them, or boot with cgroup_enable=memory",
        )
    lacking = [name for name in wanted if name not in present]
    return Finding(
        "cgroups",
        Level.WARN if lacking else Level.OK,
        f"{version}: {', '.join(sorted(present))}",
        f"no {', '.join(lacking)}" if lacking else "",
    )


def read_v1_controllers(mountinfo: str) -> set[str]:
    """Controllers with a mounted version 1 hierarchy, from the text of /proc/self/mountinfo. Pure."""
    found: set[str] = set()
    for line in lines_of(mountinfo):
        # … - FSTYPE SOURCE SUPER_OPTIONS, the last of which name the controllers. proc_pid_mountinfo(5).
        _, _, tail = line.partition(" - ")
        fields = tail.split()
        if len(fields) == 3 and fields[0] == "cgroup":
            found.update(fields[2].split(","))
    return found - {"rw", "ro", "xattr", "clone_children", "release_agent"}
