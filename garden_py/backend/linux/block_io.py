"""Limits on containers' transfers with the block device that carries their writable layers, at one site."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from garden_py.backend.cgroup import io
from garden_py.backend.cgroup.layout import ContainerCgroup, Hierarchies
from garden_py.backend.host.block_device import device_below, real_devices, scheduler_of
from garden_py.config import Config
from garden_py.model.errors import GardenError, LimitRefused, NotSupported
from garden_py.model.limits import IO_RATES, Limits


class BlockIo:
    """The verbs of it.

    Args:
        hierarchies: of this host.
        parent: path, relative to them, of a cgroup of the server's own: what a root cgroup lacks is seen there.
        store_root: where writable layers are.
        config: its defaults are put in force on containers that state nothing.
    """

    def __init__(self, hierarchies: Hierarchies, parent: str, store_root: Path, config: Config) -> None:
        self._version = hierarchies.version
        self._io = hierarchies.io
        self._device = device_below(store_root) or ""
        self._probe = Path("/nonexistent") if hierarchies.io is None else hierarchies.io / parent
        self._store_root = store_root
        self._maxima = Limits(
            io_read_bytes_per_s=config.container_io_max_read_bps or None,
            io_write_bytes_per_s=config.container_io_max_write_bps or None,
            io_read_ops_per_s=config.container_io_max_read_iops or None,
            io_write_ops_per_s=config.container_io_max_write_iops or None,
        )
        self._defaults = Limits(io_weight=config.default_container_blockio_weight or None).over(self._maxima)

    def open(self) -> None:
        """Refuse settings that cannot be enforced; once the parent is there.

        Raises:
            NotSupported.
        """
        if self._io is not None and self._version == 1:
            self._probe.mkdir(exist_ok=True)
        self.check(self._defaults)

    def check(self, limits: Limits) -> None:
        """Refuse limits that cannot be enforced here.

        Raises:
            NotSupported: says why.
        """
        if any(getattr(limits, name) for name in IO_RATES) and (obstacle := self._obstacle()):
            raise NotSupported(f"limits.io: {obstacle}")
        if limits.io_weight is not None:
            if obstacle := self._obstacle() or self._weight_obstacle():
                raise NotSupported(f"limits.io_weight: {obstacle}")
            if self._weight_file() != "io.weight" and limits.io_weight > io.BFQ_WEIGHT_MAX:
                problem = f"is {limits.io_weight}; the bfq scheduler takes at most {io.BFQ_WEIGHT_MAX}"
                raise LimitRefused("limits.io_weight", problem)

    def _obstacle(self) -> str:
        if self._io is None:
            return "the host has no cgroup controller for block I/O"
        if not self._device:
            return f"{self._store_root} is on no single block device"
        if not (self._probe / (io.V1_PROBE if self._version == 1 else "io.max")).exists():
            return "the kernel was built without throttling of block devices"
        return ""

    def _weight_obstacle(self) -> str:
        if not self._weight_file():
            return (
                f"nothing divides device {self._device} by weight: its scheduler is "
                f"{scheduler_of(self._device) or 'none'}, not bfq"
            )
        return ""

    def _weight_file(self) -> str:
        """The file whose weight is in force for the device; empty if there is none."""
        bfq = "blkio.bfq.weight" if self._version == 1 else "io.bfq.weight"
        if scheduler_of(self._device) == "bfq" and (self._probe / bfq).exists():
            return bfq
        if self._version == 2 and self._io is not None and (self._probe / "io.weight").exists():
            qos = self._io / "io.cost.qos"
            lines = qos.read_text().splitlines() if qos.exists() else []
            if any(line.startswith(f"{self._device} enable=1") for line in lines):
                return "io.weight"
        return ""

    def furnish(self, cgroup: ContainerCgroup, limits: Limits) -> None:
        """Put the limits of a new container in force, and the server's defaults where it states none.

        The maxima among the defaults hold for each real device of the host (Garden statement OL3).

        Raises:
            LimitRefused, NotSupported, HostFault.
        """
        wanted = limits.only_io().over(self._defaults)
        if not wanted.states_io or self._obstacle():  # then only "unlimited" is asked for, and that is so
            return
        for device in real_devices() if self._maxima.states_io else ():
            if device != self._device:
                self._write(cgroup, self._maxima, device)
        self._write(cgroup, wanted, self._device)

    def change(self, cgroup: ContainerCgroup, limits: Limits) -> None:
        """Change limits, all of them or none; what is not stated stays.

        Raises:
            LimitRefused, NotSupported, HostFault: nothing has changed.
        """
        self.check(limits)
        asked = {name: value for name, value in asdict(limits.only_io()).items() if value is not None}
        if not asked or self._obstacle():  # then only "unlimited" is asked for, and that is so
            return
        before = self.read(cgroup)
        try:
            self._write(cgroup, limits, self._device)
        except GardenError:
            self._write(cgroup, Limits(**{name: getattr(before, name) for name in asked}), self._device)
            raise

    def read(self, cgroup: ContainerCgroup) -> Limits:
        """The limits in force; 0 where there is none, nothing where there cannot be any."""
        directory = self._directory(cgroup)
        if directory is None or self._obstacle():
            return Limits()
        return io.read_io_limits(directory, self._version, self._device, self._weight_file())

    def admit(self, cgroup: ContainerCgroup, pid: int) -> None:
        """v1: count a sidecar's agent, and all it starts, as its container's: a group does not count those below it."""
        directory = self._directory(cgroup)
        if self._version == 1 and directory is not None:
            (directory / "cgroup.procs").write_text(str(pid))

    def _directory(self, cgroup: ContainerCgroup) -> Path | None:
        return None if self._io is None else self._io / cgroup.path

    def _write(self, cgroup: ContainerCgroup, limits: Limits, device: str) -> None:
        directory = self._directory(cgroup)
        assert directory is not None  # by `check`
        io.write_io_limits(directory, io.plan_io_writes(limits, self._version, device, self._weight_file()))
