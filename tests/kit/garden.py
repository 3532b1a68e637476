"""Short words for what tests of a real server do all the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import Container, GardenClient
from kit.patience import FACTOR

PATIENCE = timedelta(seconds=20) * FACTOR


def sh(script: str) -> list[str]:
    """The argv of a shell script."""
    return ["sh", "-c", script]


def text_of(container: Container, script: str, **fields: Any) -> str:
    """What a script writes to stdout; it must succeed."""
    done = container.run(sh(script), **fields).output()
    assert done.exit.code == 0, f"{script!r} ended with {done.exit}: {done.stderr.decode()}"
    return done.stdout.decode()


def code_of(container: Container, script: str, **fields: Any) -> int:
    """The exit code of a script, as a shell reports it."""
    return container.run(sh(script), **fields).output().exit.shell_code


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """Poll in small steps for something that nothing announces; its first true value."""
    deadline = time.monotonic() + timeout_s * FACTOR
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s * FACTOR} s"
        time.sleep(0.01)
    return found


@contextmanager
def open_stub(address: str) -> Iterator[garden_pb2_grpc.GardenStub]:
    """The generated stub, for requests that the client would not make."""
    with grpc.insecure_channel(address) as channel:
        yield garden_pb2_grpc.GardenStub(channel)  # type: ignore[no-untyped-call]


def details_of(error: grpc.RpcError) -> tuple[str, set[str]]:
    """(reason, fields) that a failed call's google.rpc details name."""
    metadata: Any = error.trailing_metadata() or ()
    payloads = [value for key, value in metadata if key == "grpc-status-details-bin"]
    reason, fields = "", set()
    for detail in status_pb2.Status.FromString(payloads[0]).details if payloads else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
            fields |= {value for key, value in info.metadata.items() if key == "field"}
        elif detail.Unpack(bad):
            fields |= {violation.field for violation in bad.field_violations}
    return reason, fields


def events_of(garden: GardenClient, *handles: str) -> Iterator[Any]:
    """Events of some containers from now on; WATCHING has been seen when this returns."""
    events = garden.events(handles)
    next(events)
    return events
