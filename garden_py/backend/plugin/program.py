"""One external program, from its start to its end, in a worker that does nothing else meanwhile."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from garden_py.backend.host import syscalls
from garden_py.model.errors import HostFault

STDOUT_MAX_BYTES = 256 << 10
STDERR_TAIL_BYTES = 16 << 10
_READ_BYTES = 64 << 10
_READS_AFTER_END = 16  # a pipe holds 1 MiB at most (pipe(7)); what a child that stays writes is nobody's


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program has ended.

    Attributes:
        status: its exit status; below 0: minus the signal that ended it.
        stdout: all it wrote there.
        stderr: the end of what it wrote there.
        gave_up: why it was killed; empty: it was not.
    """

    status: int
    stdout: str
    stderr: str
    gave_up: str = ""

    @property
    def how(self) -> str:
        """The status in words."""
        return f"exit status {self.status}" if self.status >= 0 else f"killed by signal {-self.status}"


def run_program(argv: Sequence[str], *, stdin: int, caller: int, timeout_s: float) -> Ended:
    """Run a program to its end, or kill it with all of its process group.

    Children that it leaves behind when it ends by itself are left alone, and not waited for, even if they hold its
    pipes.

    Args:
        argv: with the program's path first.
        stdin: a file; the program reads it from where it stands.
        caller: becomes readable when nobody waits for the program any more.
        timeout_s: seconds until it is killed.

    Raises:
        HostFault: it cannot be started.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=syscalls.die_with_parent,
        )
    except OSError as error:
        raise HostFault(argv[0], f"cannot be run: {error.strerror}") from error
    with process, _Watch(process, caller) as watch:
        gave_up = watch.until_end(timeout_s)
        if gave_up:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        watch.read_the_rest()
        return Ended(status, watch.stdout, watch.stderr, gave_up or watch.too_much)


class _Watch:
    """What a program writes, and whether it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], caller: int) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._pidfd = os.pidfd_open(process.pid)
        self._caller = caller
        self._pipes = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        self._stdout, self._stderr = self._pipes.values()
        self._selector = selectors.DefaultSelector()
        for fd in (self._pidfd, caller, *self._pipes):
            self._selector.register(fd, selectors.EVENT_READ)
        for fd in self._pipes:
            os.set_blocking(fd, False)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        os.close(self._pidfd)

    @property
    def stdout(self) -> str:
        return bytes(self._stdout[:STDOUT_MAX_BYTES]).decode(errors="replace")

    @property
    def stderr(self) -> str:
        return bytes(self._stderr).decode(errors="replace")

    @property
    def too_much(self) -> str:
        if len(self._stdout) <= STDOUT_MAX_BYTES:
            return ""
        return f"it wrote more than {STDOUT_MAX_BYTES} bytes to its standard output"

    def until_end(self, timeout_s: float) -> str:
        """Wait for the program's end; why it is to be killed, empty if it has ended."""
        deadline = time.monotonic() + timeout_s
        while not self.too_much:
            left_s = deadline - time.monotonic()
            ready = {key.fd for key, _ in self._selector.select(max(0.0, left_s))}
            if self._pidfd in ready:
                return ""
            if self._caller in ready:
                return "nobody waits for it any more"
            if not ready or left_s <= 0:  # one that writes without a pause is always ready
                return f"it did not end in {timeout_s:g} s"
            for fd in ready:
                if not self._read(fd):
                    self._selector.unregister(fd)
        return self.too_much

    def _read(self, fd: int) -> bool:
        """Take what is there now; False when that is nothing, and at the end of the pipe."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return False
        self._pipes[fd] += data
        del self._stderr[:-STDERR_TAIL_BYTES]
        return bool(data)

    def read_the_rest(self) -> None:
        """Take what the pipes still hold."""
        for fd in self._pipes:
            for _ in range(_READS_AFTER_END):
                if self.too_much or not self._read(fd):
                    break
