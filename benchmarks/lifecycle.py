"""A container's life: create, its first process, destroy; 8 of them at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from bare_runtime import BareRuntime
from cell import Cell
from measure import Samples, alternate, timed_ms
from report import Row, at_most, ratio_at_most
from setting import Setting

IN_FLIGHT = 8
CYCLES = 40
# Between the steps of a life, on both sides: what the kernel does in the background after one step (RCU callbacks of
# namespaces, nftables and cgroups, 10 to 20 ms) shall not be counted as the next one's.
_REST_S = 0.1


def measure_lifecycle(setting: Setting) -> Iterator[Row]:
    """Each round: the server's container lives and dies, then runc's, then crun's; with a rest between the steps."""
    subjects = {
        "garden": _GardenLife(setting.cell),
        "runc": _BareLife(setting.runc),
        "crun": _BareLife(setting.crun),
    }
    alternate({name: life.once for name, life in subjects.items()}, rounds=setting.rounds, warm_up=0)
    create, first_run, destroy = (
        {name: life.samples(stage) for name, life in subjects.items()} for stage in range(3)
    )
    ours = create["garden"]
    yield Row("create → ready", "ms", ours, "runc run -d", create["runc"], (ratio_at_most(2.5),))
    yield Row("create → ready", "ms", ours, "crun run -d", create["crun"])
    yield Row("first `true` of a new container", "ms", first_run["garden"], "runc exec", first_run["runc"])
    yield Row("destroy", "ms", destroy["garden"], "runc delete -f", destroy["runc"], (at_most(60),))


class _Life:
    """Keeps the three figures of each life; `alternate` only sets the order."""

    WARM_UP = 2

    def __init__(self) -> None:
        self._lives: list[tuple[float, float, float]] = []

    def live(self) -> tuple[float, float, float]:
        """Create, first process, destroy, in ms."""
        raise NotImplementedError

    def once(self) -> float:
        for _ in range(0 if self._lives else self.WARM_UP):
            self.live()
        self._lives.append(self.live())
        return sum(self._lives[-1])

    def samples(self, stage: int) -> Samples:
        return Samples(tuple(life[stage] for life in self._lives))


class _GardenLife(_Life):
    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self._cell = cell

    def live(self) -> tuple[float, float, float]:
        begin = time.perf_counter()
        handle = self._cell.create().handle
        create_ms = (time.perf_counter() - begin) * 1e3
        time.sleep(_REST_S)
        first_ms = self._cell.run_ms(handle, "true")
        time.sleep(_REST_S)
        return create_ms, first_ms, timed_ms(lambda: self._cell.destroy(handle))


class _BareLife(_Life):
    def __init__(self, runtime: BareRuntime) -> None:
        super().__init__()
        self._runtime = runtime

    def live(self) -> tuple[float, float, float]:
        name = self._runtime.new_id()
        create_ms = self._runtime.run_ms(name)
        time.sleep(_REST_S)
        first_ms = self._runtime.exec_ms(name, "/bin/true")
        time.sleep(_REST_S)
        return create_ms, first_ms, self._runtime.delete_ms(name)


def measure_load(setting: Setting) -> Iterator[Row]:
    """Whole lives per second with 8 under way, beside runc alone doing the same."""
    cell = setting.cell

    def life(_: int) -> None:
        handle = cell.create().handle
        cell.run_ms(handle, "true")
        cell.destroy(handle)

    def garden() -> float:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return CYCLES / timed_ms(lambda: list(pool.map(life, range(CYCLES)))) * 1e3

    def runc() -> float:
        return CYCLES / setting.runc.cycles_ms(CYCLES, IN_FLIGHT) * 1e3

    found = alternate({"garden": garden, "runc": runc}, rounds=setting.throughput_rounds, warm_up=1)
    peer = "runc run -d, exec, delete -f"
    yield Row(f"create + run + destroy, {IN_FLIGHT} in flight", "/s", found["garden"], peer, found["runc"])
