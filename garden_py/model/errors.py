"""Every error a caller can act on, each with a stable code and its facts as attributes.

Doors turn these into their protocol's errors in one table each (`api/grpc/status.py`). Anything else that
leaves the service is a bug of ours and is reported as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal


class GardenError(Exception):
    """Something a caller can act on; the message is a full sentence without a stack trace's details."""

    code: ClassVar[str] = "internal"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request.

    Attributes:
        field: dotted path in the request, e.g. `limits.memory_bytes` or `egress.rules[3].ports[0]`.
        problem: what is wrong with it and what would be right.
    """

    field: str
    problem: str


class InvalidRequest(GardenError):
    """The request breaks one or more rules; nothing was changed."""

    code = "invalid_request"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.problem}" for v in violations) or "invalid request")
        self.violations = tuple(violations)


class InvalidField(InvalidRequest):
    """One field of the request is bad; nothing was changed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__([FieldViolation(field, problem)])
        self.field = field
        self.problem = problem


class ContainerNotFound(GardenError):
    """No container has this handle."""

    code = "container_not_found"

    def __init__(self, handle: str) -> None:
        super().__init__(f"unknown handle: {handle}")
        self.handle = handle


class HandleInUse(GardenError):
    """Another container has this handle, or is being made with it."""

    code = "handle_in_use"

    def __init__(self, handle: str) -> None:
        super().__init__(f"Handle '{handle}' already in use")
        self.handle = handle


class ContainerBusy(GardenError):
    """The container is in a state that does not allow the call (being created, being destroyed, broken)."""

    code = "container_busy"

    def __init__(self, handle: str, state: str, wanted: str) -> None:
        super().__init__(f"container {handle} is {state}; it cannot be {wanted} now")
        self.handle = handle
        self.state = state


class ContainerBroken(GardenError):
    """The container's agent is gone or does not answer; only destroy will help."""

    code = "container_broken"

    def __init__(self, handle: str, reason: str) -> None:
        super().__init__(f"container {handle} is broken: {reason}")
        self.handle = handle
        self.reason = reason


class Unkillable(GardenError):
    """Destroy or stop went as far as the kernel let it; destroy goes on in the background.

    Attributes:
        handle: the container.
        reason: what the kernel holds on to, with pid and wait channel where known.
    """

    code = "unkillable"

    def __init__(
        self, handle: str, reason: str, *, wanted: Literal["destroyed", "stopped"] = "destroyed"
    ) -> None:
        then = "; the server keeps trying" if wanted == "destroyed" else ""
        super().__init__(f"container {handle} cannot be {wanted} yet: {reason}{then}")
        self.handle = handle
        self.reason = reason


class BeingDestroyed(GardenError):
    """Somebody is destroying the container already, and the caller did not want to wait for that."""

    code = "being_destroyed"

    def __init__(self, handle: str) -> None:
        super().__init__("container already being destroyed")  # compared with by Diego's executor
        self.handle = handle


class PropertyNotFound(GardenError):
    """The container has no property of this name."""

    code = "property_not_found"

    def __init__(self, handle: str, key: str) -> None:
        super().__init__(f"property does not exist: {key}")
        self.handle = handle
        self.key = key


class PoolExhausted(GardenError):
    """A pool of the server has nothing left.

    Attributes:
        pool: "addresses", "ports", "containers" or "uid ranges".
        size: how many the pool holds in all.
        flag: the server flag that sets its size; empty: none does.
    """

    code = "pool_exhausted"

    def __init__(self, pool: str, size: int, flag: str) -> None:
        super().__init__(f"no {pool} left: all {size} are in use (server flag {flag})")
        self.pool = pool
        self.size = size
        self.flag = flag


class TaskLimitReached(GardenError):
    """The container has no room for one more process under its limit of tasks (limits.pids); nothing was started.

    Attributes:
        tasks: processes and threads that it has.
        limit: how many it may have.
    """

    code = "task_limit_reached"

    def __init__(self, handle: str, tasks: int, limit: int) -> None:
        super().__init__(
            f"container {handle} has {tasks} tasks of at most {limit} (limits.pids): there is no room for a process"
        )
        self.handle = handle
        self.tasks = tasks
        self.limit = limit


class SubnetFull(PoolExhausted):
    """All addresses of a subnet that a caller has chosen are in use. Its size is in its prefix, not a flag's."""

    code = "subnet_full"

    def __init__(self, subnet: str, size: int) -> None:
        super().__init__(f"addresses of {subnet}", size, "")

    def __str__(self) -> str:
        # The first words are the reference's (statement N4).
        return f"insufficient IPs remaining in the pool: all {self.size} {self.pool} are in use"


class NoLink(GardenError):
    """A container has no link of its own, so it has neither egress rules nor ports."""

    code = "no_link"

    def __init__(self, handle: str, mode: str) -> None:
        super().__init__(f"container {handle!r} has no link of its own: its network mode is {mode}")
        self.handle = handle


class PrivilegedDisabled(GardenError):
    """This server makes no privileged containers; a setting of its forbids them."""

    code = "privileged_disabled"

    def __init__(self) -> None:
        super().__init__("privileged container creation is disabled")  # the reference's words (statement L6)


class PortInUse(GardenError):
    """The asked-for host port is mapped already, or a program of the host has it."""

    code = "port_in_use"

    def __init__(self, port: int, holder: str = "", *, by_host: bool = False) -> None:
        by = f" by container {holder}" if holder else ""
        told = "in use by a program of the host" if by_host else f"already mapped{by}"
        super().__init__(f"host port {port} is {told}")
        self.port = port
        self.holder = holder


class ImageNotFound(InvalidField):
    """The image reference names nothing usable as a root file system."""

    code = "image_not_found"


class ImageUnknown(GardenError):
    """The server's store has no image of this name or id."""

    code = "image_unknown"

    def __init__(self, image: str) -> None:
        super().__init__(f"no such image in the store: {image}")
        self.image = image


class ImageInUse(GardenError):
    """Containers or sidecars use the image; it goes when they have gone."""

    code = "image_in_use"

    def __init__(self, image: str, users: int) -> None:
        super().__init__(f"image {image} is in use by {users} containers or sidecars")
        self.image = image
        self.users = users


class ImageAccessDenied(GardenError):
    """The registry does not take the user's name and password, or wants some."""

    code = "image_access_denied"

    def __init__(self, image: str, told: str) -> None:
        # Callers of the Garden door compare with the words before the parenthesis (statement M11).
        super().__init__(f"authorization failed: username and password are invalid ({image}: {told})")
        self.image = image


class ImageUnreachable(GardenError):
    """The registry cannot be reached, or breaks off; trying again may help."""

    code = "image_unreachable"

    def __init__(self, image: str, told: str) -> None:
        super().__init__(f"cannot fetch image {image}: {told}")
        self.image = image


class ImageInvalid(GardenError):
    """What was fetched is no image, or not the one that its digests promise; nothing of it was kept."""

    code = "image_invalid"

    def __init__(self, image: str, problem: str) -> None:
        super().__init__(f"image {image} is invalid: {problem}")
        self.image = image
        self.problem = problem


class ImageTooLarge(GardenError):
    """The image is larger than this server takes.

    Attributes:
        flag: the server flag that says how large it may be.
    """

    code = "image_too_large"

    def __init__(self, image: str, problem: str, flag: str) -> None:
        super().__init__(f"image {image} is too large: {problem} (server flag {flag})")
        self.image = image
        self.flag = flag


class ProcessNotFound(GardenError):
    """The container has no process with this id."""

    code = "process_not_found"

    def __init__(self, handle: str, process_id: str) -> None:
        super().__init__(f"unknown process: {process_id}")
        self.handle = handle
        self.process_id = process_id


class ProcessIdInUse(GardenError):
    """A process with this id runs or ran in the container."""

    code = "process_id_in_use"

    def __init__(self, handle: str, process_id: str) -> None:
        super().__init__(f"process ID '{process_id}' already in use")
        self.handle = handle
        self.process_id = process_id


class ExecutableNotFound(GardenError):
    """The program to run does not exist in the container."""

    code = "executable_not_found"


class NotExecutable(GardenError):
    """The program exists, but the kernel refuses to execute it."""

    code = "not_executable"


class UserNotFound(GardenError):
    """The user or group is not in the container's /etc/passwd or /etc/group."""

    code = "user_not_found"


class ProcessStartFailed(GardenError):
    """The process could not be started for another reason, which the message names."""

    code = "process_start_failed"


class ProcessExited(GardenError):
    """The call needs a running process, and this one has exited."""

    code = "process_exited"

    def __init__(self, process_id: str) -> None:
        super().__init__(f"process {process_id} has exited")
        self.process_id = process_id


class ProcessNotLimited(GardenError):
    """The call is about a process's own limits, and this one shares its container's."""

    code = "process_not_limited"

    def __init__(self, handle: str, process_id: str) -> None:
        why = f"it was started without any, and shares those of container {handle}"
        super().__init__(f"process {process_id} has no limits of its own: {why}")
        self.handle = handle
        self.process_id = process_id


class ProcessNotCounted(GardenError):
    """The call is about what a process uses, and this one is counted with its container."""

    code = "process_not_counted"

    def __init__(self, handle: str, process_id: str) -> None:
        why = "it was started without limits of its own"
        super().__init__(f"process {process_id} is counted with its container {handle}: {why}")
        self.handle = handle
        self.process_id = process_id


class StdinClosed(GardenError):
    """Input was sent after the process's stdin had been closed."""

    code = "stdin_closed"

    def __init__(self, process_id: str) -> None:
        super().__init__(f"stdin of process {process_id} is closed")
        self.process_id = process_id


class NoTty(GardenError):
    """A window size was sent to a process that has no terminal."""

    code = "no_tty"

    def __init__(self, process_id: str) -> None:
        super().__init__(f"process {process_id} has no terminal")
        self.process_id = process_id


class OffsetOutOfRange(GardenError):
    """The asked-for bytes are not there: dropped by retention, or beyond what was written. Likewise of events.

    Attributes:
        offset: what was asked for; of events a cursor, as the others.
        first_offset: the first byte still kept.
        end_offset: the offset after the last byte.

    Args:
        problem: in words; empty: it is about output.
    """

    code = "offset_out_of_range"

    def __init__(self, offset: int, first_offset: int, end_offset: int, problem: str = "") -> None:
        super().__init__(
            problem or f"offset {offset} is not available: kept are {first_offset} to {end_offset}"
        )
        self.offset = offset
        self.first_offset = first_offset
        self.end_offset = end_offset


class LimitRefused(GardenError):
    """A limit is well formed, but the kernel does not take it now, e.g. because more is in use.

    Attributes:
        field: the limit, e.g. `limits.memory_bytes`.
    """

    code = "limit_refused"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class OffsetUnknown(GardenError):
    """An offset was given, but how much stdin had been fed is not known since the server was restarted."""

    code = "offset_unknown"

    def __init__(self, process_id: str) -> None:
        super().__init__(
            f"the server was restarted since process {process_id} started; how much of its stdin had been fed is not "
            "known, so input can only be sent without an offset"
        )
        self.process_id = process_id


class EtagMismatch(GardenError):
    """Somebody else changed the value since it was read; read again and retry."""

    code = "etag_mismatch"

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"the value was changed by somebody else: etag is {actual}, not {expected}")
        self.expected = expected
        self.actual = actual


class CopyFailed(GardenError):
    """A copy into or out of a container failed inside it; the message is the archiver's.

    Attributes:
        reason: no_such_path, permission_denied, broken_archive, no_space or io_error.
    """

    code = "copy_failed"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotSupported(GardenError):
    """The request is well formed, but this server or host cannot do it; the message says why."""

    code = "not_supported"


class HostFault(GardenError):
    """A step on the host failed: runc, mounts, cgroups, network. Everything done before it was undone."""

    code = "host_fault"

    def __init__(self, step: str, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step


class ProfileNotLoaded(HostFault):
    """The kernel does not have the AppArmor profile that containers are to be confined by; nothing was made."""

    code = "profile_not_loaded"

    def __init__(self, profile: str) -> None:
        super().__init__(
            "apparmor", f"profile {profile!r}, the server's setting --apparmor, is not loaded on this host"
        )
        self.profile = profile


class ContainerRecovering(GardenError):
    """The server has just been started and has not taken the container over yet; ask again."""

    code = "container_recovering"

    def __init__(self, handle: str) -> None:
        super().__init__(f"container {handle} is being taken over by a server that was started just now")
        self.handle = handle


class ShuttingDown(GardenError):
    """The server is stopping and takes no new work."""

    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the server is shutting down")
