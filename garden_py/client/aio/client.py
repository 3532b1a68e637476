"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from garden_py.client import calls
from garden_py.client import values as v
from garden_py.client.address import DEFAULT_CALL_TIMEOUT, Tls
from garden_py.client.aio.container import AsyncContainer
from garden_py.client.aio.images import AsyncImages
from garden_py.client.aio.link import AsyncLink
from garden_py.client.errors import GardenError
from garden_py.client.retry import Patience, RetryPolicy


class AsyncGardenClient:
    """A connection to a garden server; make it inside a running event loop, and close it or use `async with`.

        async with AsyncGardenClient() as garden, await garden.create() as container:
            process = await container.run(["uname", "-a"])
            print((await process.output(check=True)).stdout.decode())

    Args:
        address: `unix:/path`, `/path` or `host:port`; None: GARDEN_ADDRESS, else
        unix:/run/garden/garden.sock.
        tls: files for TLS; None: plain text, meant for unix sockets and loopback.
        call_timeout: limit of a call that does not wait for something by its nature.
        retry: how hard to try to resume a stream after the connection broke.

    Attributes:
        images: what the server has to make containers of.

    Raises:
        BadAddress: address has none of these forms. (Whether a server is there is seen at the first call.)
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        tls: Tls | None = None,
        call_timeout: timedelta = DEFAULT_CALL_TIMEOUT,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._link = AsyncLink(address, tls, call_timeout)
        self._retry = retry or RetryPolicy()
        self.images = AsyncImages(self._link)

    @property
    def target(self) -> str:
        """The gRPC target in use."""
        return self._link.target

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it. Containers and processes go on. Safe twice."""
        await self._link.close()

    async def ping(self) -> str:
        """The server's version; proof that it serves."""
        return await self._link.unary(calls.ping())

    async def capacity(self) -> v.Capacity:
        """What the server can hold and what is in use."""
        return await self._link.unary(calls.capacity())

    async def check_leaks(self, *, remove: bool = False) -> Sequence[v.Leak]:
        """What differs between the server's journal and its host; takes a second if anything does.

        Args:
            remove: also remove what is surely the server's own and belongs to no container.
        """
        return await self._link.unary(calls.check_leaks(remove=remove))

    async def create(self, spec: v.ContainerSpec | None = None, *, request_id: str = "") -> AsyncContainer:
        """Make a container; returns when it can run processes. `created` of the result describes it.

        Args:
            spec: what it shall be; None: all defaults.
            request_id: a second call with the same handle and request id returns the first one's container.

        Raises:
            InvalidArgument: a field is bad.
            AlreadyExists: the handle is in use.
            ResourceExhausted: a pool of the server is empty.
        """
        info = await self._link.unary(calls.create(spec or v.ContainerSpec(), request_id))
        return AsyncContainer(self._link, info.handle, self._retry, info)

    def container(self, handle: str) -> AsyncContainer:
        """A container by its handle. Asks nobody: a handle that does not exist shows at the first verb."""
        return AsyncContainer(self._link, handle, self._retry)

    async def list(
        self, properties: Mapping[str, str] | None = None, *, all_states: bool = False
    ) -> AsyncIterator[v.ContainerInfo]:
        """Containers in order of their handles, page by page as they are asked for.

        Args:
            properties: only those that have all of these.
            all_states: also those being created or destroyed.
        """
        token = ""
        while True:
            page = await self._link.unary(
                calls.list_page(properties or {}, all_states=all_states, token=token)
            )
            for info in page.containers:
                yield info
            token = page.next_token
            if not token:
                return

    async def metrics(
        self, handles: Iterable[str] = (), processes: Iterable[tuple[str, str]] = ()
    ) -> Sequence[v.ContainerMetrics]:
        """Usage of the named containers and of processes, or of all containers, in one call.

        Args:
            handles: containers.
            processes: (handle, process id) of sidecars, and of processes with limits of their own.
        """
        return await self._link.unary(calls.metrics(handles, processes))

    async def events(
        self, handles: Sequence[str] = (), *, after_cursor: int | None = None
    ) -> AsyncIterator[v.Event]:
        """What happens from now on, or after a cursor.

        The first event is WATCHING: from then on none is missed. Goes on by itself after a broken
        connection, without a gap.

        Raises:
            OutOfRange: events after the cursor are no longer kept.
        """
        patience = Patience(self._retry)
        while True:
            try:
                async for event in self._link.answers(calls.watch_events(handles, after_cursor)):
                    patience.restore()
                    resumed = event.kind is v.EventKind.WATCHING and after_cursor is not None
                    after_cursor = event.cursor
                    if not resumed:
                        yield event
                return
            except GardenError as error:
                if after_cursor is None:
                    raise  # never connected: that is an answer, not a break
                await asyncio.sleep(patience.next_delay_s(error))
