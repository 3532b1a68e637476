"""What registries ask for and give: Bearer tokens, TLS with a CA of their own, Docker's manifests, indexes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import text_of
from kit.oci_images import OCI, Layout, busybox_layer, entry
from kit.registry import Registry
from kit.server import running_server

from garden_py.client import ContainerSpec, GardenClient, PermissionDenied, RegistryAuth, Unavailable

pytestmark = pytest.mark.root
AUTH = RegistryAuth("me", "geheim")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("images") / "layout")
    layout.add("1", [busybox_layer(entry("content", b"amd64"))], config={"Env": ["OF=image"]})
    return layout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def test_bearer_tokens(layout: Layout, place: Path) -> None:
    """The registry sends whoever comes to a token server, which takes the user and password."""
    registry = Registry(place, {"me": "geheim"}, challenge="bearer")
    registry.start()
    try:
        image = registry.fill(layout.reference("1"), "box:1")
        with (
            running_server("--insecure-registry", registry.host) as server,
            GardenClient(server.address) as garden,
        ):
            for auth in (None, RegistryAuth("me", "wrong")):
                with pytest.raises(PermissionDenied) as caught:
                    garden.create(ContainerSpec(image=image, image_auth=auth))
                assert caught.value.code == "IMAGE_ACCESS_DENIED"
            with garden.create(ContainerSpec(image=image, image_auth=AUTH)) as container:
                assert text_of(container, "cat /content") == "amd64"
    finally:
        registry.stop()


def test_tls_with_a_certificate_that_the_settings_name(layout: Layout, place: Path, tmp_path: Path) -> None:
    """And not without: an unknown certificate is refused, and no password is sent to it."""
    registry = Registry(place, {"me": "geheim"}, tls=True)
    registry.start()
    try:
        image = registry.fill(layout.reference("1"), "box:1")
        file = tmp_path / "garden.toml"
        for settings, trusted in (
            ("", False),
            (f'[registry."{registry.host}"]\nca = "{registry.certificate}"\n', True),
        ):
            file.write_text(settings)
            with running_server("--config", str(file)) as server, GardenClient(server.address) as garden:
                spec = ContainerSpec(image=image, image_auth=AUTH)
                if trusted:
                    with garden.create(spec) as container:
                        assert text_of(container, "cat /content") == "amd64"
                else:
                    before = registry.count('"GET /v2/')
                    with pytest.raises(Unavailable, match="certificate"):
                        garden.create(spec)
                    assert registry.count('"GET /v2/') == before
    finally:
        registry.stop()


@pytest.fixture(scope="module")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("registry") / "open")
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture(scope="module")
def garden(open_registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GardenClient]:
    with (
        running_server(
            "--insecure-registry", open_registry.host, "--docker-registry", open_registry.host
        ) as server,
        GardenClient(server.address) as client,
    ):
        yield client


def test_manifests_of_docker(garden: GardenClient, open_registry: Registry, layout: Layout) -> None:
    """Schema 2, as `docker push` writes it, with its own media types."""
    image = open_registry.fill(layout.reference("1"), "docker:1", "--format", "v2s2")
    with garden.create(ContainerSpec(image=image)) as container:
        assert text_of(container, "cat /content; echo $OF") == "amd64image\n"


def test_an_index_gives_this_machines_platform(
    garden: GardenClient, open_registry: Registry, tmp_path: Path
) -> None:
    layout, entries = Layout(tmp_path / "layout"), []
    for architecture in ("s390x", "amd64", "arm64"):
        manifest = layout.add(
            architecture, [busybox_layer(entry("content", architecture.encode()))], architecture=architecture
        )
        stored = layout.put(json.dumps(manifest).encode(), f"{OCI}.manifest.v1+json")
        entries.append({**stored, "platform": {"architecture": architecture, "os": "linux"}})
    index = {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": entries}
    layout.tag("all", layout.put(json.dumps(index).encode(), f"{OCI}.index.v1+json"))
    image = open_registry.fill(layout.reference("all"), "index:1", "--multi-arch", "all")
    for reference in (image, layout.reference("all")):
        with garden.create(ContainerSpec(image=reference)) as container:
            assert text_of(container, "cat /content") == "amd64"


def test_another_registry_stands_for_docker_hub(
    garden: GardenClient, open_registry: Registry, layout: Layout
) -> None:
    open_registry.fill(layout.reference("1"), "library/hub:1")
    with garden.create(ContainerSpec(image="docker:///hub#1")) as container:
        assert text_of(container, "cat /content") == "amd64"


def test_a_tag_that_moves_is_followed(garden: GardenClient, open_registry: Registry, tmp_path: Path) -> None:
    """A registry is asked at every create; containers of the former image go on as they are."""
    layout, image = Layout(tmp_path / "layout"), ""
    made = []
    for content in ("first", "second"):
        layout.add("t", [busybox_layer(entry("content", content.encode()))])
        image = open_registry.fill(layout.reference("t"), "moves:1")
        made.append(garden.create(ContainerSpec(image=image)))
    assert [text_of(container, "cat /content") for container in made] == ["first", "second"]
    for container in made:
        container.destroy()
    assert len(garden.images.prune().ids) >= 1
    assert garden.images.inspect(image).names == (image,)
