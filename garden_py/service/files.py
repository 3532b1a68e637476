"""Copying in and out. The work is done inside the container; see the backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from garden_py.model.errors import InvalidField
from garden_py.service.expiry import Expiry
from garden_py.service.ports import Backend
from garden_py.service.registry import Registry


class Files:
    """The verbs about files."""

    def __init__(self, backend: Backend, registry: Registry, expiry: Expiry) -> None:
        self._backend = backend
        self._registry = registry
        self._expiry = expiry

    async def stream_in(self, handle: str, path: str, user: str, chunks: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream at path as user."""
        _check_path(path)
        container = self._registry.get(handle)
        container.require_usable("copied into")
        with self._expiry.use(container):
            await self._backend.stream_in(handle, path, user, chunks)

    async def stream_out(self, handle: str, path: str, user: str) -> AsyncGenerator[bytes, None]:
        """Pack path as user."""
        _check_path(path)
        container = self._registry.get(handle)
        container.require_usable("copied from")
        with self._expiry.use(container):
            async for data in self._backend.stream_out(handle, path, user):
                yield data


def _check_path(path: str) -> None:
    if not path or "\0" in path:
        raise InvalidField("path", "must not be empty or contain NUL")
