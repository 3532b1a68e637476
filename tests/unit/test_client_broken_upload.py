"""What the asyncio client makes of a server that goes away under an upload."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
import pytest

from garden_py.client import calls
from garden_py.client.aio.link import AsyncLink
from garden_py.client.errors import ServerFault, Unavailable


class BrokenStream:
    """A call whose first write fails as grpc.aio fails it: with a status in place of the server's."""

    def __init__(self, details: str) -> None:
        self._details = details

    async def write(self, request: Any) -> None:
        empty = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, empty, empty, self._details)

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize(
    ("details", "error"), [("Internal error from Core", Unavailable), ("a bug of the server's", ServerFault)]
)
async def test_upload_that_breaks_is_a_server_that_cannot_be_reached(
    details: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unavailable says: try again. INTERNAL would say that the server has a bug."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x"

    link = AsyncLink("unix:/nowhere", None, timedelta(seconds=1))
    monkeypatch.setattr(link._channel, "stream_unary", lambda *_, **__: lambda: BrokenStream(details))
    with pytest.raises(error):
        await link.upload(calls.stream_in("box", "/", ""), chunks())
    await link.close()
