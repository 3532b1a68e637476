"""Signal dispositions of PID 1 and of what it starts.

`signal`, the Python module, wraps the C module `_signal` in enums and costs 4 ms at start-up.
"""

from __future__ import annotations

import posix

TYPE_CHECKING = False
if TYPE_CHECKING:  # typeshed describes `_signal` only through `signal`
    import signal as _signal
    from types import FrameType
else:
    import _signal

SIGKILL = 9
LAST_SIGNAL = 64  # signal(7): real-time signals end at 64 on every Linux architecture garden-py runs on
_GLIBC_INTERNAL = (32, 33)  # nptl(7): glibc refuses to change these

_MAX_STACK_DUMPS = 8  # the log lies on the host, and any root process of the container may send SIGQUIT
_dumps = 0
_default = _signal.SIG_DFL  # what `take_over` has set


def take_over() -> int:
    """Bring the agent's signals into a known state; returns the descriptor that turns readable on SIGCHLD.

    Everything is at its default, which for PID 1 means "ignored" when sent from inside (pid_namespaces(7)):
    Python's own SIGINT handler must go, or any container root could raise KeyboardInterrupt here. Exceptions
    are SIGPIPE and SIGXFSZ, which stay ignored, and SIGQUIT, which writes a stack to the log. An agent that is not
    PID 1 ignores what would end it: a SIGTERM for all that is in the container is not meant for it. Only SIGALRM ends
    the one that tries whether it could take over (`end_after`).
    """
    global _default
    _default = _signal.SIG_DFL if posix.getpid() == 1 else _signal.SIG_IGN
    for number in _changeable():
        _signal.signal(number, _signal.SIG_DFL if number == _signal.SIGALRM else _default)
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_IGN)
    _signal.signal(_signal.SIGQUIT, _dump_stack)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    wakeup_read, wakeup_write = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
    # A full pipe is readable, which is all that counts: losing a byte loses nothing.
    _signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGCHLD, _ignore)
    return wakeup_read


def hold_all() -> None:
    """Mask every signal, until `take_over` in the program that is executed next.

    The mask survives exec(2), dispositions do not: between the start of the interpreter and `take_over` a SIGINT would
    end PID 1. What arrives meanwhile stays pending.
    """
    _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())


def release_all() -> None:
    """Take `hold_all` back."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


def end_after(seconds: int) -> None:
    """Have SIGALRM end this process after so many seconds, also across exec. alarm(2)."""
    _signal.alarm(seconds)


def reset_in_child() -> None:
    """Undo `take_over` between fork and exec: every disposition is the default, nothing is masked.

    exec(2) resets handlers but keeps "ignored": without this every process would ignore SIGPIPE.
    """
    _signal.set_wakeup_fd(-1)
    touched = (_signal.SIGCHLD, _signal.SIGQUIT, _signal.SIGPIPE, _signal.SIGXFSZ)
    for number in touched if _default == _signal.SIG_DFL else _changeable():
        _signal.signal(number, _signal.SIG_DFL)


def _changeable() -> list[int]:
    fixed = (SIGKILL, _signal.SIGSTOP, *_GLIBC_INTERNAL)
    return [number for number in range(1, LAST_SIGNAL + 1) if number not in fixed]


def _ignore(signal_number: int, frame: FrameType | None) -> None:
    """Only exists so that Python writes to the wakeup descriptor; SIG_DFL and SIG_IGN would not."""


def _dump_stack(signal_number: int, frame: FrameType | None) -> None:
    global _dumps
    _dumps += 1
    if _dumps > _MAX_STACK_DUMPS:
        return
    lines = ["garden-init: stack on SIGQUIT, innermost first"]
    while frame is not None:
        code = frame.f_code
        lines.append(f"  {code.co_filename}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    posix.write(2, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
