"""Pulls that hang, break off, are left or killed: whoever waits is told, nothing is left, and the next one works."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.garden import text_of
from kit.gated_proxy import GatedProxy
from kit.oci_images import Layout, busybox_layer, entry, tar_layer
from kit.registry import Registry
from kit.server import ServerProcess, running_server

from garden_py.client import (
    ContainerSpec,
    ContainerState,
    FailedPrecondition,
    GardenClient,
    GardenError,
    NotFound,
    PullProgress,
    ServerFault,
    Unavailable,
)

pytestmark = pytest.mark.root
SMALL, LARGE = 2 << 20, 12 << 20


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """With an image of a small layer and a large one."""
    place = tmp_path_factory.mktemp("registry")
    noise, layout = random.Random(7), Layout(place / "layout")
    layers = [
        busybox_layer(entry("small", noise.randbytes(SMALL))),
        tar_layer(entry("large", noise.randbytes(LARGE))),
    ]
    digest = layout.add("1", layers)["layers"][0]["digest"]
    registry = Registry(place / "registry")
    registry.start()
    try:
        registry.fill(layout.reference("1"), "box:1")
        registry.small = f'"GET /v2/box/blobs/{digest}'
        yield registry
    finally:
        registry.stop()


@pytest.fixture
def slow(registry: Registry) -> Iterator[GatedProxy]:
    """Lets the small layer through, and a part of the large one."""
    with GatedProxy(registry.port, let_through=SMALL + LARGE // 4) as proxy:
        yield proxy


@pytest.fixture
def server(slow: GatedProxy) -> Iterator[ServerProcess]:
    with running_server("--insecure-registry", slow.host) as server:
        yield server


@pytest.fixture
def garden(server: ServerProcess) -> Iterator[GardenClient]:
    with GardenClient(server.address) as client:
        yield client


def image_of(slow: GatedProxy) -> str:
    return f"docker://{slow.host}/box:1"


class Attempt(threading.Thread):
    """Something that is waited for elsewhere, and how it ended."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._act = act
        self.failure: GardenError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._act()
        except GardenError as error:
            self.failure = error

    def end(self) -> GardenError | None:
        self.join(60)
        assert not self.is_alive()
        return self.failure


def wait_for(what: Callable[[], object]) -> None:
    for _ in range(400):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def children_named(server: ServerProcess, text: str) -> list[int]:
    """Processes of the server's whose command line holds a text."""
    found = []
    for entry_name in os.listdir("/proc"):
        try:
            line = (
                Path(f"/proc/{entry_name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
            stat = Path(f"/proc/{entry_name}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if text in line and stat[0] != "Z":
            found.append(int(entry_name))
    return found


def pullers(server: ServerProcess) -> list[int]:
    return children_named(server, "garden_py.backend.images.")


def is_half_way(garden: GardenClient, handle: str) -> bool:
    try:
        info = garden.container(handle).info()
    except NotFound:
        return False
    return info.state is ContainerState.CREATING and "1 of 2 layers" in info.state_reason


def staged(server: ServerProcess) -> list[Path]:
    return list((server.place / "state/images/staging").iterdir())


def test_a_create_shows_its_fetch_and_can_be_ended(
    garden: GardenClient, server: ServerProcess, slow: GatedProxy
) -> None:
    spec = ContainerSpec(handle="box", image=image_of(slow))
    attempt = Attempt(lambda: garden.create(spec))
    wait_for(lambda: is_half_way(garden, "box"))
    assert [each.handle for each in garden.list()] == []
    garden.container("box").destroy()
    assert isinstance(attempt.end(), FailedPrecondition)
    wait_for(lambda: not pullers(server))
    assert staged(server) == []
    slow.open_gate()
    with garden.create(spec) as container:
        assert text_of(container, "ls /small /large | wc -l") == "2\n"


def test_who_leaves_a_pull_ends_it(garden: GardenClient, server: ServerProcess, slow: GatedProxy) -> None:
    for news in garden.images.pulling(image_of(slow)):
        if isinstance(news, PullProgress) and news.layers_done == 1:
            break
    wait_for(lambda: not pullers(server))
    wait_for(lambda: staged(server) == [])
    assert garden.images.list() == []


def test_a_killed_puller_is_told_and_costs_nothing_else(
    garden: GardenClient, server: ServerProcess, slow: GatedProxy, registry: Registry
) -> None:
    """The layer that had come is not fetched again."""
    attempt = Attempt(lambda: garden.create(ContainerSpec(handle="box", image=image_of(slow))))
    wait_for(lambda: is_half_way(garden, "box"))
    for pid in children_named(server, "images.puller"):
        os.kill(pid, signal.SIGKILL)
    assert isinstance(attempt.end(), ServerFault)
    wait_for(lambda: not pullers(server))
    assert staged(server) == []
    slow.open_gate()
    before = registry.count(registry.small)
    with garden.create(ContainerSpec(image=image_of(slow))) as container:
        assert text_of(container, "ls /small /large | wc -l") == "2\n"
    assert registry.count(registry.small) == before > 0


def test_a_killed_unpacker_is_told(garden: GardenClient, server: ServerProcess, slow: GatedProxy) -> None:
    attempt = Attempt(lambda: garden.images.pull(image_of(slow)))
    wait_for(lambda: children_named(server, "images.unpack"))
    time.sleep(0.2)
    for pid in children_named(server, "images.unpack"):
        os.kill(pid, signal.SIGKILL)
    assert isinstance(attempt.end(), (ServerFault, Unavailable))
    wait_for(lambda: not pullers(server))
    assert staged(server) == []


def test_a_server_killed_in_a_pull_leaves_nothing(
    garden: GardenClient, server: ServerProcess, slow: GatedProxy, registry: Registry
) -> None:
    """Neither processes nor half a layer; a whole one stays, and is not fetched again."""
    attempt = Attempt(lambda: garden.create(ContainerSpec(handle="box", image=image_of(slow))))
    wait_for(lambda: is_half_way(garden, "box"))
    server.kill()
    assert isinstance(attempt.end(), Unavailable)
    wait_for(lambda: not pullers(server))
    server.start()
    assert staged(server) == []
    assert [each.handle for each in garden.list(all_states=True)] == []
    slow.open_gate()
    before = registry.count(registry.small)
    with garden.create(ContainerSpec(handle="box", image=image_of(slow))) as container:
        assert text_of(container, "ls /small /large | wc -l") == "2\n"
    assert registry.count(registry.small) == before > 0


def test_a_stopped_server_does_not_wait_for_pulls(
    garden: GardenClient, server: ServerProcess, slow: GatedProxy
) -> None:
    attempt = Attempt(lambda: garden.images.pull(image_of(slow)))
    wait_for(lambda: children_named(server, "images.unpack"))
    server.stop()
    assert attempt.end() is not None
    wait_for(lambda: not pullers(server))


def test_a_registry_that_hangs_is_given_up(slow: GatedProxy) -> None:
    with (
        running_server("--insecure-registry", slow.host, "--image-stall-s", "2") as server,
        GardenClient(server.address) as garden,
    ):
        with pytest.raises(Unavailable, match="no progress for 2 s") as caught:
            garden.create(ContainerSpec(image=image_of(slow)))
        assert caught.value.code == "IMAGE_UNREACHABLE"
        wait_for(lambda: not pullers(server))
        assert staged(server) == []


def test_a_second_pull_takes_over_what_the_first_gave_up(
    garden: GardenClient, server: ServerProcess, slow: GatedProxy
) -> None:
    """Two callers wait for one layer; the one that fetches it leaves."""
    first = garden.images.pulling(image_of(slow))
    for news in first:
        if isinstance(news, PullProgress) and news.layers_done == 1:
            break
    second = Attempt(lambda: garden.create(ContainerSpec(handle="box", image=image_of(slow))))
    wait_for(lambda: is_half_way(garden, "box"))
    first.close()  # type: ignore[attr-defined]
    slow.open_gate()
    assert second.end() is None
    garden.container("box").destroy()
