"""A store of our own: a btrfs in a sparse file, on a loop device, mounted below the state directory.

    <state>/store.img    the file, which takes no more room than what is in it
    <state>/store/       where it is mounted: images, volumes, and rubbish of both

It stays mounted while there are containers, whether a server runs or not, and the next server finds it there; a
server that stops without containers unmounts it, which gives the loop device back. Source: losetup(8), mkfs.btrfs(8),
btrfs-filesystem(8).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import structlog

from garden_py.model.errors import HostFault, InvalidField, NotSupported

log = structlog.get_logger()
FLOOR_BYTES = 256 << 20
_TIMEOUT_S = 120
_SECTOR_BYTES = 4096
_COMMIT_S = 5  # room that is given back can be used after a commit; the default is 30


class LoopStore:
    """The store of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir / "store.img"
        self.root = state_dir / "store"

    @property
    def exists(self) -> bool:
        """Whether an earlier server has made one."""
        return self._file.exists()

    def open(self, size_bytes: int) -> None:
        """Make, grow and mount it, as far as that is still to be done.

        Args:
            size_bytes: how large it shall be; 0, or less than it is: as it is.

        Raises:
            InvalidField: there is no room for anything.
            NotSupported: btrfs-progs are not installed.
            HostFault.
        """
        if not self.exists:
            self._make(size_bytes)
        self.root.mkdir(mode=0o711, exist_ok=True)
        if not self.root.is_mount():
            options = f"loop,noatime,commit={_COMMIT_S}"
            self._run("mount", "-t", "btrfs", "-o", options, str(self._file), str(self.root))
            self.root.chmod(0o711)
        self._grow(max(size_bytes, self._file.stat().st_size))

    def _make(self, size_bytes: int) -> None:
        if size_bytes < FLOOR_BYTES:
            raise InvalidField("store_size", f"must be at least {FLOOR_BYTES} bytes")
        if shutil.which("mkfs.btrfs") is None:
            raise NotSupported("--store-size needs mkfs.btrfs: apt-get install btrfs-progs")
        new = self._file.with_suffix(".new")
        with new.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(size_bytes)
        # One copy of the metadata: two in one file protect from nothing.
        self._run("mkfs.btrfs", "-q", "-f", "-m", "single", "-L", "garden", str(new))
        new.rename(self._file)
        log.info("store.made", file=str(self._file), bytes=size_bytes)

    def _grow(self, size_bytes: int) -> None:
        """Make file, device and file system as large as that, each of which may be so already."""
        found = os.statvfs(self.root)
        if found.f_blocks * found.f_frsize >= size_bytes - size_bytes % _SECTOR_BYTES:
            return
        if size_bytes > self._file.stat().st_size:
            os.truncate(self._file, size_bytes)
        for device in self._run("losetup", "-n", "-O", "NAME", "-j", str(self._file)).split():
            self._run("losetup", "-c", device)
        self._run("btrfs", "filesystem", "resize", "max", str(self.root))
        log.info("store.grown", bytes=size_bytes)

    def unmount(self) -> None:
        """Unmount it, which gives the loop device back; not mounted is fine. HostFault: it is busy."""
        if self.root.is_mount():
            self._run("umount", str(self.root))

    def close(self) -> None:
        """As `unmount`, but busy is no failure: the next server finds it as it is."""
        try:
            self.unmount()
        except HostFault as error:
            log.warning("store.kept_mounted", error=str(error))

    def _run(self, *argv: str) -> str:
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HostFault(f"store: {argv[0]}", str(error)) from error
        if done.returncode != 0:
            raise HostFault(f"store: {argv[0]}", done.stderr.strip() or f"exit status {done.returncode}")
        return done.stdout
