#!/usr/bin/env python3
"""Runs a CI job in one container: steps in order, live logs, time limits, artifacts.

    python examples/ci_job_runner.py examples/job.toml --artifacts out/

The job file is TOML; see job.toml beside this file. Steps share the container's file system, so what one builds
the next can test. The first step that fails ends the job, and its exit code is the runner's; a step over its time
limit is ended with TERM, then KILL, and counts as 124, as with timeout(1). Artifacts are copied out in either case.
"""

from __future__ import annotations

import argparse
import sys
import threading
import tomllib
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from garden_py.client import (
    Container,
    ContainerSpec,
    GardenClient,
    GardenError,
    Limits,
    NotFound,
    OutputChunk,
    Process,
    ProcessSpec,
    Stream,
)

EXIT_TIMED_OUT = 124
EXIT_BAD_JOB = 2
TERM_GRACE_S = 5.0


@dataclass(frozen=True)
class Step:
    """One command of a job.

    Attributes:
        name: shown in the log.
        run: a script for the container's `sh`.
        timeout_s: seconds it may take.
        env: its own variables.
        user: user of the container.
    """

    name: str
    run: str
    timeout_s: float = 600.0
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""


@dataclass(frozen=True)
class Job:
    """A job file.

    Attributes:
        name: of the job.
        steps: in order.
        image: root file system; empty: the server's default.
        workdir: working directory of every step; `source` is copied into it.
        source: local directory, relative to the job file; empty: none.
        artifacts: paths in the container to copy out at the end.
        memory_bytes: limit of all steps together; 0: none.
        pids: most processes at a time; 0: no limit.
    """

    name: str
    steps: tuple[Step, ...]
    image: str = ""
    workdir: str = "/build"
    source: str = ""
    artifacts: tuple[str, ...] = ()
    memory_bytes: int = 0
    pids: int = 0


class BadJob(ValueError):
    """The job file does not describe a job."""


def read_job(path: Path) -> Job:
    """A job from its file.

    Raises:
        BadJob: unknown or missing keys; the message names them.
    """
    try:
        table = tomllib.loads(path.read_text())
        steps = tuple(Step(**step) for step in table.pop("steps", []))
        job = Job(
            name=table.pop("name", path.stem),
            steps=steps,
            artifacts=tuple(table.pop("artifacts", [])),
            **table,
        )
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise BadJob(f"{path}: {error}") from error
    if not job.steps:
        raise BadJob(f"{path}: a job needs at least one [[steps]] table with name and run")
    return job


def run_job(garden: GardenClient, job: Job, job_dir: Path, artifacts_dir: Path) -> int:
    """Run a job to its end; returns its exit code."""
    limits = Limits(memory_bytes=job.memory_bytes or None, pids=job.pids or None)
    spec = ContainerSpec(image=job.image, limits=limits, properties={"ci.job": job.name})
    with garden.create(spec) as container:
        say(f"job {job.name} in container {container.handle}")
        if job.source:
            container.copy_in(job_dir / job.source, job.workdir, name=".")
        code = 0
        for step in job.steps:
            code = run_step(container, job, step)
            if code != 0:
                break
        collect_artifacts(container, job.artifacts, artifacts_dir)
    say(f"job {job.name}: {'passed' if code == 0 else f'failed with {code}'}")
    return code


def run_step(container: Container, job: Job, step: Step) -> int:
    """Run one step with its output on ours; returns its exit code, 124 if it took too long."""
    say(f"--- {step.name}")
    command = ProcessSpec("sh", ("-ec", step.run), env=step.env, dir=job.workdir, user=step.user)
    with container.run(command) as process:
        process.stdin.close()
        timed_out = threading.Event()
        watchdog = threading.Timer(step.timeout_s, end_step, [process, timed_out])
        watchdog.start()
        try:
            for event in process.events():
                if isinstance(event, OutputChunk):
                    out = sys.stdout.buffer if event.stream is Stream.STDOUT else sys.stderr.buffer
                    out.write(event.data)
                    out.flush()
        finally:
            watchdog.cancel()
            watchdog.join()
        status = process.wait()
    if timed_out.is_set():
        say(f"--- {step.name}: stopped after its limit of {step.timeout_s:g} s")
        return EXIT_TIMED_OUT
    if status.shell_code != 0:
        say(f"--- {step.name}: {status.reason or f'exit {status.shell_code}'}")
    return status.shell_code


def end_step(process: Process, timed_out: threading.Event) -> None:
    """End a step that takes too long, with everything in its process group."""
    timed_out.set()
    process.signal("TERM", group=True)
    try:
        process.wait(timedelta(seconds=TERM_GRACE_S))
    except TimeoutError:
        process.signal("KILL", group=True)


def collect_artifacts(container: Container, paths: tuple[str, ...], artifacts_dir: Path) -> None:
    """Copy out what is there; what a failed job did not make is said, not an error."""
    for path in paths:
        try:
            container.copy_out(path, artifacts_dir)
            say(f"artifact {path} -> {artifacts_dir}")
        except NotFound:
            say(f"artifact {path} was not made")


def say(message: str) -> None:
    """A line of the runner, apart from the steps' output."""
    sys.stdout.flush()
    sys.stderr.write(f"[ci] {message}\n")
    sys.stderr.flush()


def main() -> int:
    """Read the command line and run the job."""
    parser = argparse.ArgumentParser(description="Run a CI job in a garden container.")
    parser.add_argument("job", type=Path, help="job file (TOML)")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="where artifacts go")
    parser.add_argument("--address", help="garden server; default: GARDEN_ADDRESS or its usual socket")
    arguments = parser.parse_args()
    try:
        job = read_job(arguments.job)
        with GardenClient(arguments.address) as garden:
            return run_job(garden, job, arguments.job.parent, arguments.artifacts)
    except BadJob as error:
        say(str(error))
        return EXIT_BAD_JOB
    except GardenError as error:
        say(f"garden: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
