"""Containers of images that people really use: from layouts, archives, tars and a real registry."""

from __future__ import annotations

import json
import random
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kit.garden import text_of
from kit.oci_images import Layout, busybox_layer, entry, hard_link, link, tar_layer
from kit.registry import Registry
from kit.server import ServerProcess, running_server

from garden_py.client import (
    BindMount,
    Container,
    ContainerSpec,
    ContainerState,
    FailedPrecondition,
    GardenClient,
    GardenError,
    ImageInfo,
    InvalidArgument,
    MountMode,
    MountOrigin,
    NotFound,
    PermissionDenied,
    ProcessSpec,
    PullProgress,
    RegistryAuth,
    ResourceExhausted,
    Sidecar,
    Unavailable,
)

pytestmark = pytest.mark.root
USERS = {"me": "geheim"}
AUTH = RegistryAuth("me", "geheim")
CONFIG = {
    "Env": ["PATH=/bin:/from-image", "FROM=image", "BOTH=image"],
    "User": "alice",
    "WorkingDir": "/srv/app",
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["echo of the image; id -un; pwd"],
    "Labels": {"org.example.who": "test"},
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Several images: one of one layer, one of three with whiteouts, and each compression."""
    layout = Layout(tmp_path_factory.mktemp("images") / "layout")
    base = busybox_layer(
        entry("opt"), entry("opt/kept", b"kept"), entry("opt/hidden", b"hidden"),
        entry("opaque"), entry("opaque/old", b"old"),
        entry("setuid", b"x", mode=0o4755, uid=7, gid=8), entry("high", b"x", uid=60_000, gid=60_001),
        hard_link("opt/same", "opt/kept"), entry(".dot", b"."), entry("ü", b"name"),
    )  # fmt: skip
    upper = tar_layer(
        entry("opt"), entry("opt/.wh.hidden", b""), entry("opaque"), entry("opaque/.wh..wh..opq", b""),
        entry("opaque/new", b"new"), entry("null", None, type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        link("to-opt", "opt/kept"), entry("srv"), entry("srv/app", uid=1001, gid=1010),
    )  # fmt: skip
    top = tar_layer(entry("top", b"top"))
    layout.add("one", [base])
    layout.add("app", [base, upper, top], config=CONFIG)
    layout.add("zstd", [base, top], compress="zstd")
    layout.add("plain", [base, top], compress="none")
    layout.add("twice", [base, top, top])
    return layout


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, layout: Layout) -> Iterator[Registry]:
    """An open registry that holds the layout's images as repository `box` by tag."""
    yield from _filled(tmp_path_factory.mktemp("registry") / "open", layout, None)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, layout: Layout) -> Iterator[Registry]:
    """A registry that wants a password."""
    yield from _filled(tmp_path_factory.mktemp("registry") / "locked", layout, USERS)


def _filled(directory: Path, layout: Layout, users: dict[str, str] | None) -> Iterator[Registry]:
    registry = Registry(directory, users)
    registry.start()
    try:
        for tag in ("one", "app"):
            registry.fill(layout.reference(tag), f"box:{tag}")
        yield registry
    finally:
        registry.stop()


@pytest.fixture(scope="module")
def server(
    registry: Registry, locked: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that knows both registries as plain HTTP, and `locked` as the mirror of one that is not there."""
    file = tmp_path_factory.mktemp("config") / "garden.toml"
    file.write_text(
        f'insecure_registry = ["{registry.host}", "{locked.host}"]\n'
        f'[registry."gone.example:1"]\nmirrors = ["127.0.0.1:9/none", "{locked.host}"]\n'
    )
    with running_server("--config", str(file)) as server:
        yield server


@pytest.fixture(scope="module")
def garden(server: ServerProcess) -> Iterator[GardenClient]:
    with GardenClient(server.address) as client:
        yield client


def made_of(garden: GardenClient, image: str, **fields: Any) -> Container:
    return garden.create(ContainerSpec(image=image, **fields))


def layers_on_disk(server: ServerProcess) -> set[str]:
    return {path.name for path in (server.place / "state/images/layers").iterdir()}


# --- what a container of an image shows


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_layers_show_as_the_image_means_them(garden: GardenClient, layout: Layout, privileged: bool) -> None:
    """Whiteouts, opaque directories, links, owners, modes and devices (statements M5, M7, M8)."""
    with made_of(garden, layout.reference("app"), privileged=privileged) as container:
        assert (
            text_of(container, "ls /opt; ls -A /opaque; cat /to-opt /top /ü /.dot")
            == "kept\nsame\nnew\nkepttopname."
        )
        assert text_of(container, "test -e /null || echo gone") == "gone\n"
        assert text_of(container, "stat -c %a:%u:%g /setuid /high /tmp /root /home/alice") == (
            "4755:7:8\n644:60000:60001\n1777:0:0\n700:0:0\n755:1001:1010\n"
        )
        assert text_of(container, "stat -c %i /opt/kept") == text_of(container, "stat -c %i /opt/same")
        assert text_of(container, "stat -c %Y /top") == "1000000000\n"
        text_of(container, "touch /home/alice/mine; echo x > /opt/kept", user="root")
        assert text_of(container, "cd; touch own; stat -c %U own", user="alice") == "alice\n"


@pytest.mark.parametrize("tag", ["one", "zstd", "plain", "twice"])
def test_every_compression_and_a_layer_that_is_there_twice(
    garden: GardenClient, layout: Layout, tag: str
) -> None:
    with made_of(garden, layout.reference(tag)) as container:
        assert text_of(container, "cat /opt/kept") == "kept"


def test_what_is_written_stays_with_the_container(garden: GardenClient, layout: Layout) -> None:
    """Statement M9: two containers of one image share its layers and nothing they write."""
    with made_of(garden, layout.reference("app")) as one, made_of(garden, layout.reference("app")) as other:
        text_of(one, "echo changed > /top; rm /opt/kept")
        assert text_of(other, "cat /top /opt/kept") == "topkept"


def test_environment_of_the_image_comes_first(garden: GardenClient, layout: Layout) -> None:
    """Statement E1: the container's and the process's entries win; M4: PATH is the image's."""
    with made_of(garden, layout.reference("app"), env={"BOTH": "container", "MINE": "1"}) as container:
        process = container.run(ProcessSpec("env", env={"MINE": "2"}))
        found = dict(line.split("=", 1) for line in process.output().stdout.decode().splitlines())
        assert (found["FROM"], found["BOTH"], found["MINE"]) == ("image", "container", "2")
        assert found["PATH"] == "/bin:/from-image"


def test_a_process_may_be_what_the_image_says(garden: GardenClient, layout: Layout) -> None:
    """Entrypoint, command, user and directory; each may be stated otherwise."""
    with made_of(garden, layout.reference("app")) as container:
        run = container.run(ProcessSpec("", from_image=True)).output(check=True)
        assert run.stdout == b"of the image\nalice\n/srv/app\n"
        run = container.run(ProcessSpec("", ("id -un; pwd",), user="root", dir="/", from_image=True)).output()
        assert run.stdout == b"root\n/\n"
    with (
        made_of(garden, layout.reference("one")) as container,
        pytest.raises(InvalidArgument, match="entrypoint"),
    ):
        container.run(ProcessSpec("", from_image=True))


def test_info_tells_of_the_image(garden: GardenClient, layout: Layout) -> None:
    with made_of(garden, layout.reference("app")) as container:
        image = container.info().image
        assert image is not None
        assert (image.name, image.config.labels) == (layout.reference("app"), {"org.example.who": "test"})
        assert garden.images.inspect(image.id).in_use == 1
    with garden.create() as container:
        assert container.info().image is None


def test_a_sidecar_has_an_image_too(garden: GardenClient, locked: Registry) -> None:
    """With its environment, password and command; the layers go when it has gone."""
    reference = f"docker://{locked.host}/box:app"
    with garden.create() as container:
        with pytest.raises(PermissionDenied):
            container.run(ProcessSpec("true", sidecar=Sidecar(reference)))
        spec = ProcessSpec("", from_image=True, id="side", sidecar=Sidecar(reference, image_auth=AUTH))
        assert container.run(spec).output(check=True).stdout == b"of the image\nalice\n/srv/app\n"
        spec = ProcessSpec("sleep", ("60",), sidecar=Sidecar(reference, image_auth=AUTH))
        container.run(spec)
        assert garden.images.inspect(reference).in_use >= 1
    assert wait_until(lambda: garden.images.inspect(reference).in_use == 0)


def wait_until(true: Any) -> bool:
    for _ in range(200):
        if true():
            return True
        time.sleep(0.05)
    return False


# --- bind mounts of the image's own files


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_a_part_of_the_image_at_another_place(
    garden: GardenClient, layout: Layout, tmp_path: Path, privileged: bool
) -> None:
    """Read-only where the original can be written; links are followed within the root."""
    own = Layout(tmp_path / "layout")
    own.add(
        "1",
        [
            busybox_layer(
                entry("opt"), entry("opt/f", b"x"), link("out", f"../../..{tmp_path}"), link("in", "/opt")
            )
        ],
    )
    mounts = (
        BindMount("/opt", "/ro", origin=MountOrigin.CONTAINER),
        BindMount("/in/f", "/file", MountMode.READ_WRITE, MountOrigin.CONTAINER),
    )
    with made_of(garden, own.reference("1"), bind_mounts=mounts, privileged=privileged) as container:
        assert (
            text_of(container, "cat /ro/f; echo y >/file; cat /opt/f /ro/f; stat -c %u /ro") == "xy\ny\n0\n"
        )
        assert text_of(container, "touch /ro/new 2>/dev/null || echo refused; touch /opt/new; ls /ro") == (
            "refused\nf\nnew\n"
        )
    for source in ("/nothing", "/out"):
        mount = BindMount(source, "/there", origin=MountOrigin.CONTAINER)
        with pytest.raises(InvalidArgument) as caught:
            made_of(garden, own.reference("1"), bind_mounts=(mount,), privileged=privileged)
        assert caught.value.fields[0].field == "spec.bind_mounts[0].source"


# --- places


def test_archives_and_tars(garden: GardenClient, layout: Layout, tmp_path: Path) -> None:
    """Each form of reference in the file system (statement M2), and a tar that changes is read again."""
    for kind in ("oci-archive", "docker-archive"):
        file = tmp_path / f"{kind}.tar"
        target = f"{kind}:{file}:app" if kind == "oci-archive" else f"{kind}:{file}:box/app:1"
        subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout.directory}:app", target],
            check=True, capture_output=True,
        )  # fmt: skip
        with made_of(garden, f"{kind}://{file}") as container:
            assert text_of(container, "cat /top; ls /opt") == "topkept\nsame\n"
    bare = tmp_path / "root.tar"
    for content in (b"first", b"second"):
        bare.write_bytes(busybox_layer(entry("content", content)))
        with made_of(garden, str(bare)) as container:
            assert text_of(container, "cat /content") == content.decode()


def test_a_changed_layout_is_read_again(garden: GardenClient, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    for content in (b"first", b"second"):
        layout.add("t", [busybox_layer(entry("content", content))])
        with made_of(garden, layout.reference("t")) as container:
            assert text_of(container, "cat /content") == content.decode()


def test_import_makes_an_image_of_a_tar(garden: GardenClient) -> None:
    image = garden.images.import_tar("tool:1", [busybox_layer(entry("content", b"x"))])
    assert image.names == ("store:tool:1",)
    for reference in ("store:tool:1", f"store:{image.id}"):
        with made_of(garden, reference) as container:
            assert text_of(container, "cat /content") == "x"
    garden.images.remove("store:tool:1")
    with pytest.raises(NotFound):
        made_of(garden, "store:tool:1")
    with pytest.raises(FailedPrecondition):
        garden.images.import_tar("broken", [b"this is no tar, but long enough to be looked at " * 100])


# --- a registry


def test_a_registry_by_tag_and_by_digest(garden: GardenClient, registry: Registry) -> None:
    image = garden.images.pull(f"docker://{registry.host}/box:app")
    assert image.manifest_digest.startswith("sha256:")
    for reference in ("box#app", "box:app", f"box@{image.manifest_digest}"):
        with made_of(garden, f"docker://{registry.host}/{reference}") as container:
            assert text_of(container, "cat /top") == "top"
    with made_of(garden, f"docker://{registry.host}/box:one") as container:
        assert text_of(container, "test -e /top || echo none") == "none\n"


def test_a_pull_tells_how_it_gets_on(garden: GardenClient, registry: Registry, layout: Layout) -> None:
    registry.fill(layout.reference("app"), "progress:1")
    garden.images.prune(named=True)
    news = list(garden.images.pulling(f"docker://{registry.host}/progress:1"))
    assert isinstance(news[-1], ImageInfo)
    progress = [each for each in news[:-1] if isinstance(each, PullProgress)]
    assert progress[-1].layers == progress[-1].layers_done == 3
    assert progress[-1].bytes == progress[-1].bytes_done > 500_000
    again = list(garden.images.pulling(f"docker://{registry.host}/progress:1"))
    assert isinstance(again[-2], PullProgress)
    assert again[-2].bytes == 0, "nothing is fetched twice"


def test_one_of_several_has_to_be_named(garden: GardenClient, layout: Layout, tmp_path: Path) -> None:
    """An image that nobody can choose is no registry that cannot be reached: trying again is of no use."""
    archive, saved = tmp_path / "layout.tar", tmp_path / "saved.tar"
    subprocess.run(["tar", "-C", layout.directory, "-cf", archive, "."], check=True)
    image = {"Config": "config.json", "Layers": ["layer.tar"]}
    manifest = json.dumps([{**image, "RepoTags": [f"a/b:{tag}"]} for tag in (1, 2)])
    saved.write_bytes(tar_layer(entry("manifest.json", manifest.encode()), entry("config.json", b"{}")))
    for image in (f"oci://{layout.directory}", f"oci-archive://{archive}", f"docker-archive://{saved}"):
        with pytest.raises(InvalidArgument, match="holds several images") as caught:
            made_of(garden, image)
        assert caught.value.fields[0].field == "spec.image"


def test_what_is_not_there_is_the_callers_mistake(
    garden: GardenClient, registry: Registry, tmp_path: Path
) -> None:
    for image in (
        f"docker://{registry.host}/nothing:1",
        f"docker://{registry.host}/box:nothing",
        f"docker://{registry.host}/box@sha256:{'0' * 64}",
        f"oci://{tmp_path}/nothing:1",
        f"docker-archive://{tmp_path}/nothing.tar",
        f"{tmp_path}/nothing",
    ):
        with pytest.raises(InvalidArgument) as caught:
            made_of(garden, image)
        assert caught.value.code == "IMAGE_NOT_FOUND", image
        assert caught.value.fields[0].field == "spec.image"


def test_a_registry_that_is_not_there_is_unreachable(garden: GardenClient) -> None:
    with pytest.raises(Unavailable) as caught:
        made_of(garden, "docker://127.0.0.1:9/box:1")
    assert caught.value.code == "IMAGE_UNREACHABLE"


def test_plain_http_only_where_it_is_allowed(garden: GardenClient, registry: Registry) -> None:
    """The same registry under a name that the settings do not have."""
    with pytest.raises(Unavailable):
        made_of(garden, f"docker://localhost:{registry.port}/box:one")


def test_a_password_opens_what_is_locked_and_only_for_who_has_it(
    garden: GardenClient, locked: Registry
) -> None:
    """Statement M3. What one caller has fetched does not open it for another."""
    image = f"docker://{locked.host}/box:one"
    for auth in (None, RegistryAuth("me", "wrong"), RegistryAuth("you", "geheim")):
        with pytest.raises(PermissionDenied) as caught:
            made_of(garden, image, image_auth=auth)
        assert caught.value.code == "IMAGE_ACCESS_DENIED"
    with made_of(garden, image, image_auth=AUTH) as container:
        assert text_of(container, "cat /opt/kept") == "kept"
        with pytest.raises(PermissionDenied):
            made_of(garden, image)


def test_the_password_reaches_a_mirror(garden: GardenClient, locked: Registry, server: ServerProcess) -> None:
    """gone.example is nowhere; of its mirrors the first is not there and the second wants the password."""
    with made_of(garden, "docker://gone.example:1/box:one", image_auth=AUTH) as container:
        assert text_of(container, "cat /opt/kept") == "kept"


def test_the_password_is_written_nowhere(
    garden: GardenClient, locked: Registry, server: ServerProcess
) -> None:
    with made_of(garden, f"docker://{locked.host}/box:app", image_auth=AUTH) as container:
        container.run(["true"]).output()
        found = subprocess.run(
            ["grep", "-rlF", "geheim", str(server.place)], capture_output=True, text=True, check=False
        )
        assert found.stdout == ""


def test_concurrent_pulls_fetch_a_layer_once(
    garden: GardenClient, registry: Registry, server: ServerProcess, layout: Layout
) -> None:
    registry.fill(layout.reference("app"), "together:1")
    registry.fill(layout.reference("app"), "together:2")
    garden.images.prune(named=True)
    before = registry.count('"GET /v2/together/blobs/')
    failures: list[GardenError] = []

    def create(tag: int) -> None:
        try:
            made_of(garden, f"docker://{registry.host}/together:{tag}").destroy()
        except GardenError as error:
            failures.append(error)

    threads = [threading.Thread(target=create, args=(1 + number % 2,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    configs, layers = 6, 3
    assert registry.count('"GET /v2/together/blobs/') - before == configs + layers


def test_a_registry_that_dies_in_the_middle(
    garden: GardenClient, server: ServerProcess, layout: Layout, tmp_path: Path
) -> None:
    """A typed error, nothing half unpacked; and then it works."""
    registry = Registry(tmp_path / "dying")
    registry.start()
    try:
        big = Layout(tmp_path / "big")
        noise = random.Random(1).randbytes(40 << 20)
        big.add("1", [busybox_layer(entry("noise", noise))])
        registry.fill(big.reference("1"), "big:1")
    finally:
        registry.stop()
    with pytest.raises((Unavailable, InvalidArgument)):
        made_of(garden, f"docker://{registry.host}/big:1")
    assert list((server.place / "state/images/staging").iterdir()) == []


def test_a_layer_may_hide_all_that_is_below_it(garden: GardenClient, tmp_path: Path) -> None:
    """An opaque whiteout in its root, which overlayfs would not look at."""
    layout = Layout(tmp_path / "layout")
    hiding = busybox_layer(entry(".wh..wh..opq", b""), entry("new", b"new"))
    layout.add("1", [busybox_layer(entry("old", b"old")), hiding, tar_layer(entry("top", b"top"))])
    with made_of(garden, layout.reference("1")) as container:
        assert text_of(container, "ls -d /old /new /top 2>/dev/null || true") == "/new\n/top\n"


# --- bad images


def bad(layout: Layout, tag: str, what: str) -> str:
    """An image with something wrong in it; its reference."""
    layer = busybox_layer(entry("data", bytes(100_000)))
    manifest = layout.add(tag, [layer])
    blob = layout.blob(manifest["layers"][0])
    match what:
        case "truncated":
            blob.write_bytes(blob.read_bytes()[:-1000])
        case "changed":
            blob.write_bytes(blob.read_bytes()[:-4] + b"xxxx")
        case "diff id":
            layout.add(tag, [layer], diff_ids=["sha256:" + "0" * 64])
        case "no tar":
            layout.add(tag, [b"not a tar " * 1000])
        case "more diff ids":
            layout.add(tag, [layer], diff_ids=["sha256:" + "0" * 64] * 2)
        case "no manifest":
            layout.tag(tag, layout.put(b"[]", "application/vnd.oci.image.manifest.v1+json"))
    return layout.reference(tag)


@pytest.mark.parametrize(
    "what", ["truncated", "changed", "diff id", "no tar", "more diff ids", "no manifest"]
)
def test_what_is_no_image_is_refused_and_leaves_nothing(
    garden: GardenClient, server: ServerProcess, tmp_path: Path, what: str
) -> None:
    before = layers_on_disk(server)
    with pytest.raises((FailedPrecondition, Unavailable)) as caught:
        made_of(garden, bad(Layout(tmp_path / "layout"), "bad", what))
    assert caught.value.code == "IMAGE_INVALID", caught.value
    assert layers_on_disk(server) == before
    assert list((server.place / "state/images/staging").iterdir()) == []


@pytest.mark.parametrize("what", ["dev", "proc", "sys", "etc"])
@pytest.mark.parametrize("as_sidecar", [False, True], ids=["container", "sidecar"])
def test_links_in_the_way_of_the_runtime_are_refused(
    garden: GardenClient, tmp_path: Path, what: str, as_sidecar: bool
) -> None:
    """The runtime would mount where they lead to; and as a file it could not mount at all."""
    layout, canary = Layout(tmp_path / "layout"), tmp_path / "canary"
    canary.mkdir()
    for tag, member in (("link", link(what, f"../../../..{canary}")), ("file", entry(what, b"x"))):
        layout.add(tag, [busybox_layer(), tar_layer(member)])
        spec = ProcessSpec("true", sidecar=Sidecar(layout.reference(tag)))
        start = (
            partial(garden.create().run, spec)
            if as_sidecar
            else partial(made_of, garden, layout.reference(tag))
        )
        with pytest.raises(FailedPrecondition, match=f"its /{what} is") as caught:
            start()
        assert caught.value.code == "IMAGE_INVALID"
    assert list(canary.iterdir()) == []


@pytest.mark.parametrize("name", ["etc/hosts", "etc/resolv.conf"])
def test_what_a_file_cannot_be_mounted_over_is_refused(
    garden: GardenClient, tmp_path: Path, name: str
) -> None:
    layout = Layout(tmp_path / "layout")
    members = {"loop": [link(name, "round"), link("etc/round", f"../{name}")], "directory": [entry(name)]}
    for tag, found in members.items():
        layout.add(tag, [busybox_layer(), tar_layer(*found)])
        with pytest.raises(FailedPrecondition, match=f"its /{name}") as caught:
            made_of(garden, layout.reference(tag))
        assert caught.value.code == "IMAGE_INVALID"


def test_links_that_images_do_have(garden: GardenClient, tmp_path: Path) -> None:
    """resolv.conf and hosts as links, also out of the root: they are followed within it."""
    layout, canary = Layout(tmp_path / "layout"), tmp_path / "canary"
    canary.mkdir()
    top = tar_layer(
        link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
        link("etc/hosts", f"../../../../..{canary}/hosts"),
        link("tmp", "/var/tmp"),
    )
    layout.add("links", [busybox_layer(), top])
    with made_of(garden, layout.reference("links")) as container:
        assert "nameserver" in text_of(container, "cat /etc/resolv.conf")
        assert container.handle[-12:] in text_of(container, "cat /etc/hosts")
    assert list(canary.iterdir()) == []


# --- the store


def test_names_go_and_what_is_used_stays(garden: GardenClient, layout: Layout, server: ServerProcess) -> None:
    reference = layout.reference("zstd")
    with made_of(garden, reference) as container:
        with pytest.raises(FailedPrecondition) as caught:
            garden.images.remove(reference)
        assert caught.value.code == "IMAGE_IN_USE"
        garden.images.prune(named=True)
        assert text_of(container, "cat /top") == "top"
    assert wait_until(lambda: garden.images.inspect(reference).in_use == 0)
    garden.images.remove(reference)
    with pytest.raises(NotFound):
        garden.images.inspect(reference)


def test_images_and_their_use_outlive_the_server(layout: Layout) -> None:
    """Killed and started again: nothing is read anew, and what runs keeps its layers."""
    with running_server() as server, GardenClient(server.address) as garden:
        container = made_of(garden, layout.reference("app"))
        container.run(ProcessSpec("sleep", ("60",), id="s", sidecar=Sidecar(layout.reference("one"))))
        before = {path: path.stat().st_ino for path in (server.place / "state/images/layers").iterdir()}
        server.kill()
        server.start()
        assert {
            path: path.stat().st_ino for path in (server.place / "state/images/layers").iterdir()
        } == before
        assert [image.in_use for image in garden.images.list()] == [1, 1]
        garden.images.prune(named=True)
        assert text_of(container, "cat /top; echo $FROM") == "topimage\n"
        container.destroy()
        assert len(garden.images.prune(named=True).ids) == 2
        assert layers_on_disk(server) == set()


def test_the_store_is_kept_below_its_threshold(layout: Layout) -> None:
    """What was unused for longest goes first, never what is in use; also what a killed pull has left."""
    with running_server("--image-gc-bytes", "3000000") as server, GardenClient(server.address) as garden:
        held = made_of(garden, layout.reference("one"))
        for number in range(4):
            content = bytes([number]) * 1_000_000
            garden.images.import_tar(f"filler:{number}", [busybox_layer(entry("filler", content))])
        names = {name for image in garden.images.list() for name in image.names}
        assert layout.reference("one") in names
        assert "store:filler:0" not in names
        held.destroy()


def test_limits_on_size_and_entries(layout: Layout) -> None:
    flags = ("--image-max-bytes", str(1 << 20), "--image-max-entries", "5")
    with running_server(*flags) as server, GardenClient(server.address) as garden:
        with pytest.raises(ResourceExhausted) as caught:
            made_of(garden, layout.reference("one"))
        assert caught.value.code == "IMAGE_TOO_LARGE"
        assert caught.value.metadata["flag"] in flags
        assert layers_on_disk(server) == set()


def test_an_image_in_the_store_needs_no_registry_if_that_is_the_setting(
    registry: Registry, locked: Registry, tmp_path: Path
) -> None:
    """--image-pull missing: but what needed a password needs it again."""
    flags = (
        "--image-pull",
        "missing",
        "--insecure-registry",
        registry.host,
        "--insecure-registry",
        locked.host,
    )
    with running_server(*flags) as server, GardenClient(server.address) as garden:
        made_of(garden, f"docker://{registry.host}/box:one").destroy()
        asked = registry.asked()
        made_of(garden, f"docker://{registry.host}/box:one").destroy()
        assert registry.asked() == asked
        made_of(garden, f"docker://{locked.host}/box:one", image_auth=AUTH).destroy()
        with pytest.raises(PermissionDenied):
            made_of(garden, f"docker://{locked.host}/box:one")


def test_the_default_root_file_system_may_be_an_image(layout: Layout) -> None:
    with (
        running_server("--default-rootfs", layout.reference("app")) as server,
        GardenClient(server.address) as garden,
        garden.create() as container,
    ):
        assert text_of(container, "cat /top") == "top"
        assert container.info().state is ContainerState.ACTIVE
