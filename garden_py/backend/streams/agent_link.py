"""The server's conversation with one container's agent. What the agent says is hostile input.

Nothing it sends becomes a path, a pid the server acts on, or unbounded memory (agent_replies.py). An agent that breaks
the protocol, sends what nobody asked for, or does not answer ends its link with that reason, and with the link its own
container. Nothing else is harmed: a turn of the event loop decodes a bounded amount, and nothing waits for an agent
without a deadline.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from garden_py import wire
from garden_py.backend.host.framed import FramedLink, LinkClosed, Reply, RequestRefused
from garden_py.backend.streams.agent_replies import (
    AgentExit,
    AgentMisbehaved,
    ForeignWire,
    Greeting,
    Spawned,
    parse_exit,
    parse_greeting,
    parse_spawned,
    printable,
)
from garden_py.backend.streams.agent_talk import AgentTalk
from garden_py.backend.streams.gate import Gate
from garden_py.backend.streams.spawn_request import build_spawn_request, spawn_error
from garden_py.model import errors
from garden_py.model.process import ProcessSpec, WindowSize

SPAWN_TIMEOUT_S = 30.0
# A start may wait for a file system of the container's; whether the agent itself still answers is asked beside it.
_WONDER_AFTER_S = 2.0
UPGRADE_TIMEOUT_S = 60.0
_UNASKED_MAX = 4096  # twice the processes that an agent may hold, each of which ends once
_EVENT_MAX_BYTES = 1024
_REPLY_MAX_BYTES = 64 << 10
_EXPECTED_REFUSALS = ("process_not_found", "still_running", "no_tty")


class NoUpgrade(Exception):
    """The agent stays what it is; the message says why. It goes on working."""


class AgentLink:
    """Requests to one agent, typed.

    Args:
        handle: of the container, for errors.
        patience_s: how long the agent may take to answer what it can answer at once.
        on_exit: called for each process end the agent reports.
        on_lost: called once if the connection ends by itself, with the reason.
        talk: takes down what is said; None: nobody does.

    Attributes:
        wire: the version the agent speaks; known after `hello`.
        build: name of the bundle the agent was started from; known after `hello`, empty in version 1.
    """

    def __init__(
        self,
        handle: str,
        sock: socket.socket,
        *,
        patience_s: float,
        on_exit: Callable[[AgentExit], None],
        on_lost: Callable[[str], None],
        talk: AgentTalk | None = None,
    ) -> None:
        self._handle = handle
        self._talk = talk or AgentTalk()
        self._on_lost = on_lost
        self._given_up_because = ""
        self._patience_s = patience_s
        self._on_exit = on_exit
        self._link = FramedLink(sock, on_event=self._event, on_close=self._lost, unasked_max=_UNASKED_MAX)
        self._link.limits.update(
            {wire.EVENT: _EVENT_MAX_BYTES, wire.REPLY: _REPLY_MAX_BYTES, wire.ERROR: _REPLY_MAX_BYTES}
        )
        self._questions: set[asyncio.Task[None]] = set()
        self.wire = wire.VERSION
        self.build = ""

    @classmethod
    def connect(
        cls,
        handle: str,
        path: Path,
        *,
        patience_s: float,
        on_exit: Callable[[AgentExit], None],
        on_lost: Callable[[str], None],
        talk: AgentTalk | None = None,
    ) -> AgentLink:
        """Connect to an agent's socket, which listens before the agent even runs.

        Raises:
            OSError: nothing listens there, or its backlog is full.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)  # the backlog of an agent that does not accept must not hold us
            sock.connect(os.fspath(path))
        except OSError:
            sock.close()
            raise
        return cls(handle, sock, patience_s=patience_s, on_exit=on_exit, on_lost=on_lost, talk=talk)

    @property
    def is_open(self) -> bool:
        """Whether the connection stands."""
        return self._link.is_open

    @property
    def heard_at(self) -> float:
        """When the agent has last said something, in the event loop's time."""
        return self._link.heard_at

    def close(self) -> None:
        """Disconnect; the agent and its processes do not notice."""
        for question in self._questions:
            question.cancel()
        self._link.close()

    def expect_end(self, reason: str) -> None:
        """What requests that the agent's end cuts off are told, in place of how the connection ended."""
        self._given_up_because = self._given_up_because or reason

    # --- what every request needs

    def _lost(self, reason: str) -> None:
        self._talk.ended(reason)
        self._on_lost(reason)

    def _event(self, value: dict[str, Any]) -> None:
        self._talk.heard(value)
        if value.get("event") != "exited":
            return
        found = parse_exit({"id": value.get("process"), **value})
        if found is not None:
            self._on_exit(found)

    def _broken(self, reason: str) -> errors.ContainerBroken:
        """End the link: there is no use in an agent like this."""
        self._given_up_because = self._given_up_because or reason
        self._link.fail(reason)
        return errors.ContainerBroken(self._handle, reason)

    async def _ask(
        self,
        value: dict[str, Any],
        fds: list[int] | None = None,
        *,
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> Reply:
        """Ask something that may take its time.

        Raises:
            ContainerBroken: the agent is gone.
            RequestRefused, TimeoutError.
        """
        self._talk.sent(value)
        outcome = "left alone"
        try:
            reply = await self._link.request(value, fds, timeout_s=timeout_s, meanwhile=meanwhile)
            outcome = "ok"
            return reply
        except RequestRefused as error:
            outcome = f"{error.code}: {error}"
            raise
        except TimeoutError:
            outcome = f"no answer in {timeout_s:g} s"
            raise
        except LinkClosed as error:
            outcome = str(error)
            reason = self._given_up_because or f"its agent is gone ({error})"
            raise errors.ContainerBroken(self._handle, reason) from error
        finally:
            self._talk.answered(value, outcome)

    async def _tell(self, value: dict[str, Any]) -> dict[str, Any] | None:
        """A request about a process that may be gone already; None if it is."""
        try:
            reply = await self._ask_at_once(value)
        except RequestRefused as error:
            if error.code in _EXPECTED_REFUSALS:
                return None
            raise self._refused(error) from error
        reply.close_fds()
        return reply.value

    async def _ask_at_once(self, value: dict[str, Any], timeout_s: float | None = None) -> Reply:
        """Ask something that the agent answers without waiting for anything."""
        patience_s = self._patience_s if timeout_s is None else timeout_s
        try:
            return await self._ask(value, timeout_s=patience_s)
        except TimeoutError as error:
            raise self._broken(f"its agent does not answer (for {patience_s:g} s)") from error

    def _refused(self, error: RequestRefused) -> errors.ContainerBroken:
        return self._broken(f"its agent refuses: {printable(str(error))}")

    # --- requests

    async def hello(self, *, server: str, timeout_s: float) -> Greeting:
        """Greet the agent; returns when it runs.

        Raises:
            ContainerBroken: also if it speaks a foreign version of the protocol.
        """
        request = {"op": "hello", "server": server, "wire": [wire.OLDEST, wire.VERSION]}
        self._link.limits[wire.REPLY] = wire.MAX_PAYLOAD
        try:
            reply = await self._ask_at_once(request, timeout_s)
            reply.close_fds()
            greeting = parse_greeting(reply.value)
        except RequestRefused as error:
            if error.code == "unsupported_wire":
                raise self._foreign(printable(str(error))) from error
            raise self._refused(error) from error
        except ForeignWire as error:
            raise self._foreign(str(error)) from error
        except AgentMisbehaved as error:
            raise self._broken(f"its agent misbehaves: {error}") from error
        finally:
            self._link.limits[wire.REPLY] = _REPLY_MAX_BYTES
        self.wire, self.build = greeting.wire, greeting.build
        return greeting

    def _foreign(self, said: str) -> errors.ContainerBroken:
        """Such an agent does nothing wrong: it and its processes are left alone."""
        self._link.close()
        spoken = f"{wire.OLDEST} to {wire.VERSION}"
        return errors.ContainerBroken(
            self._handle, f"its agent is of another release: this server speaks wire {spoken}, it: {said}"
        )

    async def ping(self) -> None:
        """Make sure that the agent answers.

        Raises:
            ContainerBroken: it does not.
        """
        try:
            (await self._ask_at_once({"op": "ping"})).close_fds()
        except RequestRefused:  # version 1 does not know the word; an answer it is
            return

    async def upgrade(self, build: str, argv: list[str], env: tuple[str, ...]) -> None:
        """Have the agent replace itself by another program; connection, processes and streams stay.

        Args:
            build: what the new agent will call itself.
            argv: its command line, as seen in the container.
            env: its whole environment.

        Raises:
            NoUpgrade: nothing has changed.
            ContainerBroken: the agent is gone, or answers nothing any more.
        """
        if self.wire < 2:
            raise NoUpgrade(f"the running agent speaks wire version {self.wire}, which knows no upgrade")
        request = {
            "op": "upgrade",
            "build": build,
            "argv": [os.fsencode(word) for word in argv],
            "env": [os.fsencode(entry) for entry in env],
        }
        try:
            reply = await self._ask(request, timeout_s=UPGRADE_TIMEOUT_S)
            reply.close_fds()
            greeting = parse_greeting(reply.value)
        except RequestRefused as error:
            raise NoUpgrade(printable(str(error))) from error
        except TimeoutError as error:
            await self.ping()
            raise NoUpgrade(f"no answer in {UPGRADE_TIMEOUT_S:g} s") from error
        except (ForeignWire, AgentMisbehaved) as error:
            raise self._broken(f"its agent misbehaves after its upgrade: {error}") from error
        self.wire, self.build = greeting.wire, greeting.build

    async def spawn(
        self,
        spec: ProcessSpec,
        env: tuple[str, ...],
        cgroup_fds: list[int],
        *,
        bounding: int | None,
        before_exec: Callable[[], None] | None = None,
        raise_limits: Callable[[int], None] | None = None,
        program: str | None = None,
        program_path: str = "",
    ) -> Spawned:
        """Start a process.

        Args:
            spec: with id filled in.
            env: entries in order, later wins; the agent adds PATH, HOME and USER.
            cgroup_fds: cgroup.procs files it joins.
            bounding: capability mask it keeps; None: all of the container's.
            before_exec: called while the agent prepares the process, which does not run before it has returned; what
                it raises ends the start, and nothing has run.
            raise_limits: see Gate; only with before_exec.
            program: "tar-in" or "tar-out" instead of the spec's path.
            program_path: its argument.

        Raises:
            GardenError: as service.ports.Backend.start_process.
        """
        request = build_spawn_request(
            spec,
            env,
            bounding=bounding,
            program=program,
            program_path=program_path,
            gated=before_exec is not None and self.wire >= 2,
        )
        if before_exec is not None and self.wire < 2:
            before_exec()
            before_exec = None
        wondering = asyncio.get_running_loop().call_later(_WONDER_AFTER_S, self._wonder)
        try:
            if before_exec is None:
                reply = await self._ask(request, cgroup_fds, timeout_s=SPAWN_TIMEOUT_S)
            else:
                reply = await self._ask_gated(request, cgroup_fds, Gate(before_exec, raise_limits))
        except RequestRefused as error:
            if program is not None and error.code == "no_space":
                raise errors.CopyFailed("no_space", printable(str(error))) from error
            raise spawn_error(self._handle, spec, error) from error
        except TimeoutError as error:
            # It may yet start; nobody would know of it then.
            await self.cancel(spec.id)
            raise errors.ProcessStartFailed(f"it did not start in {SPAWN_TIMEOUT_S:g} s") from error
        finally:
            wondering.cancel()
        return self._take_streams(reply, is_tty=spec.tty is not None, is_complete=True)

    def _wonder(self) -> None:
        """Find out whether a request takes long or the agent is gone; if it is, the link and the request end."""
        question = asyncio.ensure_future(self._find_out())
        self._questions.add(question)
        question.add_done_callback(self._questions.discard)

    async def _find_out(self) -> None:
        with suppress(errors.ContainerBroken):  # told by on_lost
            await self.ping()

    async def _ask_gated(self, request: dict[str, Any], cgroup_fds: list[int], gate: Gate) -> Reply:
        with gate:
            fds = [*cgroup_fds, gate.child_end]
            try:
                reply = await self._ask(request, fds, timeout_s=SPAWN_TIMEOUT_S, meanwhile=gate.open)
            except RequestRefused:
                if gate.failure is not None:
                    raise gate.failure from None
                raise
            if gate.failure is not None:
                reply.close_fds()
                raise gate.failure
            return reply

    async def attach(self, process_id: str, *, is_tty: bool) -> Spawned:
        """Our ends of a running or finished process's streams again, those not yet dropped."""
        try:
            reply = await self._ask_at_once({"op": "attach", "id": process_id})
        except RequestRefused as error:
            raise self._refused(error) from error
        return self._take_streams(reply, is_tty=is_tty, is_complete=False)

    def _take_streams(self, reply: Reply, *, is_tty: bool, is_complete: bool) -> Spawned:
        is_master = is_tty and self.wire < 2
        try:
            return parse_spawned(reply, is_master=is_master, is_complete=is_complete, is_tty=is_tty)
        except AgentMisbehaved as error:
            raise self._broken(f"its agent misbehaves: {error}") from error
        except OSError as error:
            raise errors.HostFault("take over streams", str(error)) from error

    async def cancel(self, process_id: str) -> None:
        """Have a process killed and forgotten, whether it has started or not; its end is not told."""
        if self.wire < 2:
            await self.signal(process_id, signal.SIGKILL, group=True)  # its record stays there
            return
        await self._tell({"op": "cancel", "id": process_id})

    async def signal(self, process_id: str, number: int, *, group: bool) -> bool:
        """Send a signal; False if the process is gone."""
        answer = await self._tell({"op": "signal", "id": process_id, "signal": int(number), "group": group})
        return answer is not None and answer.get("delivered") is True

    async def signal_all(self, number: int) -> None:
        """Signal every process of the container but PID 1."""
        await self._tell({"op": "signal_all", "signal": int(number)})

    async def resize(self, process_id: str, size: WindowSize) -> None:
        """Set a terminal's size; 0 is the default of a dimension."""
        await self._tell({"op": "resize", "id": process_id, "rows": size.rows, "columns": size.columns})

    async def keep_spool(self, process_id: str, fd: int) -> None:
        """Have the agent hold the spool of a process's input; `attach` gives it back.

        Raises:
            HostFault: it cannot.
            ContainerBroken: the agent is gone.
        """
        try:
            reply = await self._ask({"op": "keep", "id": process_id}, [fd], timeout_s=self._patience_s)
        except RequestRefused as error:
            if error.code in ("process_not_found", "not_kept"):
                raise errors.HostFault("keep stdin", printable(str(error))) from error
            raise self._refused(error) from error
        except TimeoutError as error:
            raise self._broken(f"its agent does not answer (for {self._patience_s:g} s)") from error
        reply.close_fds()

    async def close_stdin(self, process_id: str) -> None:
        """Have the agent drop its duplicate of stdin, so that the process sees the end."""
        await self._tell({"op": "close_stdin", "id": process_id})

    async def release(self, process_id: str) -> None:
        """Let the agent forget a finished process whose exit is in the journal."""
        await self._tell({"op": "release", "id": process_id})
