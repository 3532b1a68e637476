"""The rules about images, on a backend in memory: what a create that fetches shows, and who may end it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from kit.core import Server
from kit.virtual_clock import in_virtual_time, settle

from garden_py.model import errors
from garden_py.model.image import ImageInfo, PullProgress, RegistryAuth
from garden_py.model.lifecycle import State
from garden_py.model.spec import ContainerSpec

IMAGE = "docker://h.example/app:1"
AUTH = RegistryAuth("me", "geheim")


@pytest.fixture
def server() -> Server:
    return Server()


@in_virtual_time
async def test_a_create_that_fetches_says_how_it_gets_on(server: Server) -> None:
    core = await server.start()
    server.backend.images.gate.clear()
    creating = asyncio.ensure_future(core.containers.create(ContainerSpec("box", IMAGE, image_auth=AUTH)))
    await settle()
    container = core.containers.get_or_fetching("box")
    assert container.state is State.CREATING
    assert container.fetching == "pulling image: 1 of 2 layers, 40 of 100 bytes"
    server.backend.images.gate.set()
    made = await creating
    assert (made.state, made.fetching) == (State.ACTIVE, "")
    used = core.containers.used_image("box")
    assert used is not None
    assert used.name == IMAGE


@in_virtual_time
async def test_the_password_reaches_the_fetch_and_nothing_else(server: Server) -> None:
    core = await server.start()
    made = await core.containers.create(ContainerSpec("box", IMAGE, image_auth=AUTH))
    assert server.backend.images.auths == [AUTH]
    assert made.spec.image_auth is None
    assert "geheim" not in str(server.journal.containers())


@in_virtual_time
async def test_destroy_ends_a_fetch(server: Server) -> None:
    """It may take minutes, and nothing has been made yet."""
    core = await server.start()
    server.backend.images.gate.clear()
    creating = asyncio.ensure_future(core.containers.create(ContainerSpec("box", IMAGE)))
    await settle()
    await core.containers.destroy("box")
    with pytest.raises(errors.ContainerBusy, match="being destroyed"):
        await creating
    with pytest.raises(errors.ContainerNotFound):
        core.containers.get("box")
    assert server.journal.containers() == []
    server.backend.images.gate.set()
    assert (await core.containers.create(ContainerSpec("box", IMAGE))).state is State.ACTIVE


@in_virtual_time
async def test_destroy_waits_for_a_create_that_has_begun_to_make(server: Server) -> None:
    core = await server.start()
    server.backend.create_gate.clear()
    creating = asyncio.ensure_future(core.containers.create(ContainerSpec("box", IMAGE)))
    await settle()
    destroying = asyncio.ensure_future(core.containers.destroy("box"))
    await settle()
    assert not destroying.done()
    server.backend.create_gate.set()
    await creating
    await destroying
    with pytest.raises(errors.ContainerNotFound):
        core.containers.get("box")


@in_virtual_time
async def test_a_fetch_that_fails_leaves_the_handle_free(server: Server) -> None:
    core = await server.start()
    server.backend.images.failure = errors.ImageUnreachable(IMAGE, "no route")
    with pytest.raises(errors.ImageUnreachable):
        await core.containers.create(ContainerSpec("box", IMAGE))
    assert server.journal.containers() == []
    assert (await core.containers.create(ContainerSpec("box", IMAGE))).state is State.ACTIVE


@in_virtual_time
async def test_a_pull_tells_of_itself_and_ends_with_the_image(server: Server) -> None:
    core = await server.start()
    news = [each async for each in core.images.pull(IMAGE, None)]
    assert isinstance(news[-1], ImageInfo)
    assert news[-1].names == (IMAGE,)
    assert all(isinstance(each, PullProgress) for each in news[:-1])


@in_virtual_time
async def test_who_leaves_a_pull_ends_it(server: Server) -> None:
    core = await server.start()
    server.backend.images.gate.clear()
    pull = core.images.pull(IMAGE, None)
    assert isinstance(await anext(pull), PullProgress)
    await pull.aclose()
    assert core.images.list_images() == []


@in_virtual_time
async def test_references_are_checked_before_anything_is_done(server: Server) -> None:
    core = await server.start()
    with pytest.raises(errors.InvalidField, match="repository"):
        await anext(core.images.pull("docker:///Upper", None))
    with pytest.raises(errors.InvalidField, match="name"):
        await core.images.import_image("UPPER", _chunks())
    with pytest.raises(errors.InvalidField, match="id is the server's"):
        await core.images.import_image("sha256:" + "a" * 64, _chunks())
    assert server.backend.images.auths == []


async def _chunks() -> AsyncIterator[bytes]:
    yield b"tar"


@in_virtual_time
async def test_names_are_looked_up_in_any_form(server: Server) -> None:
    core = await server.start()
    image = await core.images.import_image("tool", _chunks())
    assert image.names == ("store:tool:latest",)
    for text in ("store:tool", "store:tool:latest", image.id, f"store:{image.id}"):
        assert core.images.inspect(text).id == image.id
    with pytest.raises(errors.ImageUnknown):
        core.images.inspect("nothing")


@in_virtual_time
async def test_images_are_counted_for_prometheus(server: Server) -> None:
    core = await server.start()
    await core.containers.create(ContainerSpec("box", IMAGE))
    await core.images.import_image("tool", _chunks())
    lines = core.metrics.render().decode().splitlines()
    assert 'garden_images{use="used"} 1.0' in lines
    assert 'garden_images{use="unused"} 1.0' in lines
    assert 'garden_image_bytes{use="unused"} 4096.0' in lines


@in_virtual_time
async def test_an_image_in_use_stays(server: Server) -> None:
    core = await server.start()
    await core.containers.create(ContainerSpec("box", IMAGE))
    with pytest.raises(errors.ImageInUse):
        core.images.remove(IMAGE)
    assert core.images.prune(named=True) == ([], 0)
