"""The composition root: the only place where concrete classes meet, and the server's life from start to stop."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Protocol, cast

# Before grpc is imported: it must not install fork handlers, for nothing in this process forks (see backend/launcher).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import structlog

from garden_py.api.activation import take_inherited_socket
from garden_py.api.address import check_garden_http, check_listen, check_page
from garden_py.api.pages import debug_door, metrics_door
from garden_py.backend.boot import remember_boot, was_rebooted
from garden_py.backend.host.threads import in_spare_thread
from garden_py.backend.journal import SETTINGS, Journal, open_journal
from garden_py.config import Config
from garden_py.model.errors import GardenError, HostFault, InvalidField
from garden_py.model.lifecycle import State
from garden_py.model.netrule import DefaultAction
from garden_py.observe import failpoints
from garden_py.observe.metrics import Metrics
from garden_py.observe.recent import RECENT
from garden_py.observe.steps import Listener
from garden_py.observe.tasks import dump_tasks_on_signal
from garden_py.observe.traces import Tracing, open_tracing
from garden_py.service.containers import Containers, Defaults
from garden_py.service.core import Core
from garden_py.service.diagnosis import Diagnosis
from garden_py.service.event_log import EventLog
from garden_py.service.events import CONNECTIONS, Event, EventHub
from garden_py.service.files import Files
from garden_py.service.guard import Guard
from garden_py.service.images import Images
from garden_py.service.janitor import Janitor
from garden_py.service.ports import Backend, Records
from garden_py.service.processes import Processes
from garden_py.service.recovery import Recovery
from garden_py.service.registry import Registry
from garden_py.service.throttling import Throttling

log = structlog.get_logger()
BACKEND_GROUP = "garden_py.backends"
_SWITCH_S = 0.0005
_LAST_TRACES_S = 3.0


class Door(Protocol):
    """Where callers come in."""

    async def start(self) -> str:
        """Open it; the address."""

    async def stop(self) -> None:
        """Let nobody in, and see those out who are inside."""


class AlreadyRunning(GardenError):
    """Another server works on one of these directories."""

    code = "already_running"


def load_backend(config: Config) -> Backend:
    """The backend that `config.backend` names among the installed entry points.

    Raises:
        InvalidField: there is none of that name; the message lists those there are.
    """
    found = {point.name: point for point in entry_points(group=BACKEND_GROUP)}
    if config.backend not in found:
        raise InvalidField(
            "backend", f"{config.backend!r} is not installed; installed: {', '.join(sorted(found))}"
        )
    return cast(Backend, found[config.backend].load()(config))


def build_core(
    config: Config,
    backend: Backend,
    records: Records,
    listeners: Sequence[Listener] = (),
    events: EventHub | None = None,
) -> Core:
    """The service over a backend and a journal.

    Args:
        config: of the server.
        backend: makes containers.
        records: the journal.
        listeners: told of each create and destroy.
        events: those of earlier servers included; None: new ones.
    """
    registry, guard, metrics = Registry(records), Guard(), Metrics()
    events = events or EventHub(_first_cursor())
    default_egress = DefaultAction(config.default_egress)
    containers = Containers(
        backend,
        registry,
        guard,
        events,
        metrics,
        Defaults(
            config.max_containers,
            default_egress,
            not config.disable_privileged_containers,
            config.cpu_quota_per_share,
            config.cpu_entitlement_per_share,
        ),
        config.default_grace_time_s,
        listeners,
    )
    processes = Processes(
        backend, registry, events, containers.expiry, cpu_quota_us_per_share=config.cpu_quota_per_share
    )
    metrics.watch("garden_containers", "Containers by state.", "state", partial(count_by_state, registry))
    images = Images(backend)
    metrics.watch(
        "garden_images", "Images in the store, by whether anything is made of them.", "use", images.count
    )
    metrics.watch("garden_image_bytes", "Disk space of images' layers, likewise.", "use", images.count_bytes)
    pools = partial(count_pools, backend)
    metrics.watch("garden_pool_size", "What a pool holds.", "pool", lambda: pools("size"))
    metrics.watch("garden_pool_in_use", "What is taken from a pool.", "pool", lambda: pools("in_use"))
    server_version = version("garden-py")
    return Core(
        backend=backend,
        registry=registry,
        guard=guard,
        events=events,
        containers=containers,
        processes=processes,
        files=Files(backend, registry, containers.expiry, metrics),
        images=images,
        recovery=Recovery(backend, registry, containers, processes, events),
        janitor=Janitor(
            backend,
            registry,
            guard,
            events,
            metrics,
            interval_s=config.janitor_interval_s,
            wait_for_loss=backend.wait_for_loss,
        ),
        diagnosis=Diagnosis(backend, registry, events, containers.expiry, RECENT.about, server_version),
        throttling=Throttling(
            backend,
            registry,
            containers,
            interval_s=config.cpu_throttling_check_interval if config.enable_cpu_throttling else 0,
        ),
        metrics=metrics,
        default_egress=default_egress,
        version=server_version,
    )


def _first_cursor() -> int:
    """Above every cursor of earlier servers: none tells a million events a second."""
    return time.time_ns() // 1000


def open_events(directory: Path, *, rebooted: bool) -> tuple[tuple[EventLog, EventLog], EventHub]:
    """The events of earlier servers, and where those of this one are written down: all, and those of connections."""
    kept, of_connections = EventLog(directory), EventLog(directory / "connections")
    if rebooted:
        kept.clear()
        of_connections.clear()
    after, earlier = kept.load()
    _, connections = of_connections.load()
    last = max([after, *(events[-1].cursor for events in (earlier, connections) if events)])

    def write(event: Event) -> None:
        (of_connections if event.kind in CONNECTIONS else kept).append(event)

    # A million for those that could not be written down; time goes on faster, unless somebody sets the clock back.
    events = EventHub(max(_first_cursor(), last + 1_000_000), write)
    if after:
        events.restore(after, earlier, connections)
    else:
        of_connections.clear()  # of before a gap: no cursor of that time is good any more
        kept.begin(events.cursor)
    return (kept, of_connections), events


def count_pools(backend: Backend, what: str) -> dict[str, float]:
    """One number of each pool; what: a field of PoolLevel."""
    return {name: getattr(level, what) for name, level in backend.pools().items()}


def count_by_state(registry: Registry) -> dict[str, float]:
    """How many containers are in each state; states without any are 0, so that an alarm can be set on them."""
    counts = Counter(container.state for container in registry)
    return {state.value: counts[state] for state in State}


@asynccontextmanager
async def running_server(config: Config, inherited: socket.socket | None = None) -> AsyncIterator[str]:
    """A server that serves while the context is open; its address.

    Args:
        config: its settings.
        inherited: a listening socket to serve in place of `config.listen`.

    Raises:
        GardenError: it cannot start; the message says what to change.
    """
    check_addresses(config, inherited)
    with claim_directories(config):
        rebooted = was_rebooted(config.state_dir)
        journal = open_journal(config.state_dir / "journal.db", rebooted=rebooted)
        remember_settings(journal, config, inherited)
        tracing = open_tracing(config.otel_endpoint, version=version("garden-py"), instance=config.tag)
        listeners = [] if tracing is None else [tracing.operation_ended]
        kept_events, events = open_events(config.state_dir / "events", rebooted=rebooted)
        core = build_core(config, load_backend(config), journal, listeners, events)
        core.metrics.watch("garden_journal_bytes", "Size of the journal's files.", "file", journal.file_sizes)
        # The backend mostly waits for processes that it starts; grpc and the doors are loaded meanwhile.
        await asyncio.gather(
            asyncio.to_thread(import_doors, config),
            core.recovery.run(rebooted=rebooted, discard=config.destroy_containers_on_startup),
        )
        remember_boot(config.state_dir)
        doors = make_doors(core, config, inherited)
        pages = (metrics_door(core.metrics, config), debug_door(config))
        try:
            for page in pages:
                await page.start()
            for door in doors:
                address = await door.start()
            core.janitor.start()
            core.throttling.start()
            yield address
        finally:
            await asyncio.gather(*(door.stop() for door in doors))
            for page in pages:
                await page.stop()
            await core.close()
            journal.close()
            for each in kept_events:
                each.close()
            if tracing is not None:
                await send_last_traces(tracing)


async def send_last_traces(tracing: Tracing) -> None:
    """Send what has not been sent; a collector that does not answer does not keep the server from stopping."""
    try:
        async with asyncio.timeout(_LAST_TRACES_S):
            await in_spare_thread(tracing.close)
    except TimeoutError:
        log.warning("traces.not_sent", reason=f"the collector has not taken them in {_LAST_TRACES_S:g} s")


def import_doors(config: Config) -> None:
    """Load the modules of the doors that `make_doors` makes: a fourth of a server's start."""
    import_module("garden_py.api.grpc.server")
    if config.garden_http:
        import_module("garden_py.api.http.door")


def make_doors(core: Core, config: Config, inherited: socket.socket | None) -> list[Door]:
    """The doors that are configured, in the order to open them: the gRPC door is the last."""
    from garden_py.api.grpc.server import GrpcDoor

    doors: list[Door] = []
    if config.garden_http:
        from garden_py.api.http.door import GardenDoor

        doors.append(GardenDoor(core, config))
    return [*doors, GrpcDoor(core, config, inherited)]


def check_addresses(config: Config, inherited: socket.socket | None) -> None:
    """Refuse addresses that no door can have, before anything is touched.

    Raises:
        InvalidField: the message says what to change.
    """
    if inherited is None:
        check_listen(config)
    check_garden_http(config)
    check_page(config, "metrics")
    check_page(config, "debug")


@contextmanager
def claim_directories(config: Config) -> Iterator[None]:
    """Have the state and the run directory for this server alone; they are made where they are missing.

    Both before anything is touched: who has the run directory of another server ends that one's launcher and takes its
    agents' sockets for rubbish.

    Raises:
        AlreadyRunning: another server has one of them.
    """
    with ExitStack() as claims:
        config.state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        claims.callback(os.close, claim_state_dir(config.state_dir))
        config.run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        claims.callback(os.close, claim_run_dir(config.run_dir))
        yield


def claim_state_dir(state_dir: Path) -> int:
    """Claim a state directory for this process; the descriptor holds the claim. flock(2).

    Raises:
        AlreadyRunning: another server has it.
    """
    return _claim(state_dir / "lock", "--state-dir")


def claim_run_dir(run_dir: Path) -> int:
    """Likewise, a run directory."""
    return _claim(run_dir / "server.lock", "--run-dir")


def _claim(lock: Path, flag: str) -> int:
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise AlreadyRunning(
            f"another garden server (pid {holder}) uses {lock.parent}; give this one its own {flag}"
        ) from error
    holder = f"{os.getpid()}\n"
    try:
        # In this order: a block that was let go of would be missing on a full disk.
        os.pwrite(fd, holder.encode(), 0)
        os.ftruncate(fd, len(holder))
    except OSError as error:  # it only helps people
        log.warning("lock.holder_not_recorded", error=str(error))
    return fd


def remember_settings(journal: Journal, config: Config, inherited: socket.socket | None) -> None:
    """Write down what somebody who has only the state directory must know to find the rest; see stopped.py."""
    names = ("backend", "network_pool", "run_dir", "runtime", "cgroup_driver", "cgroup_slice")
    address = config.listen_address if inherited is None else f"unix:{inherited.getsockname()}"
    found = {name: str(getattr(config, name)) for name in names}
    if config.network_pool_v6 is not None:
        found["network_pool_v6"] = str(config.network_pool_v6)
    settings = json.dumps({"address": address, **found})
    try:
        if journal.read_meta(SETTINGS) != settings:
            journal.write_meta(SETTINGS, settings)
    except HostFault as error:  # a full disk is no reason not to serve what is there
        log.warning("settings.not_recorded", error=str(error))


async def serve(config: Config) -> None:
    """Run a server until SIGTERM or SIGINT; containers keep running when it stops."""
    failpoints.arm(config.fail_points)
    # grpc's polling thread wakes this one, for which it needs the interpreter; the default lets it wait 5 ms at worst.
    sys.setswitchinterval(_SWITCH_S)
    dump_tasks_on_signal()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with running_server(config, take_inherited_socket(os.environ)) as address:
        print(f"garden server ready on {address}", flush=True)
        notify_systemd("READY=1")
        gc.freeze()  # what was made so far stays, and need not be looked through for garbage again
        gc.enable()
        log.info("server.ready", address=address, state_dir=str(config.state_dir), tag=config.tag)
        await stopping.wait()
        notify_systemd("STOPPING=1")
        log.info("server.stopping")


def notify_systemd(state: str) -> None:
    """Tell systemd, where there is one. sd_notify(3): a datagram to $NOTIFY_SOCKET, '@' for an abstract name."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            log.warning("systemd.notify_failed", error=str(error))
