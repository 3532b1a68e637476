"""A tar of a root file system with one more layer in a directory of it (Garden statement M2)."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from kit.garden import code_of, text_of, wait_until
from kit.hostile_layers import CANARY, HOSTILE
from kit.layer_host import Answer, LayerHost
from kit.oci_images import busybox_layer, entry, hard_link, link, tar_layer
from kit.registry import make_certificate
from kit.server import ServerProcess, running_server

from garden_py.client import (
    Container,
    ContainerSpec,
    FailedPrecondition,
    GardenClient,
    GardenError,
    InvalidArgument,
    PermissionDenied,
    ProcessSpec,
    RegistryAuth,
    ResourceExhausted,
    Sidecar,
    Unavailable,
)

pytestmark = pytest.mark.root
ALICE = {"uid": 1001, "gid": 1010}
DROPLET = tar_layer(
    entry("app", **ALICE),
    entry("app/run", b"droplet", mode=0o755, **ALICE),
    hard_link("app/same", "app/run"),
    link("app/link", "/home/alice/app/run", **ALICE),
    entry(".wh.old", b""),
)
BASE = busybox_layer(
    entry("home/alice", mode=0o750, **ALICE),
    entry("home/alice/old", b"old", **ALICE),
    entry("home/alice/kept", b"kept", **ALICE),
    entry("srv", mode=0o711),
    link("apps", "home"),
    link("nowhere", "nothing"),
    entry("file", b"x"),
    entry("shared", mode=0o2775, gid=1010),
)


def packed(layer: bytes) -> bytes:
    return gzip.compress(layer, 1, mtime=0)


def reference(base: Path | str, url: str, content: bytes, directory: str = "/home/alice") -> str:
    """To a layer that is `content` as it is fetched."""
    digest = hashlib.sha256(content).hexdigest()
    return f"preloaded+layer:{base}?layer={quote(url, safe='')}&layer_path={directory}&layer_digest={digest}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.tar"
    path.write_bytes(BASE)
    return path


@pytest.fixture(scope="module")
def host() -> Iterator[LayerHost]:
    with LayerHost() as host:
        yield host


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def garden(server: ServerProcess) -> Iterator[GardenClient]:
    with GardenClient(server.address) as client:
        yield client


def made_of(garden: GardenClient, image: str, **fields: Any) -> Container:
    return garden.create(ContainerSpec(image=image, **fields))


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_a_layer_lies_in_its_directory(
    garden: GardenClient, base: Path, host: LayerHost, privileged: bool
) -> None:
    """Its names begin there; the directories on the way stay as they were; whiteouts hide what lies below."""
    content = packed(DROPLET)
    image = reference(base, host.put("/droplet.tgz", content), content)
    with made_of(garden, image, privileged=privileged) as container:
        assert text_of(container, "cat /home/alice/app/run /home/alice/app/same /home/alice/kept") == (
            "dropletdropletkept"
        )
        assert text_of(container, "cat /home/alice/app/link; ls /home/alice") == "dropletapp\nkept\n"
        shown = text_of(container, "stat -c '%a %u:%g' / /home /home/alice /home/alice/app/run")
        assert shown.splitlines() == ["755 0:0", "755 0:0", "750 1001:1010", "755 1001:1010"]
        assert text_of(container, "touch ~/mine && ls ~", user="alice") == "app\nkept\nmine\n"


def test_a_sidecar_has_one_too(garden: GardenClient, base: Path, host: LayerHost) -> None:
    content = packed(DROPLET)
    image = reference(base, host.put("/droplet.tgz", content), content)
    with garden.create() as container:
        spec = ProcessSpec("cat", ("/home/alice/app/run",), sidecar=Sidecar(image))
        assert container.run(spec).output().stdout == b"droplet"


def test_a_layer_is_kept_by_its_digest_and_its_place(
    garden: GardenClient, base: Path, host: LayerHost, server: ServerProcess
) -> None:
    """Wherever it comes from, as signed URLs change, and over a restart; elsewhere it is another one."""
    content = packed(tar_layer(entry("once", b"x")))
    url = host.put("/once.tgz", content)
    made_of(garden, reference(base, f"{url}?signature=1&x=a%2Fb", content)).destroy()
    assert host.asked[-1] == "/once.tgz?signature=1&x=a%2Fb"
    asked = len(host.asked)
    made_of(garden, reference(base, f"{url}?signature=2", content)).destroy()
    server.kill()
    server.start()
    made_of(garden, reference(base, "http://127.0.0.1:9/gone", content)).destroy()
    assert len(host.asked) == asked
    made_of(garden, reference(base, url, content, "/srv")).destroy()
    assert len(host.asked) == asked + 1
    (name,) = garden.images.inspect(reference(base, url, content, "/srv")).names
    assert hashlib.sha256(content).hexdigest() in name
    assert "127.0.0.1" not in name
    garden.images.remove(name)


def test_many_creates_fetch_it_once(garden: GardenClient, host: LayerHost, tmp_path: Path) -> None:
    """And read the tar once."""
    tar = tmp_path / "fresh.tar"
    tar.write_bytes(busybox_layer(entry("fresh", b"x")))
    content = packed(tar_layer(entry("many", b"x")))
    image = reference(tar, host.put("/many.tgz", content), content)
    with ThreadPoolExecutor(6) as pool:
        for container in list(pool.map(lambda _: made_of(garden, image), range(6))):
            container.destroy()
    assert host.asked.count("/many.tgz") == 1


def test_the_tar_is_read_again_when_it_has_changed(
    garden: GardenClient, host: LayerHost, tmp_path: Path
) -> None:
    """And the layer with it, if what it lies in has other owners now."""
    tar, content = tmp_path / "base.tar", packed(tar_layer(entry("new", b"new")))
    image = reference(tar, host.put("/changing.tgz", content), content)
    for text, uid in (("first", 1001), ("second", 7)):
        tar.write_bytes(busybox_layer(entry("content", text.encode()), entry("home/alice", uid=uid)))
        with made_of(garden, image) as container:
            assert text_of(container, "cat /content; stat -c %u ~alice") == f"{text}{uid}\n"


@pytest.mark.parametrize(
    ("directory", "shown"),
    [
        ("/apps/alice", "/home/alice/x 750 1001:1010"),  # by a link of the tar's
        ("/srv/not/there", "/srv/not/there/x 755 0:0"),
        ("/", "/x 755 0:0"),
        ("/shared", "/shared/x 2775 0:1010"),
    ],
)
def test_where_a_layer_may_lie(
    garden: GardenClient, base: Path, host: LayerHost, directory: str, shown: str
) -> None:
    content = packed(tar_layer(entry("x", b"x")))
    with made_of(garden, reference(base, host.put("/x.tgz", content), content, directory)) as container:
        place, attributes = shown.split(" ", 1)
        assert text_of(container, f"cat {place}") == "x"
        assert text_of(container, f"stat -c '%a %u:%g' {os.path.dirname(place)}") == f"{attributes}\n"
        assert text_of(container, "stat -c '%a %u:%g' /srv /apps/. /home") == "711 0:0\n755 0:0\n755 0:0\n"
        assert text_of(container, f"stat -c %u:%g {place}") == "0:0\n"
        assert text_of(container, "readlink /apps") == "home\n"


def test_a_layer_may_say_what_its_directory_is_and_hide_what_is_in_it(
    garden: GardenClient, base: Path, host: LayerHost
) -> None:
    content = packed(
        tar_layer(entry("./", mode=0o700, uid=5, gid=6), entry(".wh..wh..opq", b""), entry("x", b"x"))
    )
    with made_of(garden, reference(base, host.put("/opaque.tgz", content), content)) as container:
        assert text_of(container, "stat -c '%a %u:%g' /home/alice; ls /home/alice") == "700 5:6\nx\n"
        assert text_of(container, "cat /file") == "x"


@pytest.mark.parametrize(
    ("directory", "problem"),
    [
        ("/file", "/file is not a directory"),
        ("/file/x", "/file is not a dir"),
        ("/nowhere/x", "leads nowhere"),
    ],
)
def test_what_is_in_the_way_is_told(
    garden: GardenClient, base: Path, host: LayerHost, directory: str, problem: str
) -> None:
    content = packed(tar_layer(entry("x", b"x")))
    with pytest.raises(InvalidArgument, match=problem) as caught:
        made_of(garden, reference(base, host.put("/x.tgz", content), content, directory))
    assert caught.value.fields[0].field == "spec.image"


def test_a_file_of_the_servers(garden: GardenClient, base: Path, tmp_path: Path) -> None:
    content = DROPLET  # plain, as well as gzip and zstd
    (tmp_path / "a layer").write_bytes(content)
    with made_of(garden, reference(base, f"file://{tmp_path}/a%20layer", content)) as container:
        assert text_of(container, "cat /home/alice/app/run") == "droplet"
    os.mkfifo(tmp_path / "fifo")
    for name in ("nothing", "fifo", ""):
        with pytest.raises(InvalidArgument, match="does not exist or you do not have permissions"):
            made_of(garden, reference(base, f"file://{tmp_path}/{name}", b"other"))


def test_a_base_that_is_no_tar(garden: GardenClient, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="directory provided instead of a tar file"):
        made_of(garden, reference(tmp_path, "http://127.0.0.1:9/x", b"x"))
    with pytest.raises(InvalidArgument, match="does not exist"):
        made_of(garden, reference(tmp_path / "nothing", "http://127.0.0.1:9/x", b"x"))
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    with pytest.raises(FailedPrecondition, match="not a tar archive"):
        made_of(garden, reference(tmp_path / "junk", "http://127.0.0.1:9/x", b"x"))


def test_user_and_password_go_to_its_host_alone(garden: GardenClient, base: Path, host: LayerHost) -> None:
    """As Basic authentication; not to where it is redirected."""
    content = packed(tar_layer(entry("secret", b"x")))
    url = host.put("/locked.tgz", Answer(content, password="me:geheim"))
    image = reference(base, url, content)
    for auth in (None, RegistryAuth("me", "wrong")):
        with pytest.raises(PermissionDenied):
            made_of(garden, image, image_auth=auth)
    auth = RegistryAuth("me", "geheim")
    with LayerHost() as other:
        onwards = Answer(status=302, location=other.put("/elsewhere.tgz", content), password="me:geheim")
        moved = reference(base, host.put("/moved.tgz", onwards), content, "/srv")
        made_of(garden, moved, image_auth=auth).destroy()
        assert other.passwords == [""]
    with made_of(garden, image, image_auth=auth) as container:
        assert code_of(container, "test -e /home/alice/secret") == 0


def test_answers_that_are_none(garden: GardenClient, base: Path, host: LayerHost, tmp_path: Path) -> None:
    content = packed(tar_layer(entry("big", os.urandom(300_000))))
    for path, answer, kind, words in (
        ("/404", Answer(status=404), InvalidArgument, "404"),
        ("/500", Answer(status=500), Unavailable, "500"),
        ("/loop", Answer(status=302, location="/loop"), Unavailable, "302"),
        ("/ftp", Answer(status=302, location="ftp://127.0.0.1/x"), Unavailable, "neither http nor https|302"),
        ("/file", Answer(status=302, location=f"file://{base}"), Unavailable, "302"),
        ("/cut", Answer(content, cut_at=100_000), Unavailable, "ended after 100000 of"),
        ("/cut-chunked", Answer(content, cut_at=100_000, chunked=True), Unavailable, "IncompleteRead"),
        ("/other", Answer(packed(DROPLET)), FailedPrecondition, "digest is"),
        ("/empty", Answer(b""), FailedPrecondition, "empty"),
    ):
        with pytest.raises(kind, match=words):
            made_of(garden, reference(base, host.put(path, answer), content))
    with pytest.raises(Unavailable, match="refused"):
        made_of(garden, reference(base, "http://127.0.0.1:9/x", content))
    chunked = host.put("/chunked", Answer(content, chunked=True))
    made_of(garden, reference(base, chunked, content)).destroy()


def test_tls(base: Path, tmp_path: Path) -> None:
    """Only with a certificate that the settings name; and never on from there to plain text."""
    content = packed(DROPLET)
    with LayerHost(make_certificate(tmp_path)) as host, LayerHost() as plain:
        url = host.put("/x.tgz", content)
        down = host.put("/down", Answer(status=302, location=plain.put("/x.tgz", content)))
        file = tmp_path / "garden.toml"
        file.write_text("")
        with running_server("--config", str(file)) as server, GardenClient(server.address) as garden:
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                made_of(garden, reference(base, url, content))
            server.stop()
            file.write_text(f'[registry."{host.host}"]\nca = "{tmp_path}/cert.pem"\n')
            server.start()
            with pytest.raises(Unavailable, match="from https to http:"):
                made_of(garden, reference(base, down, content))
            assert plain.asked == []
            made_of(garden, reference(base, url, content)).destroy()


@pytest.mark.parametrize(
    "name",
    [
        "dot dot",
        "absolute name",
        "link upwards",
        "link to the real root",
        "file over a link to outside",
        "opaque through a link",
        "hard link upwards",
        "whiteout of ..",
        "system directories as links",
    ],
)
def test_hostile_layers_stay_in_their_directory(
    garden: GardenClient, base: Path, host: LayerHost, name: str, server: ServerProcess
) -> None:
    """Refused, or unpacked without a trace beside it, in the tree or on the host."""
    hostile, layers = HOSTILE[name], server.place / "state/images/layers"
    content, before = packed(hostile.build()), set(layers.iterdir())
    image = reference(base, host.put("/hostile.tgz", content), content)
    if hostile.code == "image_invalid":
        with pytest.raises(FailedPrecondition) as caught:
            made_of(garden, image)
        assert caught.value.code == "IMAGE_INVALID"
        assert set(layers.iterdir()) == before
        return
    with made_of(garden, image) as container:
        assert text_of(container, "cat /home/alice/kept /file") == "keptx"
    (made,) = set(layers.iterdir()) - before
    assert os.listdir(made / "fs") == ["home"]
    assert os.listdir(made / "fs/home") == ["alice"]
    assert not Path(os.fsdecode(CANARY)).exists()


def test_limits_count_both(base: Path, host: LayerHost) -> None:
    """Of the layer, and of both together; what was too large is not kept."""
    big = packed(tar_layer(*(entry(f"f{number}", b"") for number in range(40))))
    small = packed(tar_layer(*(entry(f"f{number}", b"") for number in range(10))))
    with running_server("--image-max-entries", "42") as server, GardenClient(server.address) as garden:
        garden.images.pull(str(base))
        for content in (big, small):
            with pytest.raises(ResourceExhausted) as caught:
                made_of(garden, reference(base, host.put("/large.tgz", content), content))
            assert caught.value.metadata["flag"] == "--image-max-entries"
        assert len(list((server.place / "state/images/layers").iterdir())) == 1


def test_a_killed_download_is_told_and_leaves_nothing(
    garden: GardenClient, base: Path, host: LayerHost, server: ServerProcess
) -> None:
    """Also the server's end in the middle of one ends it."""
    content, begun, go_on = packed(tar_layer(entry("slow", b"x"))), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go_on.wait(60)

    image = reference(base, host.put("/slow.tgz", Answer(content, before_body=hold)), content)
    failures: list[GardenError] = []

    def create() -> None:
        try:
            made_of(garden, image)
        except GardenError as error:
            failures.append(error)

    try:
        for victim in ("download", "server"):
            begun.clear()
            creating = threading.Thread(target=create)
            creating.start()
            assert begun.wait(30)
            (pid,) = wait_until(lambda: downloaders(server), "the download")
            if victim == "download":
                os.kill(pid, signal.SIGKILL)
            else:
                server.kill()
            creating.join(60)
            wait_until(lambda gone=Path(f"/proc/{pid}"): not gone.exists(), "the end of the download")
            assert len(failures) == 1
            failures.clear()
        server.start()
        wait_until(
            lambda: not list((server.place / "state/images/staging").iterdir()), "an empty staging place"
        )
        assert garden.check_leaks() == []
    finally:
        go_on.set()
    made_of(garden, image).destroy()


def downloaders(server: ServerProcess) -> list[int]:
    """Processes of the server's that download."""
    found = []
    for entry_name in os.listdir("/proc"):
        try:
            line = Path(f"/proc/{entry_name}/cmdline").read_bytes()
            parent = Path(f"/proc/{entry_name}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"garden_py.backend.images.download" in line and int(parent) == server.pid:
            found.append(int(entry_name))
    return found
