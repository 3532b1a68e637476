"""A change of limits on its way, written down: what a server is killed in, the next one takes back.

A change is in force before the journal has it, for it may be refused. Between the two, the kernel and the journal say
different things of a container.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter, ValidationError

from garden_py.model.limits import Limits

log = structlog.get_logger()
_FILE = "limits-changing"
# Without one there is still something in force, which cannot be stated as 0.
_NEVER_NONE = frozenset({"cpu_weight", "io_weight", "disk_scope", "rlimits"})


@dataclass(frozen=True, slots=True)
class LimitChange:
    """A change that has begun.

    Attributes:
        wanted: the limits that it is to put in force.
        former: those in force before, of what it states.
        process_id: whose limits they are; None: the container's.
    """

    wanted: Limits
    former: Limits
    process_id: str | None = None

    @classmethod
    def of(cls, wanted: Limits, in_force: Limits, process_id: str | None = None) -> LimitChange:
        """A change of these limits; of rlimits, those can be taken back that were stated before."""
        former = wanted.those_of(in_force)
        unlimited: dict[str, Any] = {
            each.name: 0
            for each in fields(former)
            if each.name not in _NEVER_NONE
            and getattr(wanted, each.name) is not None
            and getattr(former, each.name) is None
        }
        names = dict(wanted.rlimits)
        rlimits = tuple((name, value) for name, value in in_force.rlimits if name in names)
        return cls(wanted, replace(former, **unlimited, rlimits=rlimits), process_id)

    def is_recorded(self, stated: Limits) -> bool:
        """Whether the journal has it: it states these limits."""
        rlimits = dict(stated.rlimits)
        return all(rlimits.get(name) == value for name, value in self.wanted.rlimits) and all(
            (getattr(stated, each.name) or 0) == value
            for each in fields(self.wanted)
            if each.name not in ("disk_scope", "rlimits")
            and (value := getattr(self.wanted, each.name)) is not None
        )


_CHANGE = TypeAdapter(LimitChange)


@contextmanager
def written_down(directory: Path, change: LimitChange) -> Iterator[None]:
    """Keep a change in a container's directory for as long as it lasts; who leaves has made all of it, or nothing."""
    note = directory / _FILE
    try:
        note.write_bytes(_CHANGE.dump_json(change))
    except OSError as error:  # a full disk, and the change may be what makes room
        log.warning("limits.change_not_noted", directory=str(directory), error=str(error))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def find_interrupted(directory: Path) -> LimitChange | None:
    """The change that a former server was killed in, if it was; nothing had been changed if its note is cut short."""
    try:
        return _CHANGE.validate_json((directory / _FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def forget_interrupted(directory: Path) -> None:
    """It has been taken back, or the journal has it."""
    (directory / _FILE).unlink(missing_ok=True)
