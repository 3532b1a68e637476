"""Copying in and out. The work is done inside the container; see the backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from garden_py.model.errors import InvalidField
from garden_py.observe.metrics import Metrics, Stream
from garden_py.service.expiry import Expiry
from garden_py.service.ports import Backend
from garden_py.service.registry import Registry


class Files:
    """The verbs about files."""

    def __init__(self, backend: Backend, registry: Registry, expiry: Expiry, metrics: Metrics) -> None:
        self._metrics = metrics
        self._backend = backend
        self._registry = registry
        self._expiry = expiry

    async def stream_in(self, handle: str, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream at path as user."""
        _check_path(path)
        container = self._registry.get(handle)
        container.require_usable("copied into")
        with self._expiry.use(container):
            await self._backend.stream_in(handle, path, user, self._counted(chunks))

    async def _counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for data in chunks:
            self._metrics.streamed(Stream.FILES_IN, len(data))
            yield data

    async def stream_out(self, handle: str, path: str, user: str) -> AsyncGenerator[bytes, None]:
        """Pack path as user."""
        _check_path(path)
        container = self._registry.get(handle)
        container.require_usable("copied from")
        with self._expiry.use(container):
            async for data in self._backend.stream_out(handle, path, user):
                self._metrics.streamed(Stream.FILES_OUT, len(data))
                yield data


def _check_path(path: str) -> None:
    if not path or "\0" in path:
        raise InvalidField("path", "must not be empty or contain NUL")
