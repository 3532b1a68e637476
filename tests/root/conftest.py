"""What tests on a real server share: a client, and a container that is gone after the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from garden_image import garden_http, garden_http_server
from kit.garden import open_stub
from kit.server import ServerProcess

from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import Container, GardenClient


@pytest.fixture(scope="module")
def garden(garden_server: ServerProcess) -> Iterator[GardenClient]:
    """A client of the module's server."""
    with GardenClient(garden_server.address) as client:
        yield client


@pytest.fixture(scope="module")
def stub(garden_server: ServerProcess) -> Iterator[garden_pb2_grpc.GardenStub]:
    """The generated stub, for requests that the client would not make."""
    with open_stub(garden_server.address) as stub:
        yield stub


@pytest.fixture
def box(garden: GardenClient) -> Iterator[Container]:
    """A fresh default container."""
    with garden.create() as container:
        yield container


@pytest.fixture(scope="module")
def shared_box(garden: GardenClient) -> Iterator[Container]:
    """A default container for tests that leave nothing behind in it."""
    with garden.create() as container:
        yield container


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test marked `garden_only` is not run over gRPC; the mark says why."""
    garden_only = [item for item in items if item.get_closest_marker("garden_only") and _is_over_grpc(item)]
    config.hook.pytest_deselected(items=garden_only)
    items[:] = [item for item in items if item not in garden_only]


def _is_over_grpc(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("garden") == "grpc"


__all__ = ["garden_http", "garden_http_server"]  # fixtures of the Garden door
