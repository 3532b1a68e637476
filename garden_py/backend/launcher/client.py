"""The server's side of the launcher: starts it, keeps its workers, hands out jobs."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import structlog

from garden_py.backend.host.framed import FramedLink, LinkClosed, Reply, RequestRefused
from garden_py.backend.launcher import MODULE
from garden_py.backend.launcher.long_texts import put_out
from garden_py.model.errors import GardenError, HostFault, ImageInvalid, InvalidField, NotSupported, PortInUse

log = structlog.get_logger()
START_TIMEOUT_S = 20.0


class Launcher:
    """A launcher process and `workers` workers. A worker or launcher that dies is replaced at the next job.

    Args:
        mount_dir: where it puts its private tmpfs; a name beside it is its lock's.
        workers: jobs done at the same time; further ones wait their turn.
        without_hybrid_cgroup, host_mounts: see launcher/main.py.
    """

    def __init__(
        self,
        mount_dir: Path,
        *,
        workers: int,
        without_hybrid_cgroup: bool = False,
        host_mounts: bool = False,
    ) -> None:
        self._mount_dir = mount_dir
        self._flags = ["--without-hybrid-cgroup"] if without_hybrid_cgroup else []
        if host_mounts:
            self._flags.append("--host-mounts")
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[FramedLink] = []
        self._slots = asyncio.Semaphore(workers)
        self._starting = asyncio.Lock()
        self._starts = 0

    async def start(self) -> None:
        """Start the process and one worker, so that the first job finds it warm.

        Raises:
            HostFault: it did not come up.
        """
        async with self._starting:
            await asyncio.to_thread(self._spawn)
        self._idle.append(await self._new_worker())

    @property
    def pid(self) -> int | None:
        """Of the launcher process, which leads the session that it and its workers are in; None without one."""
        return None if self._process is None else self._process.pid

    def _spawn(self) -> None:
        """Start the launcher process. subprocess uses vfork, which is safe beside grpc's threads."""
        self._shut_down()
        ours, theirs = socket.socketpair()
        argv = [
            sys.executable,
            "-m",
            MODULE,
            str(theirs.fileno()),
            str(self._mount_dir),
            str(self._mount_dir.with_suffix(".lock")),
            *self._flags,
        ]
        with theirs:
            self._process = subprocess.Popen(
                argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        ours.settimeout(START_TIMEOUT_S)
        self._control = ours
        try:
            ready = ours.recv(16)
        except TimeoutError as error:
            self._shut_down()
            cause = "workers of its predecessor have not ended, or the machine is overloaded"
            raise HostFault("start launcher", f"not ready in {START_TIMEOUT_S:g} s: {cause}") from error
        if not ready:
            raise HostFault("start launcher", f"it exited with status {self._process.wait()}")

    async def _new_worker(self) -> FramedLink:
        async with self._starting:
            try:
                fd = await asyncio.to_thread(self._ask_for_worker)
            except OSError:
                for link in self._idle:  # workers of a dead launcher; a new one waits for their end
                    link.close()
                self._idle.clear()
                self._starts += 1
                log.warning("launcher.restarted", pid=self._process.pid if self._process else None)
                await asyncio.to_thread(self._spawn)
                fd = await asyncio.to_thread(self._ask_for_worker)
        return FramedLink(socket.socket(fileno=fd))

    def _ask_for_worker(self) -> int:
        if self._control is None:
            raise ConnectionError("no launcher")
        self._control.send(b"worker")
        data, fds, _, _ = socket.recv_fds(self._control, 16, 1)
        if not data or not fds:
            raise ConnectionError("the launcher closed its control socket")
        os.set_inheritable(fds[0], False)
        return fds[0]

    async def run(
        self, op: str, params: dict[str, Any], fds: list[int] | None = None, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """Do one job in a worker.

        Raises:
            GardenError: as the job raised it; HostFault also when its worker died.
        """
        task = asyncio.ensure_future(self._run(op, params, fds, timeout_s))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # The worker cannot be called back; whoever undoes the job must find its work done, not under way.
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # seen: who cancels undoes the job, however it ended
            raise

    async def _run(
        self, op: str, params: dict[str, Any], fds: list[int] | None, timeout_s: float
    ) -> dict[str, Any]:
        async with self._slots:
            link = self._take_idle() or await self._new_worker()
            starts = self._starts
            own, given = list(fds or ()), len(fds or ())
            try:
                value = put_out({"op": op, **params}, own)
                reply: Reply = await link.request(value, own, timeout_s=timeout_s)
            except RequestRefused as error:
                self._put_back(link, starts)
                raise _rebuild(op, error) from error
            except LinkClosed as error:
                raise HostFault(op, f"the launcher's worker died: {error}") from error
            except BaseException:
                link.close()  # an answer may still come; nobody may take it for the next job's
                raise
            finally:
                for fd in own[given:]:
                    os.close(fd)
            self._put_back(link, starts)
            return reply.value

    def _put_back(self, link: FramedLink, starts: int) -> None:
        """Keep a worker for the next job; not one of a dead launcher, whose successor waits for its end."""
        if starts == self._starts:
            self._idle.append(link)
        else:
            link.close()

    def _take_idle(self) -> FramedLink | None:
        while self._idle:
            link = self._idle.pop()
            if link.is_open:
                return link
        return None

    async def close(self) -> None:
        """End the launcher and its workers."""
        for link in self._idle:
            link.close()
        self._idle.clear()
        await asyncio.to_thread(self._shut_down)

    def _shut_down(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _rebuild(op: str, refused: RequestRefused) -> GardenError:
    """The error that a job raised in the worker."""
    facts = refused.data.get("facts", {})
    match refused.code:
        case InvalidField.code if "field" in facts:
            return InvalidField(facts["field"], facts["problem"])
        case ImageInvalid.code:
            return ImageInvalid(facts["image"], facts["problem"])
        case PortInUse.code:
            return PortInUse(facts["port"])
        case NotSupported.code:
            return NotSupported(str(refused))
        case HostFault.code:
            step = facts.get("step", op)
            return HostFault(step, str(refused).removeprefix(f"{step}: "))
        case _:
            return HostFault(op, str(refused))
