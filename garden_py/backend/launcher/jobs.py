"""The jobs a worker can do. Parameters and results are wire values; descriptors come beside them.

Errors are those of `model.errors`; they cross to the server by their code (launcher/client.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sh

from garden_py.backend.host import syscalls
from garden_py.backend.host.idmap import IdMap
from garden_py.backend.launcher.rules import list_in_child
from garden_py.backend.net import jobs as net_jobs
from garden_py.backend.plugin.program import run_program
from garden_py.backend.rootfs import mounts
from garden_py.backend.runtime.command import AGENT_FDS, Runtime, cause_of_failure
from garden_py.model.errors import HostFault, NotSupported
from garden_py.observe import failpoints
from garden_py.observe.failpoints import Point
from garden_py.observe.steps import Step

RUNTIME_TIMEOUT_S = 60


@dataclass
class Bench:
    """What a worker keeps between jobs.

    Attributes:
        afterwards: what is left to do when the answer to a job is out.
    """

    afterwards: list[Callable[[], None]] = field(default_factory=list)
    net: net_jobs.NetBench = field(default_factory=net_jobs.NetBench)


def launch(bench: Bench, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Mount a container's root file system and start it.

    Args:
        bench: of this worker.
        params: `plan` (MountPlan as a dict), `id`, `bundle`, `runtime`, `root`, `log`, `agent_log`,
            `fail_points` (observe/failpoints.py).
        fds: what is handed to PID 1: the agent's listening socket, and the program of its filter if it has one.

    Returns:
        `pid` of PID 1, in the host's numbering; `steps`, the begin (CLOCK_REALTIME) and length in ns of what took time,
        by its name in observe/steps.py.
    """
    plan = _parse_plan(params["plan"])
    bundle = Path(params["bundle"])
    pid_file = bundle / "pid"
    steps: dict[str, list[int]] = {}
    with _timed(steps, Step.MOUNT):
        mounts.apply(plan)
    try:
        failpoints.reach_in_worker(Point.CREATE_MOUNT, params["fail_points"])
        for fd, number in zip(fds, AGENT_FDS, strict=False):
            os.dup2(fd, number, inheritable=True)
        runtime = Runtime(params["runtime"], Path(params["root"]))
        argv = runtime.run_argv(
            params["id"], bundle=bundle, pid_file=pid_file, log=Path(params["log"]), fds=len(fds)
        )
        with _timed(steps, Step.RUNTIME):
            _call_runtime(runtime, argv, log=Path(params["log"]), stderr=Path(params["agent_log"]))
        failpoints.reach_in_worker(Point.CREATE_RUN, params["fail_points"])
        pid = int(pid_file.read_text())
    except BaseException:
        mounts.release(plan.directory)
        raise
    finally:
        with open(os.devnull, "rb") as null:
            for number in AGENT_FDS:
                os.dup2(null.fileno(), number, inheritable=False)
    # The container has its own copy of the mounts by now; letting go of ours takes milliseconds nobody need wait for.
    bench.afterwards.append(partial(mounts.release, plan.directory))
    return {"pid": pid, "steps": steps}


@contextmanager
def _timed(steps: dict[str, list[int]], name: Step) -> Iterator[None]:
    began_ns, began = time.time_ns(), time.monotonic_ns()
    yield
    steps[name.value] = [began_ns, time.monotonic_ns() - began]


def release_mounts(bench: Bench, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Let go of a launch's mounts, should its worker have been killed in the middle."""
    mounts.release(Path(params["directory"]))
    return {}


def list_mounts(bench: Bench, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Ids of the launches whose mounts are still held here, those of launches under way included."""
    return {"ids": os.listdir(params["directory"])}


def list_rules(bench: Bench, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """What nft lists.

    Args:
        bench: of this worker.
        params: `command`, for nft.
        fds: the network namespace to list in; none: the host's.

    Returns:
        `text`, cut where it is too much for a frame.
    """
    return {"text": list_in_child(params["command"], fds[0] if fds else None)}


def run_plugin(bench: Bench, params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Run a program of somebody else's; see plugin/program.py.

    Args:
        bench: of this worker.
        params: `argv`, `timeout_ms`.
        fds: its standard input, and what is at its end when nobody waits for the program any more.

    Returns:
        `status`, `stdout`, `stderr`, `gave_up`.
    """
    stdin, caller = fds
    ended = run_program(params["argv"], stdin=stdin, caller=caller, timeout_s=params["timeout_ms"] / 1000)
    return asdict(ended)


def _parse_plan(value: dict[str, Any]) -> mounts.MountPlan:
    binds = tuple(mounts.BindSource(**bind) for bind in value["binds"])
    return mounts.MountPlan(
        **{
            **value,
            "directory": Path(value["directory"]),
            "layers": tuple(value["layers"]),
            "binds": binds,
            "id_map": _parse_id_map(value["id_map"]),
            "ready_map": _parse_id_map(value["ready_map"]),
        }
    )


def _parse_id_map(ranges: list[list[int]] | None) -> IdMap | None:
    return None if ranges is None else IdMap(tuple((first, host, count) for first, host, count in ranges))


def _call_runtime(runtime: Runtime, argv: list[str], *, log: Path, stderr: Path) -> None:
    """Run the runtime to its end.

    Its standard streams are files, not pipes: PID 1 inherits them, and a pipe would never see its end.
    """
    step = f"{Path(runtime.program).name} {argv[6]}"
    with open(os.devnull, "r+b") as null, stderr.open("ab") as errors:
        try:
            command = sh.Command(runtime.program)(
                *argv,
                _in=null,
                _out=null,
                _err=errors,
                _pass_fds=set(AGENT_FDS),
                _tty_in=False,
                _tty_out=False,
                _bg=True,
                _bg_exc=False,
                # Or it would go on making what the server, told of our end, is taking away already.
                _preexec_fn=syscalls.die_with_parent,
            )
            # sh's own _timeout polls every 100 ms, which would be most of a create.
            watchdog = threading.Timer(RUNTIME_TIMEOUT_S, command.kill)
            watchdog.start()
            try:
                command.wait()
            finally:
                watchdog.cancel()
                watchdog.join()  # no thread may be left when the next job forks
        except sh.CommandNotFound as error:
            raise NotSupported(f"the runtime {runtime.program!r} is not installed on the server") from error
        except sh.SignalException_SIGKILL as error:
            raise HostFault(step, f"killed after {RUNTIME_TIMEOUT_S} s, or by somebody else") from error
        except sh.ErrorReturnCode as error:
            log_text = log.read_text(errors="replace") if log.exists() else ""
            cause = cause_of_failure(log_text, stderr.read_text(errors="replace")[-4096:])
            raise HostFault(step, cause) from error


def _net_job(job: net_jobs.NetJob) -> Job:
    return lambda bench, params, fds: job(bench.net.network(params), params, fds)


Job = Callable[[Bench, dict[str, Any], list[int]], dict[str, Any]]

JOBS: dict[str, Job] = {
    "container.launch": launch,
    "container.release_mounts": release_mounts,
    "container.list_mounts": list_mounts,
    "container.list_rules": list_rules,
    "plugin.run": run_plugin,
    **{name: _net_job(job) for name, job in net_jobs.JOBS.items()},
}
