"""Layers of images unpacked, beside tar(1) doing the same without checking anything."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import Subject, alternate, timed_ms
from report import Row, ratio_at_least
from setting import Setting

LAYER_BYTES = 500_000_000
_FILES_SHARE = (
    0.6  # the rest is random: the files of a system compress to a third, what others add mostly does not
)
_SOURCES = (Path("/usr/lib"), Path("/usr/share"), Path("/usr/bin"))
_TIMEOUT_S = 300


def measure_unpack(setting: Setting) -> Iterator[Row]:
    """A layer of about 500 MB, made of this machine's files and of chance; compressed and plain."""
    with tempfile.TemporaryDirectory(prefix="garden-bench-") as name:
        place = Path(name)
        plain = _make_layer(place)
        subprocess.run(["gzip", "-k", "-4", plain], check=True, timeout=_TIMEOUT_S)
        for what, file in (("gzip", plain.with_suffix(".tar.gz")), ("plain", plain)):
            ask = _request(file, place / "ours")
            found = alternate(
                {
                    "ours": _mb_s(place / "ours", lambda file=file, ask=ask: _unpack(file, ask)),
                    "tar": _mb_s(place / "tar", lambda file=file: _untar(file, place / "tar")),
                },
                rounds=setting.throughput_rounds,
                warm_up=1,
            )
            yield Row(
                f"unpack a layer, {what}",
                "MB/s",
                found["ours"],
                "tar -x",
                found["tar"],
                (ratio_at_least(0.7),),
            )


def _make_layer(place: Path) -> Path:
    tree, size = place / "tree", 0
    tree.mkdir()
    files = (path for source in _SOURCES for path in sorted(source.rglob("*")))
    for path in files:
        if size > LAYER_BYTES * _FILES_SHARE:
            break
        if path.is_file() and not path.is_symlink():
            target = tree / path.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
            size += path.stat().st_size
    chance = random.Random(1)
    (tree / "data").mkdir()
    for number in range((LAYER_BYTES - size) // 5_000_000):
        (tree / "data" / str(number)).write_bytes(chance.randbytes(5_000_000))
    packed = place / "layer.tar"
    subprocess.run(["tar", "-C", tree, "-cf", packed, "."], check=True, timeout=_TIMEOUT_S)
    shutil.rmtree(tree)
    return packed


def _request(file: Path, target: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "target": str(target), "size": file.stat().st_size, "digest": f"sha256:{digest}", "diff_id": None,
        "media_type": "", "max_bytes": 10 * LAYER_BYTES, "max_entries": 1_000_000,
    }  # fmt: skip


def _mb_s(target: Path, act: Callable[[], None]) -> Subject:
    """Into an empty directory, which is removed outside the time taken, with all that is still to be written."""

    def measure() -> float:
        target.mkdir()
        took_ms = timed_ms(act)
        shutil.rmtree(target)
        os.sync()
        return LAYER_BYTES / 1e6 / (took_ms / 1e3)

    return measure


def _unpack(file: Path, request: dict[str, object]) -> None:
    with file.open("rb") as stream:
        asked = json.dumps(request | {"source_fd": stream.fileno()}).encode() + b"\n"
        command = [sys.executable, "-m", "garden_py.backend.images.unpack"]
        subprocess.run(
            command,
            input=asked,
            pass_fds=[stream.fileno()],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
        )


def _untar(file: Path, target: Path) -> None:
    subprocess.run(["tar", "-C", target, "-xf", file], check=True, timeout=_TIMEOUT_S)
