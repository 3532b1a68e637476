"""Images as Garden specifies them; a test is named after its statement."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from garden_image import any_client, garden_door_of, garden_server_with
from kit.garden_http import GardenClientBase, GardenHttp, GardenHttpError
from kit.layer_host import LayerHost
from kit.oci_images import Layout, busybox_layer, entry, tar_layer
from kit.registry import Registry
from kit.server import ServerProcess

pytestmark = pytest.mark.root

__all__ = ["any_client"]  # the fixture `garden`
AUTH = {"username": "me", "password": "geheim"}
WRAPPED = "running image plugin create: "
IMAGE_ENV = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/bin:/from-dockerfile",
    "TEST=second:first",
]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("images") / "layout")
    base = busybox_layer(
        entry("hidden", b"x"), entry("dir"), entry("dir/old", b"x"), entry(".dot", b"dot"),
        entry("home/alice/own", b"x", uid=1001, gid=1010), entry("su", b"x", mode=0o4755),
        entry("disk", None, type=tarfile.BLKTYPE, devmajor=8, devminor=0), entry("deep/below/it", b"x"),
        entry("with-attribute", b"x", pax_headers={"SCHILY.xattr.user.garden": "kept"}),
    )  # fmt: skip
    top = tar_layer(
        entry(".wh.hidden", b""), entry("dir"), entry("dir/.wh..wh..opq", b""), entry("dir/new", b"x")
    )
    config = {
        "Env": IMAGE_ENV,
        "Cmd": ["false"],
        "Entrypoint": ["false"],
        "User": "alice",
        "WorkingDir": "/tmp",
    }
    layout.add("all", [base, top], config=config)
    layout.add("zstd", [base], compress="zstd")
    return layout


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, layout: Layout) -> Iterator[Registry]:
    """One that wants a password."""
    registry = Registry(tmp_path_factory.mktemp("registry") / "locked", {"me": "geheim"})
    registry.start()
    try:
        registry.fill(layout.reference("all"), "box:all")
        registry.fill(layout.reference("all"), "box:latest")
        yield registry
    finally:
        registry.stop()


@pytest.fixture(scope="module")
def garden_http_server(
    no_trace: None, registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """As everywhere, but for a registry under the reference's flag."""
    with garden_server_with(
        tmp_path_factory.mktemp("garden"), "--insecure-docker-registry", registry.host
    ) as server:
        yield server


@pytest.mark.garden_only("over gRPC there is one field for it")
def test_M1_one_of_two_fields(garden: GardenClientBase, layout: Layout) -> None:
    with pytest.raises(GardenHttpError, match=r"Cannot provide both Image\.URI and RootFSPath"):
        garden.create(image={"uri": layout.reference("all")}, rootfs=layout.reference("all"))
    with garden.container(rootfs=layout.reference("all")) as handle:
        assert garden.text_of(handle, "cat /.dot") == "dot"


def test_M2_layouts_tars_and_directories(garden: GardenClientBase, layout: Layout, tmp_path: Path) -> None:
    """`oci:///dir:tag`, `/file.tar` which is read again when it changes, `raw:///dir`."""
    with garden.container(image={"uri": layout.reference("zstd")}) as handle:
        assert garden.text_of(handle, "cat /.dot") == "dot"
    bare = tmp_path / "root.tar"
    for content in ("first", "second"):
        bare.write_bytes(busybox_layer(entry("content", content.encode())))
        with garden.container(image={"uri": str(bare)}) as handle:
            assert garden.text_of(handle, "cat /content") == content
    with pytest.raises(GardenHttpError, match="does not exist"):
        garden.create(image={"uri": f"raw://{tmp_path}/missing"})


def test_M2_registries(garden: GardenClientBase, registry: Registry) -> None:
    """`docker://host/repo#tag`; without a tag, latest."""
    for name in ("box#all", "box:all", "box"):
        with garden.container(image={"uri": f"docker://{registry.host}/{name}", **AUTH}) as handle:
            assert garden.text_of(handle, "cat /.dot") == "dot"


def test_M2_a_layer_on_a_preloaded_tar(garden: GardenClientBase, tmp_path: Path) -> None:
    """All three keys of the query are required; the digest is that of what is fetched, without its kind."""
    base, content = tmp_path / "base.tar", gzip.compress(tar_layer(entry("app", b"droplet")))
    base.write_bytes(busybox_layer())
    digest = hashlib.sha256(content).hexdigest()
    with LayerHost() as host:
        query = {
            "layer": host.put("/droplet.tgz", content),
            "layer_path": "/home/alice",
            "layer_digest": digest,
        }
        with garden.container(image={"uri": f"preloaded+layer:{base}?{urlencode(query)}"}) as handle:
            assert garden.text_of(handle, "cat app; stat -c %u:%g .", user="alice") == "droplet1001:1010\n"
        for key in query:
            less = urlencode({name: value for name, value in query.items() if name != key})
            with pytest.raises(GardenHttpError, match=f"no query parameter '{key}' found in URL preloaded"):
                garden.create(image={"uri": f"preloaded+layer:{base}?{less}"})


def test_M3_user_and_password(garden: GardenClientBase, registry: Registry) -> None:
    uri = f"docker://{registry.host}/box#all"
    with garden.container(image={"uri": uri, **AUTH}) as handle:
        assert garden.text_of(handle, "cat /.dot") == "dot"
        pea = garden.run(handle, "cat", "/.dot", image={"uri": uri, **AUTH})
        assert (pea.wait(), pea.stdout) == (0, b"dot")
    for image in ({"uri": uri}, {"uri": uri, "username": "me", "password": "wrong"}):
        with pytest.raises(GardenHttpError, match="authorization failed: username and password are invalid"):
            garden.create(image=image)


def test_M4_E1_of_the_config_only_the_environment(garden: GardenClientBase, layout: Layout) -> None:
    """Command, entrypoint, user and directory are ignored; the container's and the process's entries win."""
    with garden.container(image={"uri": layout.reference("all")}, env=["TEST=container", "A=1"]) as handle:
        assert garden.text_of(handle, "echo $PATH; id -u; pwd") == f"{IMAGE_ENV[0][5:]}\n0\n/root\n"
        assert garden.text_of(handle, "echo $TEST $A") == "container 1\n"
        assert garden.text_of(handle, "echo $TEST $A", env=["TEST=process"]) == "process 1\n"
    with garden.container(image={"uri": layout.reference("all")}) as handle:
        assert garden.text_of(handle, "echo $TEST") == "second:first\n"
        assert garden.text_of(handle, "echo $PATH", user="alice") == f"{IMAGE_ENV[0][5:]}\n"


def test_M5_layers(garden: GardenClientBase, layout: Layout) -> None:
    """Whiteouts, opaque directories, no devices, modes with setuid, times, parents that the archive lacks."""
    with garden.container(image={"uri": layout.reference("all")}) as handle:
        assert garden.text_of(handle, "ls -d /hidden /disk 2>/dev/null; ls /dir") == "new\n"
        assert garden.text_of(handle, "stat -c %a:%u:%Y /su") == "4755:0:1000000000\n"
        assert garden.text_of(handle, "stat -c %a:%u:%g /deep /deep/below") == "755:0:0\n755:0:0\n"


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_M7_M8_owners_and_dotfiles(garden: GardenClientBase, layout: Layout, privileged: bool) -> None:
    with garden.container(image={"uri": layout.reference("all")}, privileged=privileged) as handle:
        assert (
            garden.text_of(handle, "stat -c %U:%G /etc/passwd /home/alice/own") == "root:root\nalice:alice\n"
        )
        garden.text_of(handle, "touch /home/alice/new && echo x >>own", user="alice")
        assert garden.text_of(handle, "touch /root/x; ls -A / | grep dot") == ".dot\n"


def test_M9_a_layer_of_its_own(garden: GardenClientBase, layout: Layout) -> None:
    with (
        garden.container(image={"uri": layout.reference("all")}) as one,
        garden.container(image={"uri": layout.reference("all")}) as other,
    ):
        garden.text_of(one, "echo mine >/.dot; rm /su")
        assert garden.text_of(other, "cat /.dot; ls /su") == "dot/su\n"


def test_M11_error_texts(garden: GardenClientBase, registry: Registry) -> None:
    uri = f"docker://{registry.host}/box#nothing"
    with pytest.raises(
        GardenHttpError, match="does not exist or you do not have permissions to see it"
    ) as caught:
        garden.create(image={"uri": uri, **AUTH})
    assert uri.replace("#", ":") in caught.value.message


@pytest.mark.garden_only("the words are the reference's")
def test_M11_as_the_reference_begins_them(
    garden: GardenClientBase, registry: Registry, tmp_path: Path
) -> None:
    for image in (
        {"uri": f"docker://{registry.host}/box#nothing", **AUTH},
        {"uri": f"docker://{registry.host}/box"},
        {"uri": f"raw://{tmp_path}/nothing"},
    ):
        with pytest.raises(GardenHttpError) as caught:
            garden.create(image=image)
        assert caught.value.message.startswith(WRAPPED)


@pytest.mark.garden_only("the server's setting is the same for all doors")
def test_M1_without_images_only_directories(tmp_path: Path, layout: Layout) -> None:
    with garden_server_with(tmp_path, "--no-image-plugin") as server:
        garden = GardenHttp(garden_door_of(server))
        with pytest.raises(GardenHttpError, match="no image plugin configured"):
            garden.create(image={"uri": layout.reference("all")})
        assert "schedulable_disk_in_bytes" not in garden.json("GET", "/capacity")  # statement CA1
        with garden.container(image={"uri": f"raw://{tmp_path}/image"}) as handle:
            assert garden.text_of(handle, "echo x") == "x\n"


def test_PE4_a_peas_environment_is_its_images(garden: GardenClientBase, layout: Layout) -> None:
    with garden.container(env=["OF=container"]) as handle:
        pea = garden.run(handle, "sh", "-c", "echo $TEST-$OF", image={"uri": layout.reference("all")})
        assert (pea.wait(), pea.stdout) == (0, b"second:first-\n")
