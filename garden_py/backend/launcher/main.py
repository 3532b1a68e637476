"""The launcher process: takes a private mount namespace, forks workers on request.

Run as `python -m garden_py.backend.launcher.main CONTROL_FD MOUNT_DIR LOCK_FILE [FLAG…]`, with flags

    --host-mounts             stay in the host's mount namespace: for programs whose mounts others are to see
    --without-hybrid-cgroup   see enter_private_mounts
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from garden_py.backend.host import syscalls
from garden_py.backend.host.rlimits import lift_namespace_ceilings
from garden_py.backend.launcher import worker
from garden_py.backend.rootfs.host_mounts import HOST_MOUNTS
from garden_py.backend.runtime.command import AGENT_FDS

_FIRST_FREE_FD = 10
# Together well below the time in which the server expects its launcher (launcher/client.py, START_TIMEOUT_S).
_PATIENCE_S, _KILLED_S = 5.0, 3.0
_TRY_AGAIN_S = 0.01


def main() -> None:
    """Serve the control socket until the server closes it."""
    control_fd, mount_dir, lock_path = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    control = socket.socket(fileno=_move_up(control_fd))
    null = _move_up(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    for number in AGENT_FDS:
        os.dup2(null, number, inheritable=False)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers leave no zombies; they set it back for themselves
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C on the terminal is the server's to handle
    lift_namespace_ceilings()  # of containers' user namespaces; PID 1 starts with the server's limits all the same
    syscalls.adopt_orphans()  # containers' PID 1, so that they leave no zombies where the host's init is slow
    if "--host-mounts" not in sys.argv[4:]:
        enter_private_mounts(mount_dir, without_hybrid="--without-hybrid-cgroup" in sys.argv[4:])
    outlive_predecessor(lock_path)
    control.send(b"ready")
    while control.recv(16):
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            control.close()
            theirs.close()
            worker.serve(ours)
            os._exit(0)
        ours.close()
        socket.send_fds(control, [b"worker"], [theirs.fileno()])
        theirs.close()


def _move_up(fd: int) -> int:
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE_FD)
    os.close(fd)
    return moved


def outlive_predecessor(
    lock_path: Path, *, patience_s: float = _PATIENCE_S, killed_s: float = _KILLED_S
) -> None:
    """Wait until the workers of an earlier server's launcher have finished their jobs and gone.

    The descriptor stays open here and in every worker forked from here, and with it the lock (flock(2)). Only then
    may the server judge what a half-done job has left. Workers that do not come to an end are killed; one that not
    even that ends, for it is in a system call that hangs, can do no more than finish that call, and is not waited for:
    one dead file server must not keep a whole server from starting.
    """
    fd = _move_up(os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if _lock_within(fd, patience_s):
        return
    holders = _find_holders(fd)
    print(f"launcher: killing workers of an earlier launcher that do not end: {holders}", file=sys.stderr)
    for pid in holders:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if not _lock_within(fd, killed_s):
        print(f"launcher: not waiting for processes that SIGKILL does not end: {holders}", file=sys.stderr)


def _lock_within(fd: int, seconds: float) -> bool:
    """Nothing tells when a lock becomes free before a deadline; so it is tried."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_TRY_AGAIN_S)


def _find_holders(fd: int) -> list[int]:
    """Other processes that have the file open. Source: proc(5), /proc/pid/fd.

    By name: looking at the files themselves could hang where one of them does.
    """
    wanted = os.readlink(f"/proc/self/fd/{fd}")
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with suppress(OSError):  # it has ended meanwhile
            names = os.listdir(f"/proc/{entry}/fd")
            if any(os.readlink(f"/proc/{entry}/fd/{name}") == wanted for name in names):
                found.append(int(entry))
    return found


def enter_private_mounts(mount_dir: Path, *, without_hybrid: bool) -> None:
    """Give this process a mount namespace that sees the host's mounts come, and shows the host none of its own.

    Args:
        mount_dir: becomes a private tmpfs for mount points.
        without_hybrid: hide a hybrid host's v2 hierarchy, which crun refuses when it holds a controller
            ("cgroups in hybrid mode not supported").
    """
    HOST_MOUNTS.remember()
    syscalls.unshare(syscalls.CLONE_NEWNS)
    HOST_MOUNTS.left()
    syscalls.mount("none", Path("/"), "", syscalls.MS_REC | syscalls.MS_SLAVE)
    mount_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    # 0711: PID 1 of a user namespace walks here by path while the runtime sets up its root, as a foreign uid.
    syscalls.mount("garden", mount_dir, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0711,size=16m")
    hybrid = Path("/sys/fs/cgroup/unified")
    if without_hybrid and hybrid.is_mount():
        syscalls.umount(hybrid, lazy=True)


if __name__ == "__main__":
    main()
