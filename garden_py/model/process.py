"""Processes in a container: what to run, how it ended."""

from __future__ import annotations

import signal as _signal
from dataclasses import dataclass, field
from enum import Enum

from .errors import FieldViolation, InvalidRequest
from .files import BindMount, mount_violations
from .handle import name_problem
from .image import RegistryAuth, image_problem
from .limits import (
    NO_PROCESS_DISK,
    Limits,
    Rlimits,
    container_only_violations,
    incomplete_limits,
    limit_violations,
    rlimit_violations,
)

ARG_MAX_BYTES = 512 << 10
RETENTION_FLOOR_BYTES = 64 << 10


class OutputStream(Enum):
    """The two output streams of a process; with a tty everything is on STDOUT."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class WindowSize:
    """A terminal's size in characters. 0 stands for the default, 24 rows and 80 columns."""

    rows: int = 24
    columns: int = 80


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What a process with an image of its own has apart from its container (Garden calls it a pea).

    Attributes:
        image: as ContainerSpec.image, but never empty.
        bind_mounts: its own; it has none of the container's but hosts and resolv.conf.
        own_limits: its limits stand beside the container's instead of within them; where it states none, it has none.
        image_auth: as ContainerSpec.image_auth.
    """

    image: str
    bind_mounts: tuple[BindMount, ...] = ()
    own_limits: bool = False
    image_auth: RegistryAuth | None = None


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to start.

    Attributes:
        id: name within the container; the service fills an empty one.
        path: program; without a slash looked up in PATH inside the container.
        args: argv[1] onwards.
        env: NAME=VALUE, later wins.
        dir: working directory; empty is the user's home.
        user: "", name, uid, or either with `:group`.
        tty: size of its terminal; None for pipes.
        rlimits: as Limits.rlimits; what it does not name is the container's. Follow their changes while it runs.
        limits: of this process and its children, within the container's (but see Sidecar.own_limits).
        output_retention_bytes: kept per stream; 0 is the server's default.
        sidecar: it has a root file system of its own; None: the container's.
        from_image: run what the image says: its entrypoint with args, or, without args, with its cmd; as its user and
            in its working directory unless others are stated. path is empty then.
    """

    path: str
    id: str = ""
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    dir: str = ""
    user: str = ""
    tty: WindowSize | None = None
    rlimits: Rlimits = ()
    limits: Limits = field(default_factory=Limits)
    output_retention_bytes: int = 0
    sidecar: Sidecar | None = None
    from_image: bool = False

    @property
    def has_own_group(self) -> bool:
        """Whether it and its children are counted by themselves."""
        return self.sidecar is not None or not self.limits.without_disk().empty()

    @property
    def is_beside(self) -> bool:
        """Whether its limits stand beside its container's instead of within them."""
        return self.sidecar is not None and self.sidecar.own_limits


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: exactly one of code and signal is set.

    Attributes:
        code: 0 to 255.
        signal: signal(7) number.
        out_of_memory: the kernel's OOM killer ended a task of its tree.
        exited_ns: CLOCK_REALTIME.
        reason: a sentence for people; empty for a plain exit.
    """

    code: int | None
    signal: int | None
    out_of_memory: bool = False
    exited_ns: int = 0
    reason: str = ""

    def shell_code(self) -> int:
        """The status as a shell reports it: the code, or 128 + signal."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


def check_env(env: tuple[str, ...], prefix: str) -> list[FieldViolation]:
    """Entries that are not NAME=VALUE or hold a NUL."""
    found = []
    for i, entry in enumerate(env):
        name, equals, _ = entry.partition("=")
        if not equals or not name or "\0" in entry:
            found.append(FieldViolation(f"{prefix}[{i}]", "must be NAME=VALUE without NUL"))
    return found


def check_process(spec: ProcessSpec, prefix: str = "spec") -> None:
    """Refuse a process spec that breaks a rule.

    Raises:
        InvalidRequest: with one violation per bad field.
    """
    found: list[FieldViolation] = []

    def bad(name: str, problem: str) -> None:
        found.append(FieldViolation(f"{prefix}.{name}", problem))

    if spec.id and (problem := name_problem(spec.id)):
        bad("id", problem)
    if not spec.path and not spec.from_image:
        bad("path", "must not be empty, unless the image's own command is asked for (from_image)")
    if spec.path and spec.from_image:
        bad("path", "must be empty if the image's own command is asked for (from_image)")
    for name, texts in (
        ("path", (spec.path,)),
        ("args", spec.args),
        ("dir", (spec.dir,)),
        ("user", (spec.user,)),
    ):
        if any("\0" in text for text in texts):
            bad(name, "must not contain NUL")
    found += check_env(spec.env, f"{prefix}.env")
    size = sum(len(text.encode(errors="surrogateescape")) + 1 for text in (spec.path, *spec.args, *spec.env))
    if size > ARG_MAX_BYTES:
        bad(
            "args",
            f"arguments and environment are {size} bytes together; at most {ARG_MAX_BYTES} are allowed",
        )
    if spec.dir and not spec.dir.startswith("/"):
        bad("dir", "must be an absolute path")
    if spec.tty is not None and not (0 <= spec.tty.rows <= 0xFFFF and 0 <= spec.tty.columns <= 0xFFFF):
        bad("tty", "rows and columns must be 0 to 65535")
    found += rlimit_violations(spec.rlimits, f"{prefix}.rlimits")
    if spec.limits.rlimits:
        bad("limits.rlimits", f"a process states them in {prefix}.rlimits")
    found += limit_violations(spec.limits, f"{prefix}.limits")
    found += incomplete_limits(spec.limits, f"{prefix}.limits")
    found += container_only_violations(spec.limits, f"{prefix}.limits")
    if spec.limits.states_disk and spec.sidecar is None:
        bad("limits.disk_bytes", NO_PROCESS_DISK)
    if (sidecar := spec.sidecar) is not None:
        if problem := image_problem(sidecar.image):
            bad("sidecar.image", problem)
        found += mount_violations(sidecar.bind_mounts, f"{prefix}.sidecar.bind_mounts")
    if spec.output_retention_bytes and spec.output_retention_bytes < RETENTION_FLOOR_BYTES:
        bad("output_retention_bytes", f"must be 0 (the server's default) or at least {RETENTION_FLOOR_BYTES}")
    if found:
        raise InvalidRequest(found)


def parse_signal(text: str) -> int:
    """The number of a signal given as "TERM", "SIGTERM" or "15".

    Raises:
        ValueError: there is no such signal.

    Source: signal(7).
    """
    if text.isascii() and text.isdigit():
        number = int(text)
    else:
        name = text.upper()
        name = name if name.startswith("SIG") else f"SIG{name}"
        try:
            number = _signal.Signals[name]
        except KeyError:
            raise ValueError(f"unknown signal {text!r}") from None
    if not 1 <= number <= _signal.SIGRTMAX:
        raise ValueError(f"unknown signal {text!r}")
    return int(number)


def signal_name(number: int) -> str:
    """The name of a signal: SIGKILL for 9; "signal 40" where there is none."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
