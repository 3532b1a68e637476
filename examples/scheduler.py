#!/usr/bin/env python3
"""Fills a cell with tasks: as many containers at a time as it has room for, until the list is done.

    python examples/scheduler.py --memory-mib 32 -- sh -c 'echo task $TASK; sleep 1' < list-of-names

Each line of stdin is a task; the command runs once for each, in a container of its own, with TASK set to the line.
How many run at once follows from the cell's own figures (free container slots, memory) and --at-most. A task that
cannot be placed because a pool ran empty (someone else uses the cell as well) is put back and tried again later. At
the end each task's result is one line of JSON on stdout; exit code 1 if any task failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass

from garden_py.client import (
    AsyncGardenClient,
    Capacity,
    ContainerSpec,
    GardenError,
    Limits,
    ResourceExhausted,
)

# Slots left to others, among them the cell's own health checks.
SLOTS_LEFT_FREE = 1
# Part of the host's memory that tasks may be promised.
MEMORY_SHARE = 0.8
MAX_PLACEMENTS = 5
PLACEMENT_DELAY_S = 1.0
OUTPUT_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Demand:
    """What every task needs."""

    command: list[str]
    memory_bytes: int
    image: str


@dataclass(frozen=True)
class Result:
    """How one task went. `exit_code` None: it could not be run, and `error` says why."""

    task: str
    exit_code: int | None
    seconds: float
    output_tail: str = ""
    error: str = ""


def room_for(capacity: Capacity, demand: Demand, at_most: int) -> int:
    """How many tasks may run at once; at least one, so that a full cell is asked again rather than given up on."""
    free_slots = capacity.max_containers - capacity.containers - SLOTS_LEFT_FREE
    by_memory = int(capacity.memory_bytes * MEMORY_SHARE) // demand.memory_bytes
    return max(1, min(free_slots, by_memory, at_most))


async def run_task(garden: AsyncGardenClient, task: str, demand: Demand) -> Result:
    """Run one task in a container of its own.

    Raises:
        ResourceExhausted: the cell has no room for it now.
    """
    begin_s = time.monotonic()
    spec = ContainerSpec(
        image=demand.image,
        limits=Limits(memory_bytes=demand.memory_bytes),
        properties={"scheduler.task": task},
    )
    async with await garden.create(spec) as container:
        process = await container.run(demand.command, env={"TASK": task})
        await process.stdin.close()
        output = await process.output()
    tail = (output.stdout + output.stderr)[-OUTPUT_TAIL_BYTES:].decode(errors="replace")
    seconds = round(time.monotonic() - begin_s, 3)
    return Result(task, output.exit.shell_code, seconds, tail, output.exit.reason)


async def place(garden: AsyncGardenClient, task: str, demand: Demand) -> Result:
    """Run a task, trying again while the cell is full; whatever goes wrong is in the result."""
    begin_s = time.monotonic()
    error: GardenError | None = None
    for _ in range(MAX_PLACEMENTS):
        try:
            return await run_task(garden, task, demand)
        except ResourceExhausted as full:
            error = full
            await asyncio.sleep(PLACEMENT_DELAY_S)
        except GardenError as failed:
            error = failed
            break
    return Result(task, None, round(time.monotonic() - begin_s, 3), error=str(error))


async def schedule(garden: AsyncGardenClient, tasks: list[str], demand: Demand, at_most: int) -> list[Result]:
    """Run all tasks, as many at once as the cell has room for; results in order of completion."""
    waiting, results = deque(tasks), list[Result]()
    slots = min(room_for(await garden.capacity(), demand, at_most), len(tasks))

    async def work() -> None:
        while waiting:
            result = await place(garden, waiting.popleft(), demand)
            results.append(result)
            sys.stdout.write(json.dumps(asdict(result)) + "\n")
            sys.stdout.flush()

    async with asyncio.TaskGroup() as workers:
        for _ in range(slots):
            workers.create_task(work())
    return results


async def run(arguments: argparse.Namespace, tasks: list[str]) -> int:
    """Schedule the tasks and report; returns the exit code."""
    demand = Demand(arguments.command, arguments.memory_mib << 20, arguments.image)
    begin_s = time.monotonic()
    async with AsyncGardenClient(arguments.address) as garden:
        results = await schedule(garden, tasks, demand, arguments.at_most)
    failed = [result for result in results if result.exit_code != 0]
    took_s = time.monotonic() - begin_s
    sys.stderr.write(f"{len(results)} tasks, {len(failed)} failed, {took_s:.1f} s\n")
    return 1 if failed else 0


def main() -> int:
    """Read the command line and stdin."""
    parser = argparse.ArgumentParser(
        description="Run a command for each line of stdin, in garden containers."
    )
    parser.add_argument("--address", help="garden server; default: GARDEN_ADDRESS or its usual socket")
    parser.add_argument("--image", default="", help="root file system; default: the server's")
    parser.add_argument("--memory-mib", type=int, default=64, help="memory limit of each task")
    parser.add_argument("--at-most", type=int, default=16, help="tasks at a time, however large the cell")
    parser.add_argument("command", nargs="+", help="what to run; TASK is in its environment")
    arguments = parser.parse_args()
    tasks = [line.strip() for line in sys.stdin if line.strip()]
    try:
        return asyncio.run(run(arguments, tasks))
    except GardenError as error:
        sys.stderr.write(f"garden: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
