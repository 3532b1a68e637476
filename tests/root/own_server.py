"""Fixtures for tests that restart their server, or look at what it leaves: one of each test's own, and its client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import GardenClient


@pytest.fixture(name="server")
def own_server(no_trace: None) -> Iterator[ServerProcess]:
    """A server of the test's own, on a disk."""
    before = snapshot()
    with running_server() as server:
        yield server
    assert_no_trace(before)


@pytest.fixture(name="garden")
def own_garden(server: ServerProcess) -> Iterator[GardenClient]:
    """A client of it."""
    with GardenClient(server.address) as client:
        yield client
