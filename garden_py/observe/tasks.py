"""Where everything waits: on SIGUSR1 the server writes the stack of every task to its log (docs/debugging.md)."""

from __future__ import annotations

import asyncio
import signal
import sys


def dump_tasks_on_signal() -> None:
    """Answer SIGUSR1; to be called in the server's event loop. A loop that is itself stuck answers nothing."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, dump_tasks)


def dump_tasks() -> None:
    """Write `describe_tasks` to stderr, which is the log."""
    print(describe_tasks(), end="", file=sys.stderr, flush=True)


def describe_tasks() -> str:
    """Every task of this loop with the place it waits at, innermost frame last."""
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    lines = [f"{len(tasks)} tasks\n"]
    for task in tasks:
        lines.append(f"{task.get_name()}: {task.get_coro()!r}\n")
        # Without source lines, as Task.print_stack() shows them: linecache fails on frames of compiled modules.
        for frame in task.get_stack():
            code = frame.f_code
            lines.append(f"  {code.co_filename}:{frame.f_lineno} {code.co_qualname}\n")
    return "".join(lines)
