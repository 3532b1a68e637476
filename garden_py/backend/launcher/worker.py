"""One worker: takes a job, does it, answers; one after the other until the server closes the socket."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import traceback
from collections import deque
from typing import Any

from garden_py import wire
from garden_py.backend.host.framed import receive_frames, take_fds
from garden_py.backend.launcher.jobs import JOBS, Bench
from garden_py.backend.launcher.long_texts import take_in
from garden_py.backend.net.rule_socket import REST_S
from garden_py.model.errors import GardenError


def serve(sock: socket.socket) -> None:
    """Work until end of file on sock. The server's death is that end; a job under way is finished first."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    bench = Bench()
    decoder, fds = wire.Decoder(), deque[int]()
    while (frames := _receive(sock, decoder, fds, bench)) is not None:
        for frame in frames:
            job_fds = take_fds(frame, fds)
            kind, value = _run(bench, frame, job_fds)
            for fd in job_fds:
                os.close(fd)
            _answer(sock, wire.encode_frame(kind, frame.id, value))
            while bench.afterwards:
                bench.afterwards.pop()()


def _receive(
    sock: socket.socket, decoder: wire.Decoder, fds: deque[int], bench: Bench
) -> list[wire.Frame] | None:
    while bench.net.close_rested() and not select.select([sock], [], [], REST_S)[0]:
        pass
    try:
        return receive_frames(sock, decoder, fds)
    except ConnectionResetError:
        return (
            None  # the server died with an answer of ours unread, which is an end of file as well (unix(7))
        )


def _answer(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except BrokenPipeError:
        return  # the server died while the job ran; the journal knows what was attempted


def _run(bench: Bench, frame: wire.Frame, fds: list[int]) -> tuple[int, dict[str, Any]]:
    op = str(frame.value.get("op"))
    try:
        return wire.REPLY, JOBS[op](bench, take_in(frame.value, fds), fds)
    except GardenError as error:
        return wire.ERROR, {"code": error.code, "message": str(error), "facts": _facts(error)}
    except OSError as error:
        return wire.ERROR, {"code": "host_fault", "message": str(error), "facts": {"step": op}}
    except Exception as error:  # noqa: BLE001 - a worker must answer; the trace goes to the log
        traceback.print_exc(file=sys.stderr)
        return wire.ERROR, {
            "code": "internal",
            "message": f"{op}: {type(error).__name__}: {error}",
            "facts": {},
        }


def _facts(error: GardenError) -> dict[str, Any]:
    """The attributes that launcher/client.py rebuilds the error from."""
    return {name: value for name, value in vars(error).items() if isinstance(value, str | int)}
