"""The request that starts a process, and what its refusals mean to the caller. Pure."""

from __future__ import annotations

import os
from typing import Any

from garden_py.backend.host.framed import RequestRefused
from garden_py.backend.streams.agent_replies import printable
from garden_py.model import errors
from garden_py.model.process import ProcessSpec


def build_spawn_request(
    spec: ProcessSpec,
    env: tuple[str, ...],
    *,
    bounding: int | None,
    program: str | None,
    program_path: str,
    gated: bool,
) -> dict[str, Any]:
    """`spawn` as garden_py.wire describes it; arguments as AgentLink.spawn."""
    argv = [] if program else [os.fsencode(text) for text in (spec.path, *spec.args)]
    return {
        "op": "spawn",
        "id": spec.id,
        "argv": argv,
        "env": [os.fsencode(entry) for entry in env],
        "dir": os.fsencode(spec.dir or ("/" if spec.sidecar else "")),
        "user": spec.user,
        "tty": None if spec.tty is None else {"rows": spec.tty.rows, "columns": spec.tty.columns},
        "rlimits": {name: _signed(value) for name, value in spec.rlimits},
        "bounding": bounding,
        "no_new_privs": False,
        "program": program,
        "program_args": {"path": os.fsencode(program_path)} if program else {},
        "gated": gated,
        "groups": "primary" if spec.sidecar else None,  # Garden statement PE5
    }


def _signed(value: int) -> int:
    """An rlimit as the wire carries it: RLIM_INFINITY (2^64-1) is -1, as in resource.RLIM_INFINITY."""
    return value - (1 << 64) if value >= 1 << 63 else value


def spawn_error(handle: str, spec: ProcessSpec, error: RequestRefused) -> errors.GardenError:
    """The error to raise for a refused spawn."""
    message = printable(str(error))
    match error.code:
        case "executable_not_found":
            return errors.ExecutableNotFound(message)
        case "not_executable":
            return errors.NotExecutable(message)
        case "user_not_found" | "group_not_found":
            return errors.UserNotFound(message)
        case "process_exists":
            return errors.ProcessIdInUse(handle, spec.id)
        case "bad_rlimit":
            return errors.InvalidField("spec.rlimits", message)
        case "bad_user":
            return errors.InvalidField("spec.user", message)
        case "bad_directory":
            return errors.InvalidField("spec.dir", message)
        case "invalid_request":
            return errors.InvalidField(f"spec.{printable(str(error.data.get('field', '')))}", message)
        case _:
            return errors.ProcessStartFailed(message)
