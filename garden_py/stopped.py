"""The ledger of a server that does not run: a second composition root, without doors, launcher and pools.

It needs only the state directory: the rest (run directory, address pool, runtime) the last server has written into
its journal, so a wrong flag cannot make a live container's link look like nobody's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from garden_py.backend.cgroup.layout import probe_hierarchies
from garden_py.backend.depot import Depot
from garden_py.backend.disk.store import LoopStore
from garden_py.backend.disk.volumes import Volumes, find_driver
from garden_py.backend.journal import read_journal
from garden_py.backend.linux.cgroup_driver import CgroupDriver
from garden_py.backend.linux.hands import StoppedHands
from garden_py.backend.linux.leaks import Ledger, places_of
from garden_py.backend.net.plan import HostPlan
from garden_py.backend.net.pools import AddressPool
from garden_py.backend.oci.facts import probe_host_facts
from garden_py.config import Config, load_config
from garden_py.model.errors import NotSupported
from garden_py.model.leak import LeakReport
from garden_py.model.lifecycle import USABLE
from garden_py.observe.metrics import Metrics
from garden_py.service.events import EventHub
from garden_py.service.guard import Guard
from garden_py.service.janitor import Janitor
from garden_py.service.ports import Claim, ContainerRow, Witness
from garden_py.wiring import AlreadyRunning, claim_run_dir, claim_state_dir

JOURNAL_NAME = "journal.db"


class ServerRuns(Exception):
    """A server works on the state directory: ask it instead. `address` is of its gRPC door."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a journal that nobody changes; a Witness of itself."""

    rows: list[ContainerRow]

    @contextmanager
    def witness(self) -> Iterator[Witness]:
        yield self

    def claims(self) -> list[Claim]:
        return [Claim(row.handle, row.facts) for row in self.rows]

    def settled(self) -> list[Claim]:
        return [Claim(row.handle, row.facts) for row in self.rows if row.state in USABLE]


def check_stopped(state_dir: Path, *, remove: bool) -> list[LeakReport]:
    """Compare a stopped server's journal with the host. While that lasts no server can start on it.

    Args:
        state_dir: of the server.
        remove: also remove what is surely its own and orphaned.

    Raises:
        ServerRuns: it is not stopped.
        AlreadyRunning: another server has its run directory now.
        HostFault: there is no journal, or the host cannot be looked at.
        NotSupported: the last server was of a version or a backend that leaves no word where its things are.
    """
    rows, settings = read_journal(state_dir / JOURNAL_NAME)
    if settings.get("backend") != "linux":
        raise NotSupported(
            f"{state_dir}: no server of this version, with the backend `linux`, has run here yet"
        )
    config = _config_of(state_dir, settings)
    with ExitStack() as claims:
        try:
            claims.callback(os.close, claim_state_dir(state_dir))
        except AlreadyRunning as error:
            raise ServerRuns(settings["address"]) from error
        if config.run_dir.is_dir():
            claims.callback(os.close, claim_run_dir(config.run_dir))
        rows, _ = read_journal(state_dir / JOURNAL_NAME)  # anew: nobody else can write now
        return asyncio.run(_check(config, rows, remove=remove))


def _config_of(state_dir: Path, settings: dict[str, Any]) -> Config:
    names = (
        "network_pool",
        "network_pool_v6",
        "run_dir",
        "runtime",
        "cgroup_driver",
        "cgroup_slice",
    )
    known = {name: settings[name] for name in names if name in settings}  # not all of them by an older server
    return load_config({"state_dir": state_dir, **known}, environ={})


async def _check(config: Config, rows: list[ContainerRow], *, remove: bool) -> list[LeakReport]:
    host = HostPlan(
        config.tag, config.network_pool, AddressPool(config.network_pool).gateway, config.network_pool_v6
    )
    store = LoopStore(config.state_dir)
    root = store.root if store.root.is_mount() else config.state_dir
    depot = Depot(config.state_dir, config.run_dir, store.root if store.root.is_mount() else None)
    volumes = Volumes(root, find_driver(root, turn_on=False), depot.throw_away)
    hierarchies = probe_hierarchies(probe_host_facts().cgroup_version)
    places = places_of(config, host, depot, volumes, CgroupDriver(config, hierarchies))
    ledger = Ledger(places, StoppedHands(host))
    janitor = Janitor(ledger, _Rows(rows), Guard(), EventHub(), Metrics())
    try:
        return await janitor.check(remove=remove)
    finally:
        await depot.settle()
