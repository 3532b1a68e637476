"""The server under attack and the small disk that its state directory is on."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Network
from pathlib import Path

from kit.addresses import first_free
from kit.cgroups import matching
from kit.oci_images import Layout, entry, tar_layer
from kit.server import ServerProcess, destroy_all

from chaos.plan import IMAGES
from garden_py.config import Config

START_S = 40.0
DISK_BYTES = 512 << 20
POOLS = list(IPv4Network("10.247.0.0/16").subnets(new_prefix=26))


class Cell:
    """One server: started, killed, started again on the same directories."""

    def __init__(self, place: Path, clients: int) -> None:
        self.place = place
        self.state = place / "state"
        self.run = place / "run"
        self.up = asyncio.Event()
        flags = [
            "--state-dir", str(self.state),
            "--run-dir", str(self.run),
            "--network-pool", str(first_free(POOLS)[1]),
            "--port-pool-start", "28000",
            "--port-pool-size", "12",
            "--uid-pool-start", str(0x7800_0000),
            "--uid-pool-size", "60",
            # Fewer than clients, so that the pool is empty now and then.
            "--max-containers", str(max(2, clients - 1)),
            "--create-timeout-s", "20",
            # A stopped agent is found out sooner than by default, or its client would do nothing for most of the run,
            # or give up waiting for an exit (patience.ANSWER_S).
            "--agent-patience-s", "5",
            # Less than all images need: what nobody uses goes, and is fetched again.
            "--image-gc-bytes", "3000000",
            "--agent-check-s", "15",
        ]  # fmt: skip
        self._server = ServerProcess(place, flags, f"unix:{self.run}/garden.sock")

    @property
    def address(self) -> str:
        """Of its door."""
        return self._server.address

    @property
    def image(self) -> Path:
        """The root file system that the server has made."""
        (found,) = (self.state / "rootfs").iterdir()
        return found

    @property
    def notes(self) -> Path:
        """A directory for what processes tell; not on the disk that is filled now and then."""
        directory = self.place / "notes"
        directory.mkdir(exist_ok=True)
        return directory

    @property
    def tag(self) -> str:
        """In the names of what this server makes on the host."""
        return Config(state_dir=self.state).tag

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._server.pid

    async def start(self) -> float:
        """Start it; seconds until it is ready."""
        began = time.monotonic()
        async with asyncio.timeout(START_S):
            await asyncio.to_thread(self._server.start)
        self.up.set()
        return time.monotonic() - began

    async def end(self, number: signal.Signals) -> int:
        """End it with a signal; its exit status."""
        self.up.clear()
        ending = self._server.kill if number is signal.SIGKILL else self._server.stop
        return await asyncio.to_thread(ending) or 0

    def children(self, *, of: int | None = None) -> list[int]:
        """Child processes, of the server unless another is named; its threads have children of their own (proc(5)).

        None while the server is down: another attack may just have ended it.
        """
        server = self._server.process
        parent = of if of is not None or server is None else server.pid
        found: list[int] = []
        if parent is None:
            return found
        for file in matching(Path(f"/proc/{parent}/task"), "*/children"):
            with suppress(OSError):
                found += map(int, file.read_text().split())
        return found

    def workers(self) -> list[int]:
        """The launcher's workers; its other children are containers' PID 1, which it has adopted."""
        found = []
        for pid in (worker for launcher in self.children() for worker in self.children(of=launcher)):
            with suppress(OSError):
                if b"garden_py.backend.launcher.main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def runtimes(self) -> list[int]:
        """Runtime processes at work for this server."""
        found = []
        for place in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                words = (place / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"runc") and os.fsencode(self.run / "runc") in words:
                    found.append(int(place.name))
        return found

    def pullers(self) -> list[int]:
        """Processes that fetch and unpack images for this server: pullers, skopeo, unpackers."""
        pullers = [pid for pid in self.children() if b"garden_py.backend.images" in _command_line(pid)]
        return [*pullers, *(pid for puller in pullers for pid in self.children(of=puller))]

    def make_images(self) -> list[str]:
        """References to images that share their lowest layer with each other."""
        packed = subprocess.run(
            ["tar", "-C", str(self.image), "-c", "."], capture_output=True, check=True, timeout=60
        )
        layout = Layout(self.place / "images")
        for number in range(IMAGES):
            noise = random.Random(number).randbytes(300_000)
            layout.add(str(number), [packed.stdout, tar_layer(entry(f"noise-{number}", noise))])
        return [layout.reference(str(number)) for number in range(IMAGES)]

    def fill_disk(self) -> Path:
        """Take all room of the state directory's disk; remove the file to give it back."""
        filler = self.state / "filler"
        with filler.open("wb") as file:
            size, piece = 0, DISK_BYTES
            while piece >= 512:
                try:
                    os.posix_fallocate(file.fileno(), size, piece)
                    size += piece
                except OSError:
                    piece //= 2
        return filler


@asynccontextmanager
async def open_cell(clients: int) -> AsyncIterator[Cell]:
    """A cell on a disk of its own. At the end nothing of it is left, whatever went wrong inside."""
    cell = Cell(_make_place(), clients)
    image = cell.place / "disk"
    _mount(image, cell.state)
    try:
        await cell.start()
        yield cell
    finally:
        try:
            await _clear(cell)
        finally:
            _run("umount", str(cell.state))
            shutil.rmtree(cell.place)


async def _clear(cell: Cell) -> None:
    """End the containers of a run that did not come to do so itself."""
    if cell._server.process is None and cell._server.has_served:
        (cell.state / "filler").unlink(missing_ok=True)
        if not (cell.state / "containers").exists() or not os.listdir(cell.state / "containers"):
            return
        await cell.start()
    if cell._server.process is not None:
        try:
            await asyncio.to_thread(destroy_all, cell.address)
            await cell.end(signal.SIGTERM)
        finally:
            if cell._server.process is not None:
                await cell.end(signal.SIGKILL)


def _make_place() -> Path:
    place = Path(tempfile.mkdtemp(prefix="gchaos-", dir="/var/tmp"))
    place.chmod(0o755)
    return place


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _mount(image: Path, target: Path) -> None:
    target.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    # With a journal: without one ext4 does not give out an inode again for minutes, and each new file is a search past
    # all that were deleted meanwhile (recently_deleted in fs/ext4/ialloc.c).
    _run("mkfs.ext4", "-q", "-m", "0", str(image))
    _run("mount", "-o", "loop", str(image), str(target))
    target.chmod(0o711)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=60)
