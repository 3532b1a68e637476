"""Copying tar streams into and out of a container: packed and unpacked inside it, by a child of its agent."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from garden_py.backend.linux.container import COPY_PREFIX, LinuxContainer
from garden_py.backend.streams.agent_replies import AgentExit, Spawned
from garden_py.model.errors import ContainerBroken, CopyFailed, InvalidField
from garden_py.model.process import ProcessSpec

CHUNK_BYTES = 256 << 10
_PIPE_BYTES = 1 << 20  # /proc/sys/fs/pipe-max-size as the kernel has it, pipe(7)
_KILL_PATIENCE_S = 5.0
_MESSAGE_MAX = 4096
_REASONS = ("no_such_path", "permission_denied", "broken_archive", "no_space", "io_error")


class _Helper:
    """A running tar-in or tar-out: our ends of its streams, and its exit to come."""

    def __init__(self, helper_id: str, spawned: Spawned, exited: asyncio.Future[AgentExit]) -> None:
        self.id, self.pid = helper_id, spawned.pid
        self.fds = spawned.fds
        self.exited = exited

    async def read(self, name: str, max_bytes: int) -> bytes:
        """Some bytes of an output; b"" at its end."""
        loop = asyncio.get_running_loop()
        fd = self.fds[name]
        while True:
            try:
                return os.read(fd, max_bytes)
            except BlockingIOError:
                ready = loop.create_future()
                loop.add_reader(fd, _wake, ready)
                try:
                    await ready
                finally:
                    loop.remove_reader(fd)

    async def write(self, data: bytes) -> None:
        """Give all of data to its input.

        Raises:
            BrokenPipeError: it reads no more.
        """
        loop = asyncio.get_running_loop()
        fd = self.fds["stdin"]
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                ready = loop.create_future()
                loop.add_writer(fd, _wake, ready)
                try:
                    await ready
                finally:
                    loop.remove_writer(fd)

    def grow(self, name: str) -> None:
        """Make the pipe of a stream hold more, so that each turn of the loop moves more."""
        try:
            fcntl.fcntl(self.fds[name], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # over pipe-user-pages-soft: it works with the size it has
            return

    async def finish(self) -> None:
        """Wait for the end.

        Raises:
            CopyFailed: with the archiver's reason.
        """
        message = b""
        while len(message) < _MESSAGE_MAX and (data := await self.read("stderr", _MESSAGE_MAX)):
            message += data
        told = await asyncio.shield(self.exited)  # a cancelled wait must not cancel the fact
        if os.WIFEXITED(told.status) and os.WEXITSTATUS(told.status) == 0:
            return
        text = "".join(c if c.isprintable() else " " for c in message.decode(errors="replace")).strip()
        reason, colon, rest = text.partition(": ")
        if colon and reason in _REASONS:
            raise CopyFailed(reason, rest)
        if os.WIFSIGNALED(told.status):
            # To the kernel it is one of the container's processes.
            number = os.WTERMSIG(told.status)
            cause = (
                "which may be at its memory limit"
                if number == signal.SIGKILL
                else "by a stop of it or by hand"
            )
            raise CopyFailed("io_error", f"signal {number} ended it in the container, {cause}")
        raise CopyFailed("io_error", text or f"the archiver's exit status is {os.WEXITSTATUS(told.status)}")

    def close(self) -> None:
        """Close our descriptors."""
        while self.fds:
            os.close(self.fds.popitem()[1])


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():  # cancelled in this very turn of the loop
        ready.set_result(None)


@asynccontextmanager
async def _helper(container: LinuxContainer, program: str, path: str, user: str) -> AsyncIterator[_Helper]:
    """Start the agent's tar face as user; it is killed if we leave early, and always forgotten."""
    helper_id = f"{COPY_PREFIX}{uuid.uuid4().hex}"
    exited: asyncio.Future[AgentExit] = asyncio.get_running_loop().create_future()
    container.helpers[helper_id] = exited
    helper: _Helper | None = None
    try:
        spec = ProcessSpec(path=program, id=helper_id, user=user)
        try:
            async with container.starts.begin():
                with container.group_fds(container.cgroup.leaf(None)) as cgroup_fds:
                    spawned = await container.link.spawn(
                        spec, (), cgroup_fds, bounding=None, program=program, program_path=path
                    )
                container.helper_pids.add(spawned.pid)
        except InvalidField as error:  # the agent names the fields of a spawn; the caller has sent a path
            field = "path" if error.field == "spec.dir" else error.field.removeprefix("spec.")
            raise InvalidField(field, error.problem) from error
        helper = _Helper(helper_id, spawned, exited)
        for fd in spawned.fds.values():
            os.set_blocking(fd, False)
        yield helper
    finally:
        if helper is not None:
            helper.close()
            container.helper_pids.discard(helper.pid)
        # Also when we left before the agent had answered: it may have started the helper all the same.
        await asyncio.shield(_end(container, helper_id, exited))
        container.helpers.pop(helper_id, None)
        if exited.done() and not exited.cancelled():
            exited.exception()  # seen, also when nobody waited for it


async def _end(container: LinuxContainer, helper_id: str, exited: asyncio.Future[AgentExit]) -> None:
    try:
        if not exited.done() and await container.link.signal(helper_id, signal.SIGKILL, group=True):
            await asyncio.wait([exited], timeout=_KILL_PATIENCE_S)
        await container.link.release(helper_id)
    except ContainerBroken:
        return  # its agent is gone, and the helper with it; who copies learns it from the copy


async def stream_in(container: LinuxContainer, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
    """Unpack chunks, a tar, at path; see service.ports.Backend.stream_in."""
    async with _helper(container, "tar-in", path, user) as helper:
        helper.grow("stdin")
        finishing = asyncio.ensure_future(helper.finish())
        feeding = asyncio.ensure_future(_feed(container, helper, chunks))
        try:
            # Whichever ends first: an archiver that gives up must not wait for a caller that sends no more.
            await asyncio.wait([finishing, feeding], return_when=asyncio.FIRST_COMPLETED)
            if not finishing.done():
                await feeding
            await finishing
        finally:
            for task in (feeding, finishing):
                task.cancel()
            await asyncio.gather(feeding, finishing, return_exceptions=True)


async def _feed(container: LinuxContainer, helper: _Helper, chunks: AsyncIterator[bytes]) -> None:
    try:
        async for data in chunks:
            await helper.write(data)
    except BrokenPipeError:
        return  # it has given up, and its end says why
    os.close(helper.fds.pop("stdin"))
    await container.link.close_stdin(helper.id)


async def stream_out(container: LinuxContainer, path: str, user: str) -> AsyncGenerator[bytes, None]:
    """The tar of path; see service.ports.Backend.stream_out."""
    async with _helper(container, "tar-out", path, user) as helper:
        helper.grow("stdout")
        while data := await helper.read("stdout", CHUNK_BYTES):
            yield data
        await helper.finish()
