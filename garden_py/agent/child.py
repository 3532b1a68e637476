"""The forked child, from fork to exec (or to the end of a built-in program).

It is PID 1's copy, so it drops what PID 1 holds first of all. It may block or fail at every step, which is
why everything that touches the container's files happens here. A failure goes up the status pipe as an
encoded dict; the pipe's end without one tells PID 1 that exec succeeded, since the pipe is close-on-exec.

The order matters:

1. cgroups, before anything else costs memory or time: it is charged to the process;
2. session, standard streams, every other descriptor closed;
3. who the user is, from the container's files;
4. streams given to the user, directories made, working directory entered, while still root;
5. all strings for exec are built, for after the limits even a small allocation may fail;
6. bounding set, which needs CAP_SETPCAP, and limits, while raising one may still be permitted;
7. groups, gid, uid, in this order: each needs what the next takes away;
8. no_new_privs;
9. the gate: by now the server has mostly opened it. A child whose limits are to be above what it may raise them to
   asks the server for them here, which has the rights for it over the host;
10. exec.
"""

from __future__ import annotations

import errno
import posix
import sys

from garden_py import wire
from garden_py.agent import pty, rlimit, signals, syscalls, users
from garden_py.agent.directories import make_directories
from garden_py.agent.environment import build_environment, executable_candidates
from garden_py.agent.loop import describe_failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from garden_py.agent.users import Identity
    from garden_py.wire import Value

EXIT_BEFORE_EXEC = 127

_MAX_DATABASE_BYTES = 16 << 20
_FILE_TYPE_MASK, _REGULAR = 0o170000, 0o100000  # inode(7)
_STATUS_FD = 3
_MAX_MESSAGE_LENGTH = 1000  # the encoded failure stays below PIPE_BUF, so its write is atomic


class Plan:
    """All a child needs to know; checked by PID 1, prepared before the fork.

    Attributes:
        argv, env, dir, user, bounding, no_new_privs, program, program_path: as in the request.
        limits: parsed by `rlimit.parse_limits`.
        stdio: descriptors that become 0, 1, 2; empty with a terminal.
        master: the pty master, or -1.
        cgroup_fds: open cgroup.procs files.
        gate_fd: gives one byte when the program may run, or -1; see `spawn` in garden_py.wire.
        primary_group_only: no supplementary groups.
        nofile: (soft, hard) limit of open files a process starts with.
        proc_fd: descriptor of /proc if the OOM adjustment must be reset, else -1.
    """

    __slots__ = (
        "argv",
        "bounding",
        "cgroup_fds",
        "dir",
        "env",
        "gate_fd",
        "limits",
        "master",
        "no_new_privs",
        "nofile",
        "primary_group_only",
        "proc_fd",
        "program",
        "program_path",
        "stdio",
        "user",
    )

    def __init__(self) -> None:
        self.argv: list[bytes] = []
        self.env: list[bytes] = []
        self.dir = b""
        self.user = ""
        self.primary_group_only = False
        self.limits: list[tuple[str, int, int, int]] = []
        self.bounding: int | None = None
        self.no_new_privs = False
        self.program: str | None = None
        self.program_path = b""
        self.stdio: list[int] = []
        self.master = -1
        self.cgroup_fds: list[int] = []
        self.gate_fd = -1
        self.nofile = (1024, 4096)
        self.proc_fd = -1


class Refusal(Exception):
    """The process cannot start, for a reason the caller can act on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(plan: Plan, status_fd: int) -> NoReturn:
    """Become the process; never returns, whatever happens."""
    child = _Child(plan, status_fd)
    failure: dict[str, Value] | None = None
    exit_code = EXIT_BEFORE_EXEC
    try:
        child.prepare()
        child.pass_gate()
        if plan.program is None:
            child.execute()
        else:
            exit_code = child.run_program(plan.program)
    except Refusal as refusal:
        failure = child.failure(refusal.code, str(refusal))
    except OSError as error:
        failure = child.failure("spawn_failed", f"{child.step}: {error.strerror}", error)
    except MemoryError:
        failure = child.failure("out_of_memory", f"{child.step}: out of memory")
    finally:
        # Also on a bug: an exception must not carry the child back into PID 1's loop.
        if failure is None:
            bug = sys.exception()
            failure = child.failure("internal", describe_failure(bug) if bug else "nothing was run")
        child.report(failure)
        posix._exit(exit_code)


class _Child:
    def __init__(self, plan: Plan, status_fd: int) -> None:
        self._plan = plan
        self._status_fd = status_fd
        self._identity = users.Identity(0, 0, [], b"/")
        self._environment: dict[bytes, bytes] = {}
        self._candidates: list[bytes] = []
        self._run_files: Callable[[str, bytes], int]
        self._too_high = ""  # what is to be told of the limits that only the server can raise so far
        self.step = "start"

    def failure(self, code: str, message: str, error: OSError | None = None) -> dict[str, Value]:
        failure: dict[str, Value] = {
            "code": code,
            "message": message[:_MAX_MESSAGE_LENGTH],
            "step": self.step,
        }
        if error is not None and error.errno is not None:
            failure["errno"] = errno.errorcode.get(error.errno, str(error.errno))
        return failure

    def report(self, failure: dict[str, Value]) -> None:
        """Tell PID 1, unless it has been told that the process started."""
        if self._status_fd >= 0:
            posix.write(self._status_fd, wire.encode(failure))

    def prepare(self) -> None:
        plan = self._plan
        self._join_cgroups()
        if plan.program is not None:
            # Only a child that needs them pays for these 30 modules; read as root, who can enter the bundle.
            self.step = "import"
            from garden_py.agent import files

            self._run_files = files.run
        self.step = "new session"
        posix.setsid()
        slave = self._take_streams()
        signals.reset_in_child()
        passwd, group = self._read_databases()
        self._identity = identity = self._resolve(passwd, group)
        self.step = "streams' owner"
        try:
            self._give_streams(slave, identity, group)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            ids = f"user {identity.uid} with group {identity.gid}"
            raise Refusal("bad_user", f"{ids}: the container has no such ids (/proc/self/uid_map)") from error
        self._enter_directory()
        self._environment = build_environment(plan.env, uid=identity.uid, user=plan.user, home=identity.home)
        if plan.program is None:
            self._candidates = executable_candidates(plan.argv[0], self._environment[b"PATH"])
        self._drop_privileges()

    def _give_streams(self, slave: int, identity: users.Identity, group: bytes) -> None:
        if slave >= 0:
            posix.fchown(slave, identity.uid, users.find_tty_gid(group, default=identity.gid))
            posix.fchmod(slave, 0o620)
            posix.close(slave)
        elif identity.uid != 0 or identity.gid != 0:
            # Opening /dev/stdout opens the pipe's inode anew, with the inode's permissions.
            for fd in (0, 1, 2):
                posix.fchown(fd, identity.uid, identity.gid)

    def _join_cgroups(self) -> None:
        self.step = "join cgroup"
        for fd in self._plan.cgroup_fds:
            posix.write(fd, b"0")
        self.step = "oom_score_adj"
        if self._plan.proc_fd >= 0:
            fd = posix.open("self/oom_score_adj", posix.O_WRONLY | posix.O_CLOEXEC, dir_fd=self._plan.proc_fd)
            posix.write(fd, b"0")
            posix.close(fd)

    def _take_streams(self) -> int:
        """Standard streams onto 0, 1, 2, the status pipe onto 3, all else closed; the pty slave or -1."""
        self.step = "standard streams"
        stdio, slave = self._plan.stdio, -1
        if self._plan.master >= 0:
            slave = pty.open_slave(self._plan.master)
            pty.make_controlling(slave)
            stdio = [slave, slave, slave]
        for target, fd in enumerate(stdio):
            posix.dup2(fd, target)
        # PID 1 holds 0..3 open, so none of the descriptors above can be one of the targets.
        posix.dup2(self._status_fd, _STATUS_FD, inheritable=False)
        self._status_fd = _STATUS_FD
        unused = _STATUS_FD + 1
        for kept in sorted((slave, self._plan.gate_fd)):  # close-on-exec, both of them
            if kept >= 0:
                posix.closerange(unused, kept)
                unused = kept + 1
        posix.closerange(unused, self._plan.nofile[1])
        return slave

    def _read_databases(self) -> tuple[bytes, bytes]:
        self.step = "read /etc/passwd"
        passwd = _read_database(b"/etc/passwd")
        self.step = "read /etc/group"
        return passwd, _read_database(b"/etc/group")

    def _resolve(self, passwd: bytes, group: bytes) -> Identity:
        self.step = "user"
        try:
            return users.resolve_user(self._plan.user, passwd, group)
        except users.UserNotFound as error:
            raise Refusal("user_not_found", str(error)) from error
        except users.GroupNotFound as error:
            raise Refusal("group_not_found", str(error)) from error
        except users.IdOutOfRange as error:
            raise Refusal("bad_user", str(error)) from error

    def _enter_directory(self) -> None:
        plan, identity = self._plan, self._identity
        self.step = "working directory"
        directory = plan.dir or identity.home
        if plan.program is not None:
            plan.program_path = directory = _join(identity.home, plan.program_path)
        if not directory.startswith(b"/"):
            raise Refusal("bad_directory", f"directory {_shown(directory)}: must be absolute")
        try:
            if plan.program != "tar-out":
                make_directories(directory, uid=identity.uid, gid=identity.gid)
            posix.chdir(directory if plan.program is None else b"/")
            # A directory outside the root reads as "(unreachable)..." (getcwd(3); CVE-2024-21626).
            if not posix.getcwd().startswith("/"):
                raise Refusal("bad_directory", f"directory {_shown(directory)}: outside the container")
        except OSError as error:
            code = "no_space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "bad_directory"
            raise Refusal(code, f"directory {_shown(directory)}: {error.strerror}") from error

    def _drop_privileges(self) -> None:
        plan, identity = self._plan, self._identity
        self.step = "capabilities"
        syscalls.limit_inheritable_capabilities(plan.bounding)
        if plan.bounding is not None:
            syscalls.limit_bounding_set(plan.bounding)
        self._set_limits()
        self.step = "setgroups"
        posix.setgroups([] if plan.primary_group_only else identity.groups)
        self.step = "setgid"
        posix.setresgid(identity.gid, identity.gid, identity.gid)
        self.step = "setuid"
        posix.setresuid(identity.uid, identity.uid, identity.uid)
        if plan.no_new_privs:
            self.step = "no_new_privs"
            syscalls.forbid_new_privileges()

    def _set_limits(self) -> None:
        self.step = "limits"
        syscalls.set_resource_limit(rlimit.NOFILE, *self._plan.nofile)
        for name, number, soft, hard in self._plan.limits:
            try:
                syscalls.set_resource_limit(number, soft, hard)
            except OSError as error:
                problem = f"resource limit {name}={hard}: {error.strerror}"
                if error.errno != errno.EPERM or self._plan.gate_fd < 0:
                    raise Refusal("bad_rlimit", problem) from error
                self._too_high = self._too_high or problem

    def pass_gate(self) -> None:
        """Wait until the server lets the program run, and has raised its limits if that has to be asked for."""
        self.step = "gate"
        if self._plan.gate_fd < 0:
            return
        if self._too_high:
            self._ask_for_limits()
        if not posix.read(self._plan.gate_fd, 1):
            raise Refusal("not_released", "the server has not let it run")
        if self._too_high and posix.read(self._plan.gate_fd, 1) != wire.LIMITS_RAISED:
            raise Refusal("bad_rlimit", self._too_high)

    def _ask_for_limits(self) -> None:
        try:
            posix.write(self._plan.gate_fd, wire.ASK_LIMITS)
        except OSError as error:  # a pipe: of a server that does not know the question
            raise Refusal("bad_rlimit", self._too_high) from error

    def execute(self) -> NoReturn:
        """Exec the first candidate that can be; like execvp(3), but with a reason for each failure."""
        self.step = "exec"
        name, denied = self._plan.argv[0], None
        candidates = self._candidates
        if len(candidates) > 1:
            # A question costs a tenth of an execve that fails. Where nothing can be run, the failures tell why.
            candidates = [path for path in candidates if posix.access(path, posix.X_OK)] or candidates
        for path in candidates:
            try:
                posix.execve(path, self._plan.argv, self._environment)
            except (FileNotFoundError, NotADirectoryError):
                if _exists(path):
                    raise Refusal(
                        "not_executable", f'exec: "{_shown(path)}": the interpreter it names does not exist'
                    ) from None
            except PermissionError as error:
                denied = error
            except OSError as error:
                if error.errno in (errno.ENOEXEC, errno.EISDIR, errno.ELIBBAD, errno.ELOOP):
                    raise Refusal("not_executable", f'exec: "{_shown(path)}": {error.strerror}') from error
                raise
        if denied is not None:
            raise Refusal("not_executable", f'exec: "{_shown(name)}": permission denied') from denied
        if b"/" in name:
            raise Refusal("executable_not_found", f"stat {_shown(name)}: no such file or directory")
        raise Refusal("executable_not_found", f'exec: "{_shown(name)}": executable file not found in $PATH')

    def run_program(self, program: str) -> int:
        """Run a built-in program in this process; the exit code."""
        posix.close(self._status_fd)  # as exec would: from here on it counts as started
        self._status_fd = -1
        syscalls.set_process_name(program.encode("ascii"))
        return self._run_files(program, self._plan.program_path)


def _read_database(path: bytes) -> bytes:
    """Content of a file of the container, empty if there is none.

    Raises:
        Refusal: it is no regular file (opening a FIFO would block), or larger than any real one.
        OSError: it cannot be read.
    """
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK | posix.O_NOCTTY | posix.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    status = posix.fstat(fd)
    if status.st_mode & _FILE_TYPE_MASK != _REGULAR or status.st_size > _MAX_DATABASE_BYTES:
        raise Refusal("spawn_failed", f"{_shown(path)}: no regular file of at most 16 MiB")
    # One byte more than it has: a short read says that this is all of it, whatever happens to it meanwhile.
    content = posix.read(fd, status.st_size + 1)
    posix.close(fd)
    return content


def _exists(path: bytes) -> bool:
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


def _join(home: bytes, path: bytes) -> bytes:
    return path if path.startswith(b"/") else home.rstrip(b"/") + b"/" + path


def _shown(path: bytes) -> str:
    return path[:_MAX_MESSAGE_LENGTH].decode("utf-8", "replace")
