"""The states of a container and which may follow which.

CREATING ──> ACTIVE <──> STOPPED
    │          │  └────────┬─> BROKEN        (agent gone or given up; only destroy helps)
    └──────────┴───────────┴─> DESTROYING <──> UNKILLABLE
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a container is in its life."""

    CREATING = "creating"
    ACTIVE = "active"
    STOPPED = "stopped"
    BROKEN = "broken"
    DESTROYING = "destroying"
    UNKILLABLE = "unkillable"


FOLLOWERS: dict[State, frozenset[State]] = {
    State.CREATING: frozenset({State.ACTIVE, State.DESTROYING}),
    State.ACTIVE: frozenset({State.STOPPED, State.BROKEN, State.DESTROYING}),
    State.STOPPED: frozenset({State.ACTIVE, State.STOPPED, State.BROKEN, State.DESTROYING}),
    State.BROKEN: frozenset({State.DESTROYING}),
    State.DESTROYING: frozenset({State.UNKILLABLE}),
    State.UNKILLABLE: frozenset({State.DESTROYING, State.UNKILLABLE}),
}

USABLE = frozenset({State.ACTIVE, State.STOPPED})


def may_follow(now: State, then: State) -> bool:
    """Whether a container in state `now` may change to `then`."""
    return then in FOLLOWERS[now]
