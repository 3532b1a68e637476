"""What a seed decides: lives and attacks, drawn before anything happens so that timing cannot change them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta

from garden_py.client import ContainerSpec, EgressAction, EgressPolicy, EgressProtocol, EgressRule, Limits
from garden_py.client.values import PortMapping, PortRange

WORKS = ("count", "blob", "crash", "trap", "stdin", "late", "terminal", "tight", "long", "long")
STYLES = ("run", "slow", "vanish", "detached", "twice", "crowd")
CHANGES = ("properties", "egress", "limits", "port", "look", "copy")
IMAGES = 6
_MOST_DIGITS = 5.3
MOST = int(10**_MOST_DIGITS)
"""Lines or bytes of one process."""
ENDINGS = ("destroy", "destroy", "destroy", "stop", "expire", "twice", "busy")


@dataclass(frozen=True, slots=True)
class Step:
    """One thing a client does with its container.

    Attributes:
        kind: of WORKS or CHANGES.
        style: how its output is read; of STYLES.
        size: lines or bytes, as the kind means it.
        code: the exit code a process shall have.
        fraction: where in the output a vanishing reader leaves, 0 to 1.
        sidecar: a process has a root file system of its own.
    """

    kind: str
    style: str
    size: int
    code: int
    fraction: float
    sidecar: bool


@dataclass(frozen=True, slots=True)
class LifePlan:
    """One container's life.

    Attributes:
        twin: two creates with one request id at the same time.
        parallel: the steps are taken at the same time.
        ending: of ENDINGS.
        checks_broken: if it is broken on purpose, look whether that is reported.
        image: number of an image to make it of (see Board); None: the server's default.
    """

    spec: ContainerSpec
    steps: tuple[Step, ...]
    twin: bool
    parallel: bool
    ending: str
    checks_broken: bool
    image: int | None


@dataclass(frozen=True, slots=True)
class AttackPlan:
    """One attack: a while after the last one, on the victim at this fraction of those there are."""

    kind: str
    pause_s: float
    victim: float
    hold_s: float


def plan_life(seed: int, client: int, number: int) -> LifePlan:
    """The number-th life of a client."""
    draw = random.Random(f"{seed}/client/{client}/{number}")
    handle = f"c{client}-{number}"
    spec = ContainerSpec(
        handle=handle,
        privileged=draw.random() < 0.1,
        env={"WHO": handle},
        properties={"client": str(client)},
        limits=Limits(memory_bytes=draw.choice((None, 128 << 20)), pids=draw.choice((None, 100))),
        port_mappings=(PortMapping(container_port=8080),) if draw.random() < 0.1 else (),
        egress=draw_policy(draw) if draw.random() < 0.3 else None,
        grace_time=timedelta(minutes=5) if draw.random() < 0.3 else None,
    )
    fetch = random.Random(f"{seed}/image/{client}/{number}")
    steps = tuple(draw_step(draw) for _ in range(draw.randint(1, 3)))
    return LifePlan(
        spec,
        steps,
        twin=draw.random() < 0.1,
        parallel=draw.random() < 0.2,
        ending=draw.choice(ENDINGS),
        checks_broken=draw.random() < 0.5,
        image=fetch.randrange(IMAGES) if fetch.random() < 0.06 else None,
    )


def draw_step(draw: random.Random) -> Step:
    """A process in two of three cases, else a change or a copy."""
    kind = draw.choice(WORKS) if draw.random() < 0.67 else draw.choice(CHANGES)
    return Step(
        kind=kind,
        style=draw.choice(STYLES),
        size=int(10 ** draw.uniform(1, _MOST_DIGITS)),
        code=draw.choice((0, 0, 0, 1, 42, 255)),
        fraction=draw.random(),
        # A sidecar ends with its process; what a `late` one has left would go on.
        sidecar=draw.random() < 0.05 and kind != "late",
    )


def draw_policy(draw: random.Random) -> EgressPolicy:
    """A default action and a few rules."""
    rules = tuple(
        EgressRule(
            action=draw.choice((EgressAction.ALLOW, EgressAction.DENY)),
            protocol=EgressProtocol.TCP,
            networks=(f"10.{draw.randrange(256)}.0.0/16",),
            ports=(PortRange(draw.randint(1, 1000), 2000),),
        )
        for _ in range(draw.randrange(5))
    )
    return EgressPolicy(draw.choice((EgressAction.ALLOW, EgressAction.DENY)), rules)


def plan_attacks(seed: int, series: str, kinds: tuple[str, ...], weights: tuple[int, ...], every_s: float):
    """Attacks without end, on average one each every_s seconds."""
    draw = random.Random(f"{seed}/{series}")
    while True:
        kind = draw.choices(kinds, weights)[0]
        yield AttackPlan(kind, draw.uniform(0.3, 1.7) * every_s, draw.random(), draw.uniform(0.2, 1.0))
