"""Where the time of a create or destroy goes: one place takes it, and whoever wants it listens.

`operation` is put around the whole, `step` around each part, wherever that is done: deeper calls and the tasks they
start find the operation by themselves (contextvars). Outside of an operation a step costs one look and is not told.
Steps may overlap: some are taken at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias


class Step(StrEnum):
    """Steps by the names that metrics and traces show; docs/operations.md says what each is."""

    IMAGE = "image"
    LEASE = "lease"
    DISK = "disk"
    BUNDLE = "bundle"
    LAUNCH = "launch"
    MOUNT = "mount"
    RUNTIME = "runtime"
    LIMITS = "limits"
    AGENT = "agent"
    NETWORK = "network"
    JOURNAL = "journal"
    KILL = "kill"
    CGROUP = "cgroup"
    RECORD = "record"
    DIRECTORY = "directory"
    RELEASE = "release"


CREATE = "create"
DESTROY = "destroy"
CREATE_STEPS = (
    Step.IMAGE, Step.LEASE, Step.DISK, Step.BUNDLE, Step.LAUNCH, Step.MOUNT, Step.RUNTIME, Step.LIMITS, Step.AGENT,
    Step.NETWORK, Step.JOURNAL,
)  # fmt: skip
DESTROY_STEPS = (
    Step.KILL, Step.NETWORK, Step.CGROUP, Step.RECORD, Step.DISK, Step.DIRECTORY, Step.RELEASE, Step.JOURNAL,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timed:
    """One step that was taken.

    Attributes:
        began_ns: CLOCK_REALTIME.
        took_ns: CLOCK_MONOTONIC.
        failure: the class of the error that ended it; empty: it was done.
    """

    step: Step
    began_ns: int
    took_ns: int
    failure: str = ""


@dataclass(slots=True)
class Operation:
    """One create or destroy; `took_ns` and `failure` are known when listeners are told.

    Attributes:
        name: CREATE or DESTROY.
        handle: of the container.
        began_ns: CLOCK_REALTIME.
        steps: in the order of their ends.
    """

    name: str
    handle: str
    began_ns: int
    took_ns: int = 0
    failure: str = ""
    steps: list[Timed] = field(default_factory=list)


Listener: TypeAlias = Callable[[Operation], None]
"""Told of each operation once, at its end. It must not raise, and not take long."""

_current: ContextVar[Operation | None] = ContextVar("garden_operation", default=None)


@contextmanager
def operation(name: str, handle: str, listeners: Sequence[Listener]) -> Iterator[None]:
    """The length of one operation; its steps are those taken inside."""
    found = Operation(name, handle, time.time_ns())
    began = time.monotonic_ns()
    token = _current.set(found)
    try:
        yield
    except BaseException as error:
        found.failure = type(error).__name__
        raise
    finally:
        _current.reset(token)
        found.took_ns = time.monotonic_ns() - began
        for listener in listeners:
            listener(found)


@contextmanager
def step(name: Step) -> Iterator[None]:
    """The length of one step of the operation under way."""
    inside = _current.get()
    if inside is None:
        yield
        return
    began_ns, began = time.time_ns(), time.monotonic_ns()
    failure = ""
    try:
        yield
    except BaseException as error:
        failure = type(error).__name__
        raise
    finally:
        inside.steps.append(Timed(name, began_ns, time.monotonic_ns() - began, failure))


def taken_elsewhere(name: Step, began_ns: int, took_ns: int) -> None:
    """A step that another process of this host has taken, and timed; arguments as in `Timed`."""
    inside = _current.get()
    if inside is not None:
        inside.steps.append(Timed(name, began_ns, took_ns))
