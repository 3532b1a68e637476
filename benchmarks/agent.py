"""The agent: how soon it answers, and what memory it alone needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measure import Samples, alternate
from report import Row, at_most
from setting import Setting
from stopwatch import Stopwatch, running_stopwatch

from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle

_MEMORY_CONTAINERS = 3
_MARK_KIB = 5 * 1024
# As PID 1 of a pid namespace, which the agent wants to be; its peer gets the same.
_AS_PID_1 = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")


def measure_agent(setting: Setting) -> Iterator[Row]:
    """Start-up in a container and alone, and private memory."""
    yield from _in_container(setting)
    yield from _alone(setting)
    yield from _memory(setting)


def _in_container(setting: Setting) -> Iterator[Row]:
    runc = setting.runc

    def until_hello() -> float:
        name = runc.new_id()
        try:
            return runc.run_until_hello_ms(name)
        finally:
            runc.delete_ms(name)

    def command_only() -> float:
        name = runc.new_id()
        try:
            return runc.run_ms(name)
        finally:
            runc.delete_ms(name)

    found = alternate({"hello": until_hello, "run": command_only}, rounds=setting.rounds)
    yield Row("agent: runc run → hello answered", "ms", found["hello"], "runc run -d", found["run"])


def _alone(setting: Setting) -> Iterator[Row]:
    place = setting.cell.server.place
    bundle = build_runtime_bundle(setting.cell.agents)  # there already: the server has made it
    with running_stopwatch() as stopwatch:
        found = alternate(
            {
                "agent": lambda: _agent_ms(stopwatch, bundle, place),
                "python": lambda: _python_ms(stopwatch, place),
            },
            rounds=setting.rounds,
        )
    peer = "python3 -S -c pass"
    yield Row("agent: start → hello answered, no container", "ms", found["agent"], peer, found["python"])


def _agent_ms(stopwatch: Stopwatch, bundle: RuntimeBundle, place: Path) -> float:
    argv = [*_AS_PID_1, "env", "-i", *bundle.env, *bundle.argv(str(bundle.directory.parent))]
    answer = stopwatch.ask(
        op="time",
        argv=argv,
        log=str(place / "agent.log"),
        listener=str(place / "agent.sock"),
        hello=True,
        leave=True,
    )
    return float(answer["hello_ms"])


def _python_ms(stopwatch: Stopwatch, place: Path) -> float:
    argv = [*_AS_PID_1, "env", "-i", _interpreter(), "-S", "-c", "pass"]
    return float(stopwatch.ask(op="time", argv=argv, log=str(place / "python.log"))["ms"])


def _interpreter() -> str:
    """The one behind the virtual environment, which the agent's bundle is made of."""
    return os.path.realpath(sys.executable)


def _memory(setting: Setting) -> Iterator[Row]:
    cell = setting.cell
    with ExitStack() as stack, _idle_python() as python_pid:
        created = [cell.create() for _ in range(_MEMORY_CONTAINERS)]
        for container in created:
            stack.callback(cell.destroy, container.handle)
            cell.run_ms(container.handle, "true")
        ours = Samples(tuple(_private_kib(container.pid) for container in created))
        theirs = Samples((_private_kib(python_pid),))
    peer = "idle python3 -S"
    yield Row("agent: private memory", "KiB", ours, peer, theirs, (at_most(_MARK_KIB),))


@contextmanager
def _idle_python() -> Iterator[int]:
    argv = [_interpreter(), "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def _private_kib(pid: int) -> float:
    """Pages that nobody else maps. proc(5), smaps_rollup."""
    lines = (
        Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )  # the first names the address range
    fields = dict(line.split(":", 1) for line in lines)
    return float(sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")))
