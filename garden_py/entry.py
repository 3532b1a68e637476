"""The command `garden`, from its first moment on."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its code. Ctrl-C ends it as it ends any program, also while it is loaded."""
    _make_streams_safe()
    loading = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else somebody wants it ignored
    if loading:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from garden_py.cli.main import main as run

    if loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _make_streams_safe() -> None:
    """What our parent has closed of stdin, stdout and stderr is /dev/null: a socket of ours could take its place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == fd  # the lowest that is free
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # whose encoding may lack what a name or a property has
        sys.stdout.reconfigure(errors="backslashreplace")
