"""What the Garden statements need: a root file system with their users, a server with a Garden door, and clients."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.garden_foreign import ForeignGarden
from kit.garden_grpc import GrpcGarden
from kit.garden_http import GardenClientBase, GardenHttp
from kit.places import open_to_all
from kit.server import ServerProcess, running_server

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
alice:x:1001:1010::/home/alice:/bin/sh
testuser:x:1000:1000::/home/testuser:/bin/sh
"""
GROUP = """\
root:x:0:
daemon:x:1:
tty:x:5:
wheel:x:10:root
staff:x:50:
testuser:x:1000:
alice:x:1010:
extra:x:1011:alice
"""

# Busybox's `su` says "must be suid" unless the kernel has made it root; then it looks for the user.
MAKE_SETUID = "cp /bin/busybox /tmp/su && chmod 4755 /tmp/su"
TRY_SETUID = "/tmp/su no-such-user"


def make_garden_image(place: Path) -> Path:
    """Busybox with all its applets; `hello-world` only in /sbin, homes owned by their users, /tmp for everybody."""
    root = place / "image"
    for name in (
        "bin",
        "sbin",
        "etc",
        "proc",
        "sys",
        "dev",
        "tmp",
        "root",
        "home",
        "usr/bin",
        "usr/sbin",
        "var",
    ):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox, "apt-get install busybox-static"
    shutil.copy(busybox, root / "bin/busybox")
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True, timeout=20)
    for applet in listed.stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "sbin/hello-world").write_text("#!/bin/sh\necho hello from $0\n")
    (root / "sbin/hello-world").chmod(0o755)
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    (root / "tmp").chmod(0o1777)
    for name, uid, gid in (("alice", 1001, 1010), ("testuser", 1000, 1000)):
        home = root / "home" / name
        home.mkdir()
        os.chown(home, uid, gid)
    return root


@contextmanager
def garden_server_with(place: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server with a Garden door, the image above and more flags; `garden_door_of` tells where the door is."""
    open_to_all(place)
    image = make_garden_image(place)
    door = f"unix:{place}/garden.sock"
    with running_server("--garden-http", door, "--default-rootfs", f"raw://{image}", *flags) as server:
        yield server


def garden_door_of(server: ServerProcess) -> str:
    """Where a server's Garden door is."""
    return server.flags[server.flags.index("--garden-http") + 1]


@pytest.fixture(scope="module")
def garden_http_server(no_trace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a Garden door whose default image has the users that the statements name."""
    with garden_server_with(tmp_path_factory.mktemp("garden")) as server:
        yield server


@pytest.fixture(scope="module")
def garden_http(garden_http_server: ServerProcess) -> GardenHttp:
    """A client of that door."""
    return GardenHttp(garden_door_of(garden_http_server))


@pytest.fixture(scope="module", params=["by hand", "foreign", "grpc"], name="garden")
def any_client(
    request: pytest.FixtureRequest, garden_http_server: ServerProcess, garden_http: GardenHttp
) -> Iterator[GardenClientBase]:
    """Two clients of the Garden door that share no code, and one over gRPC: what they disagree on, the spec settles."""
    if request.param == "by hand":
        yield garden_http
        return
    address = garden_http_server.address
    other = GrpcGarden(address) if request.param == "grpc" else ForeignGarden(garden_http.address)
    yield other
    other.close()
