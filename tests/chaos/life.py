"""One container from its create to its end, as its client lives it."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial

from chaos.board import Board, Failure, Hurt, Subject
from chaos.patience import persist
from chaos.plan import CHANGES, LifePlan, Step, draw_policy, plan_life
from chaos.work import Work, notes_mount
from garden_py.client import AsyncContainer, AsyncGardenClient, ContainerState, Limits, NotFound

EXPIRY_S = 30.0


async def live_on(board: Board, address: str, seed: int, client: int) -> None:
    """A client: one life after the other until the run stops."""
    number = 0
    while not board.stopping.is_set():
        async with AsyncGardenClient(address) as garden:
            for _ in range(20):  # then with a new connection
                if board.stopping.is_set():
                    return
                await Life(board, garden, plan_life(seed, client, number)).live()
                number += 1


class Life:
    """One life; its failures go to the board."""

    def __init__(self, board: Board, garden: AsyncGardenClient, plan: LifePlan) -> None:
        self._board = board
        self._garden = garden
        self._plan = plan
        self._subject = Subject(plan.spec)
        self._container: AsyncContainer = garden.container(plan.spec.handle)
        self._pending: list[Work] = []
        self._changing = asyncio.Lock()

    async def live(self) -> None:
        """Create, use, check, end."""
        subject = self._subject
        self._board.subjects[subject.handle] = subject
        try:
            await self._create()
            try:
                await self._take_all()
                for work in self._pending:
                    await work.finish()
                await self._check_ran()
                await self._check_listed()
            except Hurt:
                await self._check_broken()
            subject.ending = True
            await self._end()
            self._board.lives += 1
            self._board.lives_hurt += bool(subject.hurt)
        except Failure as failure:
            hurt = f" (hurt by {', '.join(subject.hurt)})" if subject.hurt else ""
            self._board.fail(subject.handle + hurt, str(failure))
            await self._give_up()
        except Hurt as hurt:
            self._board.fail(subject.handle, f"cannot be destroyed once broken by {subject.hurt}: {hurt}")
            await self._give_up()
        finally:
            del self._board.subjects[subject.handle]

    async def _ask(self, what, act):
        return await persist(self._board, self._subject, what, act)

    async def _create(self) -> None:
        handle, spec = self._subject.handle, replace(self._plan.spec, bind_mounts=(notes_mount(self._board),))
        if self._plan.image is not None:
            spec = replace(spec, image=self._board.images[self._plan.image])

        def ask() -> Awaitable[AsyncContainer]:
            return self._ask("create", lambda: self._garden.create(spec, request_id=handle))

        made = await asyncio.gather(*(ask() for _ in range(1 + self._plan.twin)))
        pids = {container.created.pid for container in made if container.created is not None}
        if len(pids) != 1:
            raise Failure(f"two creates with one request id made the PIDs 1 {pids}")
        (self._subject.pid,) = pids

    async def _take_all(self) -> None:
        numbered = list(enumerate(self._plan.steps))
        if not self._plan.parallel:
            for number, step in numbered:
                await self._take(step, number)
            return
        taken = (self._take(step, number) for number, step in numbered)
        for result in await asyncio.gather(*taken, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _take(self, step: Step, number: int) -> None:
        if step.kind in CHANGES:
            async with self._changing:  # what is read back shall be what was set
                await getattr(self, "_" + step.kind)(step, number)
        else:
            process_id = f"{self._subject.handle}.{number}"
            work = Work(self._board, self._subject, self._container, step, process_id)
            if step.kind == "long":
                self._pending.append(work)
                await work.begin()
            else:
                await work.perform()
        if self._subject.hurt:
            raise Hurt("noticed between two steps")

    # --- changes

    async def _properties(self, step: Step, number: int) -> None:
        change = partial(self._container.update_properties, {"step": str(number)}, remove=["absent"])
        await self._ask("properties", change)
        found = await self._ask("properties", self._container.properties)
        if not self._subject.hurt and found != {**self._plan.spec.properties, "step": str(number)}:
            raise Failure(f"properties are {found}")

    async def _egress(self, step: Step, number: int) -> None:
        policy = draw_policy(random.Random(step.size))
        await self._ask("egress", lambda: self._container.set_egress(policy))
        found = await self._ask("egress", self._container.egress)
        if (found.default_action, len(found.rules)) != (policy.default_action, len(policy.rules)):
            raise Failure(f"egress is {found}, not {policy}")

    async def _limits(self, step: Step, number: int) -> None:
        wanted = Limits(memory_bytes=(128 + step.code) << 20, pids=200 + step.code)
        await self._ask("limits", lambda: self._container.update_limits(wanted))
        found = await self._ask("limits", self._container.limits)
        if (found.memory_bytes, found.pids) != (wanted.memory_bytes, wanted.pids):
            raise Failure(f"limits are {found}, not {wanted}")

    async def _port(self, step: Step, number: int) -> None:
        mapped = await self._ask("port", lambda: self._container.map_port(9000 + number))
        info = await self._ask("info", self._container.info)
        if not self._subject.hurt and mapped not in info.mapped_ports:
            raise Failure(f"{mapped} was mapped, but there are {info.mapped_ports}")

    async def _look(self, step: Step, number: int) -> None:
        info = await self._ask("info", self._container.info)
        if not self._subject.hurt and (
            info.state is not ContainerState.ACTIVE or info.pid != self._subject.pid
        ):
            raise Failure(f"is {info.state.name} with pid {info.pid}, was {self._subject.pid}")
        (metrics,) = await self._ask("metrics", lambda: self._garden.metrics([self._subject.handle]))
        if metrics.error and not self._subject.hurt:
            raise Failure(f"metrics: {metrics.error}")

    async def _copy(self, step: Step, number: int) -> None:
        data = hashlib.sha256(str(step.size).encode()).digest() * (step.size // 32 + 1)
        path = f"/var/chaos/{number}"
        await self._ask("copy in", lambda: self._container.write_file(path, data))
        found = await self._ask("copy out", lambda: self._container.read_file(path))
        if found != data and not self._subject.hurt:
            raise Failure(f"{len(data)} bytes were copied in, {len(found)} others out")

    # --- checks

    async def _check_ran(self) -> None:
        """Every process has run once, it has written its name; and ended as its readers were told."""
        if not self._subject.ran:
            return
        notes = self._board.notes / self._subject.handle
        found = notes.read_text().split() if notes.exists() else []
        if sorted(found) != sorted(self._subject.ran) and not self._subject.hurt:
            raise Failure(f"started were {sorted(self._subject.ran)}, run have {sorted(found)}")
        listed = await self._ask("list processes", self._container.processes)
        exits = {info.id: (info.exit.code, info.exit.signal) for info in listed if info.exit is not None}
        told = {name: (status.code, status.signal) for name, status in self._subject.exits.items()}
        if (exits != told or set(told) != set(self._subject.ran)) and not self._subject.hurt:
            raise Failure(f"started were {sorted(self._subject.ran)}, ended {told}, the list has {listed}")

    async def _check_listed(self) -> None:
        async def handles() -> dict[str, ContainerState]:
            return {info.handle: info.state async for info in self._garden.list({"client": self._client()})}

        found = await self._ask("list", handles)
        if not self._subject.hurt and set(found) != {self._subject.handle}:
            raise Failure(f"this client has one container, the list says {found}")

    def _client(self) -> str:
        return self._plan.spec.properties["client"]

    async def _check_broken(self) -> None:
        """What was broken on purpose is reported, if its agent was what was hit."""
        if not self._plan.checks_broken or "agent-kill" not in self._subject.hurt:
            return
        for _ in range(100):
            info = await self._ask("info of a broken one", self._container.info)
            if info.state is ContainerState.BROKEN and info.state_reason:
                return
            await asyncio.sleep(0.1)
        raise Failure(f"its agent was killed, but it is {info.state.name}")

    # --- the end

    async def _end(self) -> None:
        if self._plan.ending == "expire" and not self._subject.hurt:
            await self._expire()
            return
        if self._plan.ending == "busy" and not self._subject.hurt:
            with suppress(Hurt):
                busy = ["sh", "-c", "sleep 100 & sleep 100 & sleep 100"]
                await self._ask("start", lambda: self._container.start(busy, id="busy", request_id="busy"))
        if self._plan.ending == "stop" and not self._subject.hurt:
            with suppress(Hurt):
                await self._ask("stop", lambda: self._container.stop(kill=True))
        await self._destroy()
        if self._plan.ending == "twice":
            await self._destroy()

    async def _destroy(self) -> None:
        async def destroy() -> None:
            try:
                await self._container.destroy()
            except NotFound as error:
                if error.code != "CONTAINER_NOT_FOUND":
                    raise

        await self._ask("destroy", destroy)
        if await self._exists():
            raise Failure("is still there after its destroy was answered")

    async def _expire(self) -> None:
        async def set_grace() -> None:
            try:
                await self._container.set_grace_time(timedelta(seconds=0.2))
            except NotFound:
                return  # an earlier try was heard

        await self._ask("grace time", set_grace)
        for _ in range(int(EXPIRY_S / 0.25)):
            await asyncio.sleep(0.25)
            if not await self._exists():
                return
        raise Failure(f"its grace time of 0.2 s passed {EXPIRY_S} s ago")

    async def _exists(self) -> bool:
        """Asked by a list, which is no use of the container and so does not arm its grace time."""

        async def listed() -> bool:
            properties = {"client": self._client()}
            return any(
                [
                    info.handle == self._subject.handle
                    async for info in self._garden.list(properties, all_states=True)
                ]
            )

        return await self._ask("list", listed)

    async def _give_up(self) -> None:
        """After a failure: away with it, so that nothing fails for it once more."""
        self._subject.ending = True
        try:
            await self._destroy()
        except (Failure, Hurt) as error:
            print(
                f"       {self._subject.handle} could not be removed after its failure: {error}", flush=True
            )
