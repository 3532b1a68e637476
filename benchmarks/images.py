"""Images: unpacking, disk space, and what a create pays for layers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cell import Cell
from kit.oci_images import OCI, Layout
from measure import Samples, alternate, timed_ms
from report import Row, ratio_at_least, ratio_at_most
from setting import Setting

from garden_py.api._pb import garden_pb2 as pb

LAYERS = 10
LAYER_BYTES = 50_000_000
_SOURCES = (Path("/usr/lib"), Path("/usr/share"), Path("/usr/bin"))  # what images are made of
_REST_S = 0.1


@dataclass(frozen=True, slots=True)
class _Image:
    """The image that is measured with.

    Attributes:
        layers: its gzip layers.
        bytes: uncompressed, in all.
        flat: the same files as a plain directory.
    """

    layout: Layout
    layers: tuple[Path, ...]
    bytes: int
    flat: Path

    @property
    def reference(self) -> str:
        """For the server."""
        return self.layout.reference("bench")


def measure_images(setting: Setting) -> Iterator[Row]:
    """Pull, wait until what was removed is deleted, the same by tar; then creates of the image and of a directory."""
    cell = setting.cell
    place = cell.server.place / "images"
    image = _make_image(place, cell.image)
    size = f"{image.bytes // 1_000_000} MB, {LAYERS + 1} gzip layers"

    def pull() -> float:
        took_ms = timed_ms(lambda: cell.client.images.pull(image.reference))
        cell.client.images.remove(image.reference)
        _wait_for_empty(cell.server.place / "state/trash")
        return image.bytes / 1e3 / took_ms

    def tar() -> float:
        target = place / "by-tar"
        took_ms = timed_ms(lambda: _untar(image.layers, target))
        shutil.rmtree(target)
        return image.bytes / 1e3 / took_ms

    found = alternate({"garden": pull, "tar": tar}, rounds=setting.throughput_rounds, warm_up=1)
    yield Row(
        f"unpack an image ({size})", "MB/s", found["garden"], "tar -xz", found["tar"], (ratio_at_least(0.7),)
    )

    ours = cell.client.images.pull(image.reference)
    _untar(image.layers, place / "by-tar")
    theirs = _disk_bytes(place / "by-tar")
    yield Row(
        "disk space of its layers", "MB", Samples((ours.bytes / 1e6,)), "tar -xz", Samples((theirs / 1e6,)),
        (ratio_at_most(1.02),),
    )  # fmt: skip

    lives = {
        "layers": lambda: _create_ms(cell, image.reference),
        "directory": lambda: _create_ms(cell, str(image.flat)),
    }
    found = alternate(lives, rounds=setting.rounds)
    yield Row(
        f"create from an unpacked image of {LAYERS + 1} layers", "ms", found["layers"], "create from a directory",
        found["directory"], (ratio_at_most(1.15),),
    )  # fmt: skip
    cell.client.images.remove(image.reference)
    shutil.rmtree(place)


def _create_ms(cell: Cell, image: str) -> float:
    begin = time.perf_counter()
    request = pb.CreateContainerRequest(spec=pb.ContainerSpec(image=image))
    handle = cell.stub.CreateContainer(request, timeout=60).handle
    took_ms = (time.perf_counter() - begin) * 1e3
    time.sleep(_REST_S)
    cell.destroy(handle)
    time.sleep(_REST_S)
    return took_ms


def _make_image(place: Path, base: Path) -> _Image:
    """Layers of the host's own files, on top of the embedded root file system."""
    layout, flat = Layout(place / "layout"), place / "flat"
    groups = [[base], *_groups()]
    tars = []
    for number, group in enumerate(groups):
        tar = place / f"{number}.tar"
        argv = ["tar", "-cf", str(tar)]
        argv += ["-C", str(base), "."] if number == 0 else ["-C", "/", "--verbatim-files-from", "-T", "-"]
        names = "".join(f"{str(path)[1:]}\n" for path in group) if number else ""
        subprocess.run(argv, input=names.encode(), check=True)
        tars.append(tar)
    flat.mkdir()
    for tar in tars:
        subprocess.run(["tar", "-xf", str(tar), "-C", str(flat)], check=True)
    diff_ids = [f"sha256:{hashlib.sha256(tar.read_bytes()).hexdigest()}" for tar in tars]
    blobs = [layout.put(_gzip(tar), f"{OCI}.layer.v1.tar+gzip") for tar in tars]
    total = sum(tar.stat().st_size for tar in tars)
    for tar in tars:
        tar.unlink()
    layout.add_blobs("bench", blobs, diff_ids)
    return _Image(layout, tuple(map(layout.blob, blobs)), total, flat)


def _gzip(tar: Path) -> bytes:
    return subprocess.run(["gzip", "-c", str(tar)], check=True, capture_output=True).stdout


def _groups() -> Iterator[list[Path]]:
    """Files and links of the host, in groups of LAYER_BYTES."""
    group: list[Path] = []
    size = made = 0
    for source in _SOURCES:
        for directory, names, files in os.walk(source):
            names.sort()
            for name in sorted(files):
                path = Path(directory, name)
                group.append(path)
                size += path.lstat().st_size
                if size >= LAYER_BYTES:
                    yield group
                    made, group, size = made + 1, [], 0
                if made == LAYERS:
                    return
    raise SystemExit(f"this machine has less than {LAYERS * LAYER_BYTES} bytes in {_SOURCES}")


def _untar(layers: tuple[Path, ...], target: Path) -> None:
    for number, layer in enumerate(layers):
        directory = target / str(number)
        directory.mkdir(parents=True)
        subprocess.run(["tar", "-xzf", str(layer), "-C", str(directory)], check=True)


def _disk_bytes(directory: Path) -> int:
    done = subprocess.run(["du", "-s", "-B1", str(directory)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0])


def _wait_for_empty(directory: Path) -> None:
    for _ in range(600):
        if not any(directory.iterdir()):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{directory} is not emptied")
