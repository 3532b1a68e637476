"""The command `garden`, from its first moment on."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line and exit with its code. Ctrl-C ends it as it ends any program, also while it is loaded."""
    loading = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else somebody wants it ignored
    if loading:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from garden_py.cli.main import main as run

    if loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
