"""Containers: create, stop, destroy, list, and what can be changed while they run. Start reading here."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from garden_py.model import errors
from garden_py.model.age import age_ns
from garden_py.model.cpu import Entitlement, Standing, stated_shares, with_quota
from garden_py.model.handle import hostname_for, make_name
from garden_py.model.image import PullProgress, RegistryAuth, UsedImage
from garden_py.model.lifecycle import USABLE, State
from garden_py.model.limits import NO_PROCESS_DISK, Limits, limit_violations, process_limit_violations
from garden_py.model.netrule import (
    Decision,
    DefaultAction,
    Destination,
    EgressPolicy,
    EgressRule,
    format_egress_rule,
)
from garden_py.model.network import NetworkMode
from garden_py.model.spec import (
    GRACE_TIME_MAX_S,
    REQUEST_ID_MAX,
    ContainerSpec,
    PortMapping,
    check_container,
    port_violations,
    property_violations,
)
from garden_py.observe import failpoints, steps
from garden_py.observe.apart import apart
from garden_py.observe.calls import name_container
from garden_py.observe.failpoints import Point
from garden_py.observe.metrics import Metrics
from garden_py.observe.steps import Step
from garden_py.service.connections import changing_rules
from garden_py.service.events import EventHub, EventKind
from garden_py.service.expiry import Expiry
from garden_py.service.guard import Guard
from garden_py.service.janitor import RECLAIM
from garden_py.service.ports import Backend, EgressCounts, HostCapacity, Usage
from garden_py.service.registry import Container, Registry

log = structlog.get_logger()
STOP_GRACE_S = 10.0
_IN_TRANSIT = frozenset({State.CREATING, State.DESTROYING})
_STOP_POLL_S = 0.02
_STOP_REPEAT_S = 1.0
_CHANGE_PATIENCE_S = 5.0
_RESUMED_AT_ONCE = 16
_CALLER_LEFT = "its caller left without learning its handle"
_RETRY_DESTROY_S = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What containers get that state nothing themselves, and which are made at all."""

    max_containers: int
    egress: DefaultAction
    privileged_allowed: bool = True
    cpu_quota_us_per_share: int = 0
    cpu_percent_per_share: float = 0.0


class Containers:
    """The verbs about containers.

    Args:
        listeners: told of each create and destroy, after the metrics.
    """

    def __init__(
        self,
        backend: Backend,
        registry: Registry,
        guard: Guard,
        events: EventHub,
        metrics: Metrics,
        defaults: Defaults,
        grace_time_s: float,
        listeners: Sequence[steps.Listener] = (),
    ) -> None:
        self._backend = backend
        self._registry = registry
        self._guard = guard
        self._events = events
        self._metrics = metrics
        self._defaults = defaults
        self._listeners = (metrics.operation_ended, *listeners)
        self._resuming = asyncio.Semaphore(_RESUMED_AT_ONCE)
        self._entitlement: Entitlement | None = None
        self.expiry = Expiry(grace_time_s, self._expired)

    # --- create

    async def create(self, spec: ContainerSpec, request_id: str = "") -> Container:
        """Make a container; with the handle and request id of an earlier create, return that one's.

        Raises:
            InvalidRequest, PrivilegedDisabled, HandleInUse, PoolExhausted, PortInUse, HostFault, NotSupported.
        """
        check_container(spec)
        if spec.privileged and not self._defaults.privileged_allowed:
            raise errors.PrivilegedDisabled
        if len(request_id) > REQUEST_ID_MAX:
            raise errors.InvalidField("request_id", f"is longer than {REQUEST_ID_MAX} characters")
        if (earlier := self._earlier(spec, request_id)) is not None:
            return await earlier
        self._admit()
        nameless = not spec.handle and not request_id
        spec = self._with_defaults(spec)
        name_container(spec.handle)
        container = Container(replace(spec, image_auth=None), request_id, created_ns=time.time_ns())
        self._registry.add(container)
        try:
            job = self._guard.start("create", spec.handle, self._make(container, spec.image_auth))
        except BaseException:
            self._registry.remove(container)
            raise
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            if nameless:
                job.add_done_callback(self._abandon)
            raise

    def _abandon(self, job: asyncio.Future[Container]) -> None:
        """Destroy a container whose caller has left without ever learning its handle."""
        if job.cancelled() or job.exception() is not None:
            return
        container = job.result()
        if self._guard.closing and container.state in USABLE:
            self._registry.leave(container, State.DESTROYING, _CALLER_LEFT)  # the next server does it
        else:
            self._demolish_unasked(container, _CALLER_LEFT)

    def _earlier(self, spec: ContainerSpec, request_id: str) -> asyncio.Future[Container] | None:
        """The container, or the create under way, that this request repeats.

        Raises:
            HandleInUse: another request has the handle.
        """
        known = self._registry.find(spec.handle) if spec.handle else None
        if known is None and request_id and not spec.handle:
            known = next((c for c in self._registry if c.request_id == request_id), None)
        if known is None:
            return None
        if not request_id or known.request_id != request_id or known.state not in (State.CREATING, *USABLE):
            raise errors.HandleInUse(known.handle)
        making = self._guard.running("create", known.handle)
        if making is not None:
            return asyncio.shield(making)
        done: asyncio.Future[Container] = asyncio.get_running_loop().create_future()
        done.set_result(known)
        return done

    def _admit(self) -> None:
        most = self.max_containers()
        if len(self._registry) >= most:
            raise errors.PoolExhausted("containers", most, self._limiting_flag())

    def _limiting_flag(self) -> str:
        capacity = self._backend.capacity()
        own = self._defaults.max_containers
        return "--max-containers" if own and own <= capacity.containers else capacity.containers_limited_by

    def max_containers(self) -> int:
        """How many containers there can be."""
        pools = self._backend.capacity().containers
        return min(self._defaults.max_containers or pools, pools)

    def _with_defaults(self, spec: ContainerSpec) -> ContainerSpec:
        handle = spec.handle or make_name()
        return replace(
            spec,
            handle=handle,
            hostname=spec.hostname or hostname_for(handle),
            egress=self._complete(spec.egress) if spec.network_mode is NetworkMode.OWN else None,
            limits=with_quota(spec.limits, self._defaults.cpu_quota_us_per_share),
        )

    def _complete(self, policy: EgressPolicy | None) -> EgressPolicy:
        return EgressPolicy(default_action=self._defaults.egress) if policy is None else policy

    async def _make(self, container: Container, image_auth: RegistryAuth | None) -> Container:
        with steps.operation(steps.CREATE, container.handle, self._listeners):
            return await self._make_in_steps(container, image_auth)

    async def _make_in_steps(self, container: Container, image_auth: RegistryAuth | None) -> Container:
        started = time.monotonic()
        reclaiming = self._guard.running(RECLAIM, container.handle)
        if reclaiming is not None:
            # The janitor is taking away what an earlier container of this handle has left.
            await asyncio.wait([reclaiming])
        try:
            failpoints.reach(Point.CREATE_JOURNAL)
            wanted = replace(container.spec, image_auth=image_auth)
            await self._backend.create(wanted, self._recorder(container), partial(_fetching, container))
        except errors.Unkillable as error:
            self._metrics.create_failures.labels(error.code).inc()
            self._registry.leave(container, State.DESTROYING)
            self._unkillable(container, error)
            raise
        except BaseException as error:
            self._metrics.create_failures.labels(getattr(error, "code", "internal")).inc()
            log.warning("container.create_failed", handle=container.handle, error=str(error))
            self._forget_unmade(container)
            if container.unwanted:
                raise errors.ContainerBusy(container.handle, "being destroyed", "created") from error
            if isinstance(error, asyncio.CancelledError) and self._guard.closing:
                raise errors.ShuttingDown from error
            raise
        try:
            network = self._backend.facts_of_network(container.handle)
            properties = tuple(
                sorted({**dict(container.spec.properties), **dict(network.properties)}.items())
            )
            made = replace(container.spec, port_mappings=network.mapped_ports, properties=properties)
            failpoints.reach(Point.CREATE_DONE)
            with steps.step(Step.JOURNAL):
                self._registry.save(container, state=State.ACTIVE, spec=made)
        except errors.GardenError as error:
            self._metrics.create_failures.labels(error.code).inc()
            await self._demolish(container)  # the next server would take it for half made
            if isinstance(error, errors.ContainerNotFound):
                raise errors.HostFault("create", "its agent has ended already") from error
            raise
        self.expiry.arm(container)
        self._metrics.creates.inc()
        self._events.publish(EventKind.CONTAINER_CREATED, container.handle)
        log.info("container.created", handle=container.handle, took_ms=_ms_since(started))
        return container

    def _forget_unmade(self, container: Container) -> None:
        container.gone = True
        try:
            self._registry.remove(container)
        except errors.HostFault as error:
            self._registry.leave(container, State.DESTROYING)
            self._unkillable(container, error)

    # --- look

    def get(self, handle: str) -> Container:
        """A container.

        Raises:
            ContainerNotFound.
        """
        container = self._registry.get(handle)
        with self.expiry.use(container):
            return container

    def end_fetches(self) -> None:
        """For a server that stops: give up creates of which nothing but the fetch of an image has been done."""
        for container in self._registry:
            making = self._guard.running("create", container.handle)
            if making is not None and container.fetching:
                making.cancel()

    def get_or_fetching(self, handle: str) -> Container:
        """A container, also one whose image is still being fetched; else as `get`."""
        known = self._registry.find(handle)
        return known if known is not None and known.fetching else self.get(handle)

    def used_image(self, handle: str) -> UsedImage | None:
        """The image that a container was made of; None: a directory."""
        return self._backend.used_image(handle)

    def list_containers(
        self, properties: Mapping[str, str], *, all_states: bool, after: str, limit: int
    ) -> list[Container]:
        """Containers in order of handles.

        Args:
            properties: only those that have all of these; an absent one compares as "".
            all_states: also those being made or destroyed.
            after: only handles greater than this.
            limit: at most this many.
        """
        found: list[Container] = []
        for container in self._registry:
            if container.handle <= after or (container.state in _IN_TRANSIT and not all_states):
                continue
            own = dict(container.spec.properties)
            if all(own.get(key, "") == value for key, value in properties.items()):
                found.append(container)
            if len(found) == limit:
                break
        return found

    def capacity(self) -> tuple[HostCapacity, int, int]:
        """The host's capacity, most containers, containers now."""
        return self._backend.capacity(), self.max_containers(), len(self._registry)

    async def usage(self, handles: list[str]) -> dict[str, Usage | errors.GardenError]:
        """Usage by handle; a container that cannot be measured has its error instead.

        None given: of all but those that are being made or destroyed. A broken one must not look as if it were gone.
        """
        for container in filter(None, map(self._registry.find, handles)):
            self.expiry.touch(container)
        wanted = handles or [c.handle for c in self._registry if c.state not in _IN_TRANSIT]
        # At the same time: of those that a plugin counts it is asked, which takes as long as it takes.
        found = await asyncio.gather(*map(self._usage_of, wanted))
        return dict(zip(wanted, found, strict=True))

    async def _usage_of(self, handle: str) -> Usage | errors.GardenError:
        try:
            return await self.usage_of_container(handle)
        except errors.GardenError as error:
            return error

    async def usage_of_container(self, handle: str) -> Usage:
        """Usage of one container.

        Raises:
            ContainerNotFound, ContainerBusy, ContainerBroken.
        """
        self._registry.get(handle).require_usable("measured")
        usage = await self._backend.usage(handle)
        return replace(usage, cpu_entitlement_ns=self.standing(handle, usage.cpu_usage_ns).entitled_ns)

    @property
    def entitlement(self) -> Entitlement:
        """What a CPU share is worth on this host."""
        if self._entitlement is None:
            host, per_share = self._backend.capacity(), self._defaults.cpu_percent_per_share
            self._entitlement = Entitlement.of_host(per_share, cpus=host.cpus, memory_bytes=host.memory_bytes)
        return self._entitlement

    def standing(self, handle: str, used_ns: int) -> Standing:
        """How a container that has used so much CPU time stands to what it is entitled to.

        Raises:
            ContainerNotFound.
        """
        container = self._registry.get(handle)
        shares = stated_shares(container.spec.limits)
        return Standing(shares, used_ns, self.entitlement.entitled_ns(shares, age_ns(container.created_ns)))

    async def usage_of_process(self, handle: str, process_id: str) -> Usage:
        """Usage of one process and its children.

        Raises:
            ContainerNotFound, ContainerBusy, ContainerBroken.
            ProcessNotFound, ProcessExited.
            ProcessNotCounted: it is counted with its container.
        """
        container = self._registry.get(handle)
        container.require_usable("measured")
        with self.expiry.use(container):
            return await self._backend.usage(handle, process_id)

    # --- change

    def set_grace_time(self, handle: str, grace_time_s: float) -> None:
        """Set how long the container may be unused; 0: for ever."""
        if not 0 <= grace_time_s <= GRACE_TIME_MAX_S:
            raise errors.InvalidField("grace_time", "must be 0 (never) to ten years")
        container = self._registry.get(handle)
        with self.expiry.use(container):
            self._registry.save(container, spec=replace(container.spec, grace_time_s=grace_time_s))

    def update_properties(
        self, handle: str, to_set: Mapping[str, str], to_remove: list[str]
    ) -> dict[str, str]:
        """Set and remove properties in one step; all of them now."""
        container = self._registry.get(handle)
        with self.expiry.use(container):
            properties = dict(container.spec.properties) | dict(to_set)
            for key in to_remove:
                properties.pop(key, None)
            if found := property_violations(properties, "set"):
                raise errors.InvalidRequest(found)
            ordered = tuple(sorted(properties.items()))
            self._registry.save(container, spec=replace(container.spec, properties=ordered))
            self._events.publish(EventKind.PROPERTIES_CHANGED, handle)
            return properties

    async def limits(self, handle: str, process_id: str = "") -> Limits:
        """The limits in force, from the kernel, of a container or of one process in it.

        Raises:
            ContainerNotFound, ContainerBusy, ContainerBroken, ProcessNotFound, ProcessExited, ProcessNotLimited.
        """
        with self._usable(handle, "asked for its limits"):
            return await self._backend.limits(handle, process_id or None)

    async def update_limits(self, handle: str, limits: Limits, process_id: str = "") -> Limits:
        """Change limits of a running container, or of one process in it; those in force afterwards.

        Raises:
            InvalidRequest, LimitRefused, NotSupported, HostFault, and as `limits`: nothing has changed.
        """
        found = (
            process_limit_violations(limits, "limits") if process_id else limit_violations(limits, "limits")
        )
        if found:
            raise errors.InvalidRequest(found)
        if process_id:
            job = self._update_process_limits(handle, process_id, limits)
        else:
            job = self._update_limits(handle, limits)
        return await self._guard.complete("limit", job)

    async def _update_process_limits(self, handle: str, process_id: str, limits: Limits) -> Limits:
        async with self._changing(handle, "limited") as container:
            entry = container.processes.get(process_id)
            if entry is None:
                raise errors.ProcessNotFound(handle, process_id)
            spec = entry.process.spec
            if limits.states_disk and spec.sidecar is None:
                raise errors.InvalidField("limits.disk_bytes", NO_PROCESS_DISK)
            if spec.is_beside:
                limits = with_quota(limits, self._defaults.cpu_quota_us_per_share, spec.limits)
            now = await self._backend.update_limits(
                handle,
                limits,
                process_id,
                record=lambda _: self._registry.save_process(container, process_id),
            )
        self._events.publish(EventKind.LIMITS_CHANGED, handle, process_id=process_id)
        return now

    async def _update_limits(self, handle: str, limits: Limits) -> Limits:
        async with self._changing(handle, "limited") as container:
            limits = with_quota(limits, self._defaults.cpu_quota_us_per_share, container.spec.limits)

            def record(now: Limits) -> None:
                wanted = limits.over(container.spec.limits)
                if limits.states_disk:  # a limit that was taken away has no scope either
                    wanted = replace(
                        wanted,
                        disk_bytes=now.disk_bytes,
                        disk_inodes=now.disk_inodes,
                        disk_scope=now.disk_scope,
                    )
                self._registry.save(container, spec=replace(container.spec, limits=wanted))

            now = await self._backend.update_limits(handle, limits, record=record)
        self._events.publish(EventKind.LIMITS_CHANGED, handle)
        return now

    async def map_port(self, handle: str, mapping: PortMapping) -> PortMapping:
        """Map one more port of a running container."""
        if found := port_violations((mapping,), "mapping"):
            raise errors.InvalidRequest([replace(v, field=v.field.replace("[0]", "")) for v in found])
        return await self._guard.complete("map_port", self._map_port(handle, mapping))

    async def _map_port(self, handle: str, mapping: PortMapping) -> PortMapping:
        async with self._changing(handle, "given a port") as container:
            mapped = await self._backend.map_port(handle, mapping, self._recorder(container))
            # Not written: the facts, which were, name it too, and recovery completes the spec from them.
            container.spec = replace(container.spec, port_mappings=(*container.spec.port_mappings, mapped))
        self._events.publish(EventKind.PORT_MAPPED, handle, host_port=str(mapped.host_port))
        return mapped

    async def egress(self, handle: str) -> tuple[EgressPolicy, EgressCounts]:
        """The policy in force, and what each rule has decided."""
        with self._usable(handle, "asked for its egress policy") as container:
            policy = self._complete(container.spec.egress)
            return policy, await self._backend.egress_counts(handle, len(policy.rules))

    async def explain_egress(self, handle: str, destination: Destination) -> tuple[Decision, EgressPolicy]:
        """What would become of a new connection of the container, and the policy that says so."""
        with self._usable(handle, "asked for its egress policy") as container:
            policy = self._complete(container.spec.egress)
            return await self._backend.explain_egress(handle, policy, destination), policy

    async def set_egress(
        self, handle: str, policy: EgressPolicy | None, etag: str, *, cut: bool = False
    ) -> EgressPolicy:
        """Replace the whole policy; None: the server's default.

        Args:
            handle: of the container.
            policy: its generation does not matter.
            etag: of the policy that is to be replaced; empty: whichever it is.
            cut: end established connections that the new policy does not allow, instead of letting them go on.

        Raises:
            EtagMismatch: etag is given and is not the current one's.
        """
        wanted = self._complete(policy)
        return await self._guard.complete("egress", self._set_egress(handle, wanted, etag, cut=cut))

    async def _set_egress(self, handle: str, wanted: EgressPolicy, etag: str, *, cut: bool) -> EgressPolicy:
        async with self._changing(handle, "given an egress policy") as container:
            current = self._etag(container)
            if etag and etag != current:
                raise errors.EtagMismatch(etag, current)
            former = self._complete(container.spec.egress)
            wanted = replace(wanted, generation=former.generation + int(cut))
            await self._change_egress(container, former, wanted, rules_put_to(former, wanted))
        return wanted

    async def _change_egress(
        self,
        container: Container,
        former: EgressPolicy,
        wanted: EgressPolicy,
        opened: tuple[EgressRule, ...] | None = None,
        *,
        bulk: bool = True,
    ) -> None:
        handle = container.handle
        with changing_rules(container, former, wanted):
            if opened is None:
                await self._backend.set_egress(handle, wanted)
            else:
                await self._backend.open_egress(handle, wanted, opened, bulk=bulk)
            changed = replace(container.spec, egress=wanted)
            await self._or_undo(
                container,
                lambda: self._registry.save(container, spec=changed),
                lambda: self._backend.set_egress(handle, former),
            )
        container.egress_etag = egress_etag(wanted)
        self._events.publish(EventKind.EGRESS_CHANGED, handle, etag=container.egress_etag)

    async def open_egress(self, handle: str, rules: tuple[EgressRule, ...], *, bulk: bool = True) -> None:
        """Put rules before those there are, in one step; Garden's NetOut (statement N22).

        Args:
            handle: of the container.
            rules: that allow.
            bulk: they were given as a list.
        """
        await self._guard.complete("egress", self._open_egress(handle, rules, bulk=bulk))

    async def _open_egress(self, handle: str, rules: tuple[EgressRule, ...], *, bulk: bool) -> None:
        async with self._changing(handle, "given an egress policy") as container:
            former = self._complete(container.spec.egress)
            wanted = replace(former, rules=(*rules, *former.rules))
            await self._change_egress(container, former, wanted, rules, bulk=bulk)

    def egress_etag(self, handle: str) -> str:
        """The etag of the policy in force."""
        return self._etag(self._registry.get(handle))

    def _etag(self, container: Container) -> str:
        if not container.egress_etag:
            container.egress_etag = egress_etag(self._complete(container.spec.egress))
        return container.egress_etag

    def _usable(self, handle: str, wanted: str) -> AbstractContextManager[Container]:
        container = self._registry.get(handle)
        container.require_usable(wanted)
        return self.expiry.use(container)

    @asynccontextmanager
    async def _changing(self, handle: str, wanted: str) -> AsyncIterator[Container]:
        """One change at a time, and none once a destroy has begun: that one removes what it finds recorded."""
        with self._usable(handle, wanted) as container:
            async with container.changing:
                container.require_usable(wanted)
                yield container

    def _recorder(self, container: Container) -> Callable[[dict[str, Any]], None]:
        def record(facts: dict[str, Any]) -> None:
            container.fetching = ""
            self._registry.save(container, facts=facts)

        return record

    async def _or_undo(
        self, container: Container, save: Callable[[], None], undo: Callable[[], Awaitable[object]]
    ) -> None:
        """Write down a change that is in force already; if that fails, take it back.

        Raises:
            HostFault: it is not written down; a note says if it could not be taken back either.
        """
        try:
            save()
        except errors.HostFault as fault:
            try:
                await undo()
            except errors.GardenError as error:
                fault.add_note(f"taking the change back failed too: {error}")
                log.error("container.change_not_undone", handle=container.handle, error=str(error))
            raise

    # --- stop and destroy

    async def stop(self, handle: str, *, kill: bool, grace_s: float = STOP_GRACE_S) -> None:
        """End all processes: SIGTERM, repeated, then SIGKILL after grace_s seconds; kill: SIGKILL at once.

        Raises:
            Unkillable: some are still there 10 s after the first SIGKILL; they end when the kernel lets them.
        """
        with self._usable(handle, "stopped") as container:
            deadline = time.monotonic() + (0 if kill else grace_s)
            while time.monotonic() < deadline and self._backend.workload_count(handle):
                await self._backend.signal_all(handle, signal.SIGTERM)
                await self._until_empty(handle, min(deadline, time.monotonic() + _STOP_REPEAT_S))
            deadline = time.monotonic() + STOP_GRACE_S
            while time.monotonic() < deadline and self._backend.workload_count(handle):
                await self._backend.signal_all(handle, signal.SIGKILL)
                await self._until_empty(handle, min(deadline, time.monotonic() + _STOP_REPEAT_S))
            if self._backend.workload_count(handle):
                raise errors.Unkillable(handle, self._backend.describe_workload(handle), wanted="stopped")
            if container.state in USABLE:
                self._registry.move(container, State.STOPPED)
                self._events.publish(EventKind.CONTAINER_STOPPED, handle)

    async def _until_empty(self, handle: str, until: float) -> None:
        # The kernel tells nobody when a cgroup's task count falls; a short poll is the whole wait.
        while self._backend.workload_count(handle) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(_STOP_POLL_S)

    async def destroy(self, handle: str, *, joins: bool = True) -> None:
        """Remove a container with everything it had.

        Args:
            handle: of the container.
            joins: a second call waits for the first; else it is refused.

        Raises:
            ContainerNotFound, BeingDestroyed, Unkillable, HostFault.
        """
        if not joins and self._guard.running("destroy", handle) is not None:
            raise errors.BeingDestroyed(handle)
        making = self._guard.running("create", handle)
        if making is not None:
            fetching = self._registry.find(handle)
            if fetching is not None and fetching.fetching:
                fetching.unwanted = True  # nothing has been made yet, and a fetch may take minutes
                making.cancel()
            await asyncio.wait([making])
            if fetching is not None and fetching.unwanted and fetching.gone:
                return
        container = self._registry.get(handle)
        job = self._guard.running("destroy", handle) or self._guard.start(
            "destroy", handle, self._demolish(container)
        )
        await asyncio.shield(job)

    def resume_destroy(self, container: Container, reason: str = "") -> asyncio.Future[None]:
        """Finish, in the background, what an earlier server has begun; reason: as told in its last event."""
        return self._guard.start("destroy", container.handle, self._resume_destroy(container, reason))

    async def _resume_destroy(self, container: Container, reason: str) -> None:
        async with self._resuming:
            if self._guard.closing:
                raise errors.ShuttingDown  # it is written down; the next server does it
            await self._demolish(container, reason)

    async def _demolish(self, container: Container, reason: str = "") -> None:
        with steps.operation(steps.DESTROY, container.handle, self._listeners):
            await self._demolish_in_steps(container, reason)

    async def _demolish_in_steps(self, container: Container, reason: str) -> None:
        started = time.monotonic()
        self.expiry.disarm(container)
        if container.destroy_retry is not None:
            container.destroy_retry.cancel()
        if container.state is not State.DESTROYING:
            with steps.step(Step.JOURNAL):
                self._registry.leave(container, State.DESTROYING, reason)
        await _until_free(container.changing)
        try:
            failpoints.reach(Point.DESTROY_JOURNAL)
            if not container.gone:
                await self._backend.destroy(container.handle, container.facts)
                container.gone = True  # its leases may be another container's from here on
            failpoints.reach(Point.DESTROY_RELEASE)
            with steps.step(Step.JOURNAL):
                self._registry.remove(container)
        except errors.GardenError as error:
            self._metrics.destroy_failures.labels(error.code).inc()
            self._unkillable(container, error)
            raise
        self._metrics.destroys.inc()
        self._events.publish(EventKind.CONTAINER_DESTROYED, container.handle, reason=reason)
        log.info("container.destroyed", handle=container.handle, took_ms=_ms_since(started), reason=reason)

    def _unkillable(self, container: Container, error: errors.GardenError) -> None:
        self._registry.leave(container, State.UNKILLABLE, str(error))
        self._events.publish(EventKind.CONTAINER_UNKILLABLE, container.handle, reason=str(error))
        log.error("container.unkillable", handle=container.handle, error=str(error))
        self._retry_later(container)

    def _retry_later(self, container: Container) -> None:
        """Try again to destroy what the kernel did not let go: after 1 s, then ever more rarely, at last every 30 s."""
        container.destroy_tries += 1
        pause_s = _RETRY_DESTROY_S[min(container.destroy_tries, len(_RETRY_DESTROY_S)) - 1]
        # Not the expiry timer: that one is stopped by everybody who looks at the container.
        loop = asyncio.get_running_loop()
        container.destroy_retry = apart(loop.call_later, pause_s, self._retry, container)

    def _retry(self, container: Container) -> None:
        if container.state is State.UNKILLABLE:
            self._demolish_unasked(container)

    def _expired(self, container: Container) -> None:
        if container.state in (*USABLE, State.BROKEN):
            log.info("container.expired", handle=container.handle)
            self._demolish_unasked(container, "its grace time has passed")

    def _demolish_unasked(self, container: Container, reason: str = "") -> None:
        if not self._guard.closing and self._guard.running("destroy", container.handle) is None:
            self._guard.start("destroy", container.handle, self._demolish(container, reason))


async def _until_free(lock: asyncio.Lock) -> None:
    """Wait for a change under way, but not for one that hangs: a destroy ends in any case."""
    try:
        async with asyncio.timeout(_CHANGE_PATIENCE_S), lock:
            return
    except TimeoutError:
        return


def rules_put_to(former: EgressPolicy, wanted: EgressPolicy) -> tuple[EgressRule, ...] | None:
    """The rules that one policy has before or behind those of another; None: that is not all the difference."""
    if replace(wanted, rules=()) != replace(former, rules=()):
        return None
    kept, count = len(former.rules), len(wanted.rules)
    if count >= kept and wanted.rules[count - kept :] == former.rules:
        return wanted.rules[: count - kept]
    return wanted.rules[kept:] if wanted.rules[:kept] == former.rules else None


def _fetching(container: Container, progress: PullProgress) -> None:
    container.fetching = str(progress)


def _ms_since(started: float) -> float:
    return round((time.monotonic() - started) * 1000, 1)


def egress_etag(policy: EgressPolicy) -> str:
    """A tag that changes whenever the policy does: a digest of its content."""
    rules = "\n".join(map(format_egress_rule, policy.rules))
    text = f"{policy.default_action.value} {policy.generation}\n{rules}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
