"""What is done to the server and to its containers while the clients work."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

from kit.cgroups import cgroups_of, groups_in, pids_in

from chaos.board import Board, Subject
from chaos.cell import Cell
from chaos.plan import AttackPlan, plan_attacks

SERVER_WEIGHTS = {"server-kill": 4, "server-term": 1, "server-stop": 1}
OTHER_WEIGHTS = {
    "launcher-kill": 2,
    "worker-kill": 2,
    "launcher-stop": 1,
    "runtime-kill": 3,
    "puller-kill": 2,
    "nft-table": 1,
    "disk-full": 2,
    "agent-kill": 4,
    "agent-stop": 2,
    "rm-upper": 1,
    "rm-bundle": 1,
    "rm-cgroup": 1,
    "rm-link": 1,
    "rm-runtime-state": 1,
    "rm-socket": 1,
}
ALL = (*SERVER_WEIGHTS, *OTHER_WEIGHTS)
_WATCH_S = 1.0


class Attacker:
    """Two series of attacks: one on the server itself, one on everything else.

    Args:
        chosen: kinds that take part; of ALL.
        every_s: mean pause between two attacks, for each series.
    """

    def __init__(
        self, board: Board, cell: Cell, seed: int, chosen: set[str], every_s: tuple[float, float]
    ) -> None:
        self._board = board
        self._cell = cell
        self._seed = seed
        self._chosen = chosen
        self._every_s = every_s

    async def run(self) -> None:
        """Attack until the run stops; what was begun is finished, so that there is a server at the end."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._series("server", SERVER_WEIGHTS, self._every_s[0]))
            both.create_task(self._series("others", OTHER_WEIGHTS, self._every_s[1]))

    async def _series(self, name: str, weights: dict[str, int], every_s: float) -> None:
        kinds = tuple(kind for kind in weights if kind in self._chosen)
        if not kinds:
            return
        for plan in plan_attacks(self._seed, name, kinds, tuple(weights[kind] for kind in kinds), every_s):
            with suppress(TimeoutError):
                async with asyncio.timeout(plan.pause_s):
                    await self._board.stopping.wait()
            await self._cell.up.wait()
            if self._board.stopping.is_set():
                return
            act = self._on_victim if plan.kind in _ON_VICTIM else getattr(self, _name(plan.kind))
            await act(plan)

    # --- on the server

    async def _server_kill(self, plan: AttackPlan) -> None:
        await self._restart(plan, signal.SIGKILL)

    async def _server_term(self, plan: AttackPlan) -> None:
        await self._restart(plan, signal.SIGTERM)

    async def _restart(self, plan: AttackPlan, number: signal.Signals) -> None:
        with self._board.attack(plan.kind):
            status = await self._cell.end(number)
            if number is signal.SIGTERM and status != 0:
                self._board.fail("server", f"ended with {status} after SIGTERM")
            self._board.server_pid = 0
            self._board.restarts_s.append(await self._cell.start())
            self._board.server_pid = self._cell.pid

    async def _server_stop(self, plan: AttackPlan) -> None:
        await self._hold(plan, [self._cell.pid])

    async def _launcher_stop(self, plan: AttackPlan) -> None:
        await self._hold(plan, self._cell.children())

    async def _hold(self, plan: AttackPlan, pids: list[int]) -> None:
        """Stop processes for a while; nothing may fail of that, or be lost."""
        with self._board.attack(plan.kind):
            _signal_all(pids, signal.SIGSTOP)
            await asyncio.sleep(plan.hold_s)
            _signal_all(pids, signal.SIGCONT)

    async def _nft_table(self, plan: AttackPlan) -> None:
        with self._board.attack(plan.kind):
            argv = ["nft", "delete", "table", "inet", f"garden_{self._cell.tag}"]
            await asyncio.to_thread(subprocess.run, argv, check=False, capture_output=True, timeout=20)

    async def _launcher_kill(self, plan: AttackPlan) -> None:
        with self._board.attack(plan.kind):
            for pid in self._cell.children():
                _kill(pid)

    async def _worker_kill(self, plan: AttackPlan) -> None:
        with self._board.attack(plan.kind):
            workers = self._cell.workers()
            if workers:
                _kill(workers[int(plan.victim * len(workers))])

    async def _runtime_kill(self, plan: AttackPlan) -> None:
        """Wait for a runtime at work, give it a moment to get somewhere, kill it."""
        with self._board.attack(plan.kind):
            deadline = time.monotonic() + _WATCH_S
            # Nothing announces a runtime that starts.
            while not (found := self._cell.runtimes()) and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            await asyncio.sleep(plan.victim * 0.03)
            for pid in found[:1]:
                _kill(pid)

    async def _puller_kill(self, plan: AttackPlan) -> None:
        """As above, for what fetches and unpacks an image."""
        with self._board.attack(plan.kind):
            deadline = time.monotonic() + _WATCH_S
            while not (found := self._cell.pullers()) and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            await asyncio.sleep(plan.victim * 0.1)
            for pid in found[int(plan.victim * len(found)) :][:1]:
                _kill(pid)

    async def _disk_full(self, plan: AttackPlan) -> None:
        with self._board.attack(plan.kind):
            filler = self._cell.fill_disk()
            await asyncio.sleep(plan.hold_s)
            filler.unlink()

    # --- on a container

    async def _on_victim(self, plan: AttackPlan) -> None:
        victims = self._board.victims()
        if not victims:
            return
        victim = victims[int(plan.victim * len(victims))]
        victim.hurt.append(plan.kind)
        self._board.attacks[plan.kind] += 1
        await _ON_VICTIM[plan.kind](self, victim, plan)

    async def _agent_kill(self, victim: Subject, plan: AttackPlan) -> None:
        _kill(victim.pid)

    async def _agent_stop(self, victim: Subject, plan: AttackPlan) -> None:
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGSTOP)

    async def _rm_upper(self, victim: Subject, plan: AttackPlan) -> None:
        await self._remove(self._cell.state / "containers" / victim.handle / "upper")

    async def _rm_bundle(self, victim: Subject, plan: AttackPlan) -> None:
        await self._remove(self._cell.state / "containers" / victim.handle)

    async def _rm_runtime_state(self, victim: Subject, plan: AttackPlan) -> None:
        for state in (self._cell.run / "runc").glob("*/state.json"):
            with suppress(OSError):
                if f'"init_process_pid":{victim.pid},' in state.read_text():
                    await self._remove(state.parent)

    async def _rm_socket(self, victim: Subject, plan: AttackPlan) -> None:
        name = hashlib.sha256(victim.handle.encode()).hexdigest()[:24]
        (self._cell.run / "agents" / f"{name}.sock").unlink(missing_ok=True)

    async def _rm_cgroup(self, victim: Subject, plan: AttackPlan) -> None:
        """Everything in it ends, then the directories go."""
        for _ in range(100):
            tops = cgroups_of(victim.handle)
            if not tops:
                return
            _signal_all((pid for top in tops for pid in pids_in(top)), signal.SIGKILL)
            for group in (group for top in tops for group in groups_in(top)):
                with suppress(OSError):
                    group.rmdir()
            await asyncio.sleep(0.02)

    async def _rm_link(self, victim: Subject, plan: AttackPlan) -> None:
        await asyncio.to_thread(_delete_link_of, victim.handle)

    async def _remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


_ON_VICTIM: dict[str, Callable[[Attacker, Subject, AttackPlan], Awaitable[None]]] = {
    kind: getattr(Attacker, "_" + kind.replace("-", "_"))
    for kind in OTHER_WEIGHTS
    if kind.startswith(("agent-", "rm-"))
}


def _delete_link_of(handle: str) -> None:
    for directory in Path("/sys/class/net").glob("gdn*"):
        with suppress(OSError):
            if (directory / "ifalias").read_text().strip() == handle:
                argv = ["ip", "link", "delete", directory.name]
                subprocess.run(argv, check=False, capture_output=True, timeout=20)


def _name(kind: str) -> str:
    return "_" + kind.replace("-", "_")


def _kill(pid: int) -> None:
    _signal_all([pid], signal.SIGKILL)


def _signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
