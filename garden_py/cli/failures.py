"""What went wrong, as one line on stderr and an exit code.

    0  done            1  failed            2  bad input: the command line, or a field the server refused

`run` and `attach` pass on the process's own exit code, 128 + N when signal N ended it. Like env(1), and others,
`run` ends with 127 if there is no such program, 126 if it cannot be executed, and 125 if it was not started for another
reason.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from garden_py.cli.printable import plain

if TYPE_CHECKING:
    from garden_py.client import GardenError

EXIT_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_NOT_STARTED: Final = 125
EXIT_INTERRUPTED: Final = 130
_EXIT_OF_START: Final = {"EXECUTABLE_NOT_FOUND": 127, "NOT_EXECUTABLE": 126}


_HINTS = {
    "Permission denied": "root and the group of --socket-group may",
    "Socket closed": "if the door is one of TLS, give --tls-ca, and --tls-cert with --tls-key",
}
_asked_at = ""


def remember_address(address: str) -> None:
    """Whom a failure to reach the server is about."""
    global _asked_at
    _asked_at = address


def report(message: str) -> None:
    """One error on stderr, in garden's voice."""
    sys.stderr.write("".join(f"{plain(line)}\n" for line in f"garden: {message}".split("\n")))
    sys.stderr.flush()


def failure_text(error: GardenError, *, about: str = "") -> str:
    """The server's sentence; violated fields that it does not name already follow, one per line.

    Args:
        error: what a call raised.
        about: what the call was about, if the sentence alone might not tell.
    """
    from garden_py.client.errors import ServerFault, Unavailable

    text = error.message
    if isinstance(error, ServerFault) and error.request_id:
        text = f"{text} (request_id {error.request_id} in the server's log)"
    if isinstance(error, Unavailable) and not error.code:
        cause = _shortest_cause(text)
        hint = _HINTS.get(cause, "is `garden server` running?")
        text = f"cannot reach the server{_asked_at and f' at {_asked_at}'}: {cause} ({hint})"
    if about and about not in text:
        text = f"{about}: {text}"
    details = [f"{each.field}: {each.problem}" for each in (*error.fields, *error.quotas)]
    return "\n".join([text, *(f"  {detail}" for detail in details if detail not in text)])


def _shortest_cause(text: str) -> str:
    """The end of gRPC's chain of causes, e.g. "No such file or directory"."""
    return text.rpartition("error: ")[2].strip() or text


def report_failure(error: GardenError, *, about: str = "") -> int:
    """Print a failed call; returns the exit code it deserves."""
    from garden_py.client.errors import InvalidArgument

    report(failure_text(error, about=about))
    return EXIT_BAD_INPUT if isinstance(error, InvalidArgument) else EXIT_FAILED


def report_start(error: GardenError) -> int:
    """Print that a process was not started; returns the exit code of `run`."""
    code = report_failure(error)
    return code if code == EXIT_BAD_INPUT else _EXIT_OF_START.get(error.code, EXIT_NOT_STARTED)
