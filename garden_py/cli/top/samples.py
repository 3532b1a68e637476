"""From counters to rates: what each container has used between one look and the next. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from garden_py.client import ContainerMetrics

GRAPH_SAMPLES = 60
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Row:
    """One container as it is shown. Rates are None until there are two looks at it.

    Attributes:
        name: handle, or handle/process.
        error: why it could not be measured; the rest is empty then.
        cpu_percent: 100 is one whole processor.
        rx_bytes_per_s, tx_bytes_per_s: as the container sees them.
        cpu_graph, memory_graph, network_graph: the latest samples, the newest last: percent, bytes, bytes per second.
    """

    name: str
    error: str = ""
    age_s: float = 0.0
    cpu_percent: float | None = None
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    rx_bytes_per_s: float | None = None
    tx_bytes_per_s: float | None = None
    disk_bytes: int = 0
    pids: int = 0
    pids_limit: int = 0
    cpu_graph: tuple[float, ...] = ()
    memory_graph: tuple[float, ...] = ()
    network_graph: tuple[float, ...] = ()

    @property
    def network_bytes_per_s(self) -> float:
        """In and out together."""
        return (self.rx_bytes_per_s or 0.0) + (self.tx_bytes_per_s or 0.0)


class _Track:
    """What is remembered of one container between looks."""

    def __init__(self, usage: ContainerMetrics, at_s: float) -> None:
        self.usage, self.at_s = usage, at_s
        self.cpu: deque[float] = deque(maxlen=GRAPH_SAMPLES)
        self.memory: deque[float] = deque(maxlen=GRAPH_SAMPLES)
        self.network: deque[float] = deque(maxlen=GRAPH_SAMPLES)

    def is_older_life_of(self, usage: ContainerMetrics) -> bool:
        """Whether that is another container of the same name: it is younger, or its counters have gone back."""
        return usage.age < self.usage.age or usage.cpu_usage_ns < self.usage.cpu_usage_ns


class Samples:
    """Remembers the latest look at each container; those that are gone are forgotten."""

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}

    def take(self, measured: Iterable[ContainerMetrics], at_s: float) -> list[Row]:
        """One look at all of them; at_s: when, on a clock that never goes back."""
        tracks: dict[str, _Track] = {}
        rows = []
        for usage in measured:
            name = f"{usage.handle}/{usage.process_id}" if usage.process_id else usage.handle
            if usage.error:
                rows.append(Row(name, error=usage.error))
                continue
            former = self._tracks.get(name)
            if former is None or former.is_older_life_of(usage):
                tracks[name] = _Track(usage, at_s)
                tracks[name].memory.append(usage.memory_bytes)
                rows.append(_row(name, tracks[name], None, None, None))
            else:
                tracks[name] = former
                rows.append(_advance(name, former, usage, at_s))
        self._tracks = tracks
        return rows


def _advance(name: str, track: _Track, usage: ContainerMetrics, at_s: float) -> Row:
    span_s = max(at_s - track.at_s, 1e-3)
    before = track.usage
    cpu = (usage.cpu_usage_ns - before.cpu_usage_ns) / 1e7 / span_s
    rx = max(0, usage.network_rx_bytes - before.network_rx_bytes) / span_s
    tx = max(0, usage.network_tx_bytes - before.network_tx_bytes) / span_s
    track.usage, track.at_s = usage, at_s
    track.cpu.append(cpu)
    track.memory.append(usage.memory_bytes)
    track.network.append(rx + tx)
    return _row(name, track, cpu, rx, tx)


def _row(name: str, track: _Track, cpu: float | None, rx: float | None, tx: float | None) -> Row:
    usage = track.usage
    return Row(
        name,
        age_s=usage.age.total_seconds(),
        cpu_percent=cpu,
        memory_bytes=usage.memory_bytes,
        memory_limit_bytes=usage.memory_limit_bytes,
        rx_bytes_per_s=rx,
        tx_bytes_per_s=tx,
        disk_bytes=usage.disk_exclusive_bytes,
        pids=usage.pids,
        pids_limit=usage.pids_limit,
        cpu_graph=tuple(track.cpu),
        memory_graph=tuple(track.memory),
        network_graph=tuple(track.network),
    )


def sparkline(values: tuple[float, ...], width: int, full: float) -> str:
    """The latest values as bars, the newest at the right.

    Args:
        values: the newest last.
        width: in columns; shorter histories leave blanks at the left.
        full: what the highest bar stands for at least; larger values make it higher.
    """
    shown = values[-width:] if width > 0 else ()
    top = max([full, *shown]) or 1.0
    bars = "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in shown)
    return bars.rjust(width)
