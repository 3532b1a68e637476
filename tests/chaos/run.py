"""A whole run: cell, clients, attackers, the report, and the look at the host afterwards."""

from __future__ import annotations

import asyncio
import shutil
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from kit.server import destroy_all
from kit.trace import assert_no_trace, snapshot

from chaos.attacks import Attacker
from chaos.board import Board
from chaos.cell import Cell, open_cell
from chaos.life import live_on
from garden_py.client import AsyncGardenClient

PROGRESS_S = 5.0
FINISH_S = 120.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says."""

    minutes: float
    seed: int
    clients: int
    attacks: frozenset[str]
    server_every_s: float
    attack_every_s: float


async def run(settings: Settings) -> int:
    """The exit status: 0 if nothing was found."""
    before = snapshot()
    print(f"seed {settings.seed}, {settings.clients} clients, {settings.minutes:g} minutes", flush=True)
    async with open_cell(settings.clients) as cell:
        board = Board(cell.image, await asyncio.to_thread(cell.make_images), cell.notes)
        try:
            await _attack(board, cell, settings)
            await _check_empty(board, cell)
        finally:
            await _end(board, cell)
            _check_log(board, cell)
            log = _keep_log(cell) if board.failures else None
    try:
        assert_no_trace(before)
    except AssertionError as error:
        board.fail("host", str(error))
    _report(board, settings, log)
    return 1 if board.failures else 0


async def _attack(board: Board, cell: Cell, settings: Settings) -> None:
    board.server_pid = cell.pid
    attacker = Attacker(
        board,
        cell,
        settings.seed,
        set(settings.attacks),
        (settings.server_every_s, settings.attack_every_s),
    )
    attacking = asyncio.ensure_future(attacker.run())
    reporting = asyncio.ensure_future(_progress(board))
    clients = {
        asyncio.ensure_future(live_on(board, cell.address, settings.seed, number)): number
        for number in range(settings.clients)
    }
    try:
        done, _ = await asyncio.wait(
            [*clients, attacking], timeout=settings.minutes * 60, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in done:
            if task.exception() is not None:
                raise task.exception()
        board.stopping.set()
        await attacking
        _, late = await asyncio.wait(clients, timeout=FINISH_S)
        for task in late:
            board.fail(f"client {clients[task]}", f"does not come to an end in {FINISH_S} s")
            task.print_stack()
    finally:
        board.stopping.set()
        for task in (attacking, reporting, *clients):
            task.cancel()
        await asyncio.wait([attacking, reporting, *clients])


async def _check_empty(board: Board, cell: Cell) -> None:
    """Nothing is left: every client has destroyed what it made."""
    async with AsyncGardenClient(cell.address) as garden:
        left = [f"{info.handle} ({info.state.name})" async for info in garden.list(all_states=True)]
        if left:
            board.fail("lists", f"all was destroyed, but there are {left}")
        for handle in left:
            await garden.container(handle.split()[0]).destroy()
        capacity = await garden.capacity()
        if capacity.containers or capacity.ports_in_use:
            board.fail("pools", f"all was destroyed, but in use are {capacity}")


async def _end(board: Board, cell: Cell) -> None:
    """Whatever happened before, the host shall be as it was."""
    if not cell.up.is_set():
        await cell.start()
    await asyncio.to_thread(destroy_all, cell.address)
    if status := await cell.end(signal.SIGTERM):
        board.fail("server", f"ended with {status} after SIGTERM")


def _check_log(board: Board, cell: Cell) -> None:
    for line in (cell.place / "log").read_text(errors="replace").splitlines():
        if '"rpc.failed"' in line or line.startswith("Traceback"):
            board.fail("server log", line[:2000])


def _keep_log(cell: Cell) -> Path:
    kept = Path(f"/var/tmp/{cell.place.name}.log")
    shutil.copyfile(cell.place / "log", kept)
    return kept


async def _progress(board: Board) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        spent = time.monotonic() - board.started
        print(
            f"{spent:6.0f} s  {board.lives} lives ({board.lives / spent:.1f}/s, {board.lives_hurt} broken on purpose)  "
            f"{board.processes} processes  {board.bytes_checked >> 20} MiB  {sum(board.attacks.values())} attacks  "
            f"{len(board.failures)} failures",
            flush=True,
        )


def _report(board: Board, settings: Settings, log: Path | None) -> None:
    restarts = board.restarts_s or [0.0]
    print(f"\nseed       {settings.seed}")
    print(
        f"lives      {board.lives}, {board.lives / (settings.minutes * 60):.1f} per second; "
        f"{board.lives_hurt} broken on purpose"
    )
    print(f"processes  {board.processes}, {board.bytes_checked >> 20} MiB of output checked")
    print(f"attacks    {', '.join(f'{n} {kind}' for kind, n in board.attacks.most_common()) or 'none'}")
    print(f"errors met {', '.join(f'{n} {code}' for code, n in board.met.most_common()) or 'none'}")
    print(f"restarts   median {statistics.median(restarts):.2f} s, longest {max(restarts):.2f} s")
    print(f"failures   {len(board.failures)}")
    for failure in board.failures:
        print(f"  {failure}")
    if log:
        print(f"the server's log is kept: {log}")
