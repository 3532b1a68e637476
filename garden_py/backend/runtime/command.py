"""Command lines of an OCI runtime, and what its log says when one fails. Pure.

Source: runc(8), runc-run(8); crun(1) takes the same arguments.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

# Runtimes hand descriptors 3, 4, … to PID 1 (runc --preserve-fds N); ours are the agent's listening socket and, unless
# the runtime is to install it, the program that filters system calls.
AGENT_LISTENER_FD, AGENT_FILTER_FD = AGENT_FDS = (3, 4)


@dataclass(frozen=True, slots=True)
class Runtime:
    """An OCI runtime as it is called.

    Attributes:
        program: name looked up in the server's PATH, or an absolute path.
        root: its state directory (`--root`), private to one server.
    """

    program: str
    root: Path

    def run_argv(self, container_id: str, *, bundle: Path, pid_file: Path, log: Path, fds: int) -> list[str]:
        """Arguments of a detached run that hands as many descriptors, from 3 on, to PID 1."""
        return [
            "--root", str(self.root), "--log", str(log), "--log-format", "json",
            "run", "--detach", "--preserve-fds", str(fds), "--bundle", str(bundle), "--pid-file", str(pid_file),
            container_id,
        ]  # fmt: skip


def cause_of_failure(log_text: str, stderr_text: str) -> str:
    """The most telling line of a failed runtime call.

    Args:
        log_text: the runtime's `--log` file, one JSON object a line.
        stderr_text: what it wrote to stderr.

    Returns:
        The last message of level error; else the last line of stderr; else a sentence that says there was none.
    """
    cause = ""
    for line in log_text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line cut short by a killed runtime
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal") and entry.get("msg"):
            cause = str(entry["msg"])
    if cause:
        return cause
    lines = [line for line in stderr_text.splitlines() if line.strip()]
    return lines[-1] if lines else "the runtime failed without saying why"
