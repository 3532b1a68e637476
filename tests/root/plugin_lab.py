"""A server whose containers' images and networks are made by test plugins, and a namespace that these lead to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from garden_image import garden_door_of, garden_server_with, make_garden_image
from kit.garden import wait_until
from kit.garden_http import GardenHttp
from kit.patience import FACTOR
from kit.places import open_to_all
from kit.plugins import InstalledPlugin, install
from kit.server import ServerProcess
from kit.trace import assert_no_trace, snapshot

ROUTER_IP = "10.77.0.1"


@dataclass(frozen=True)
class PluginLab:
    """A server and its plugins.

    Attributes:
        image, privileged_image, network: the plugins.
        source: the root file system that image plugins copy.
        router: a process in the namespace that containers' links lead to, which answers at ROUTER_IP.
    """

    server: ServerProcess
    image: InstalledPlugin
    privileged_image: InstalledPlugin
    network: InstalledPlugin
    source: Path
    router: str

    def links(self) -> list[str]:
        """The router's ends of links to containers."""
        return _ip(self.router, "-o", "link", "show", "type", "veth").splitlines()

    @property
    def garden(self) -> GardenHttp:
        return GardenHttp(garden_door_of(self.server))

    def obey(self) -> None:
        """Have all actions do what they should again."""
        for plugin in (self.image, self.privileged_image, self.network):
            for order in (plugin.place / "orders").iterdir():
                order.unlink()

    def alive(self) -> list[int]:
        """Calls of plugins that run."""
        plugins = (self.image, self.privileged_image, self.network)
        return [pid for plugin in plugins for pid in plugin.pids() if Path(f"/proc/{pid}").exists()]

    def order(self, action: str, what: str) -> None:
        """Change what an action does from now on, in whichever plugin has it; see InstalledPlugin.order."""
        for plugin in (self.image, self.privileged_image, self.network):
            plugin.order(action, what)


@contextmanager
def open_plugin_lab(
    place: Path, *flags: str, image: bool = True, network: bool = True
) -> Iterator[PluginLab]:
    """A server with image plugins, a network plugin, or both."""
    open_to_all(place)
    before = snapshot()
    with ExitStack() as undo:
        router = _add_router(undo)
        own, server_place = place / "own", place / "server"
        own.mkdir()
        server_place.mkdir()
        source = make_garden_image(own)
        plain, privileged = (
            install("image", place / name, image=str(source)) for name in ("image", "privileged")
        )
        connecting = install("network", place / "network", router=router)
        given = list(flags)
        if image:
            given += ["--image-plugin", plain.program, "--image-plugin-extra-arg=--store=/plain"]
            given += ["--privileged-image-plugin", privileged.program]
        if network:
            given += ["--network-plugin", connecting.program, "--network-plugin-extra-arg=--config=/c.json"]
        server = undo.enter_context(garden_server_with(server_place, *given))
        lab = PluginLab(server, plain, privileged, connecting, source, router)
        undo.callback(lab.obey)  # or containers could not be destroyed at the end
        yield lab
    assert_no_trace(before)


def _add_router(undo: ExitStack) -> str:
    """A namespace that containers' links lead to; it answers, and leads nowhere else.

    Without a name: `ip netns` would leave a mount on the host.
    """
    process = undo.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "infinity"]))
    undo.callback(process.kill)
    own, place = Path("/proc/self/ns/net").readlink(), Path(f"/proc/{process.pid}/ns/net")
    wait_until(lambda: place.readlink() != own, "the namespace")
    router = str(process.pid)
    _ip(router, "link", "set", "lo", "up")
    _ip(router, "address", "add", f"{ROUTER_IP}/32", "dev", "lo")
    return router


def _ip(pid: str, *words: str) -> str:
    argv = ["nsenter", "-t", pid, "-n", "ip", *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20 * FACTOR).stdout


@pytest.fixture(autouse=True)
def obedient(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of a module's lab ends with plugins that do what they should."""
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").obey()
