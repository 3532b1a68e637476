"""Copies into a container and out of one, beside tar(1) at both ends of `runc exec`."""

from __future__ import annotations

import random
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import Samples, Subject, alternate, timed_ms
from report import Row, ratio_at_least
from setting import Setting

COPY_BYTES = 1 << 30
_PEER = "tar | runc exec tar"
_MARKS = (ratio_at_least(0.5),)
_TIMEOUT_S = 300


def measure_copies(setting: Setting) -> Iterator[Row]:
    """One file of a gibibyte: what is moved, not how many."""
    runc, cell = setting.runc, setting.cell
    name = runc.new_id()
    with (
        tempfile.TemporaryDirectory(prefix="garden-bench-", dir="/var/tmp") as directory,
        cell.container() as handle,
    ):
        place = Path(directory)
        source, back = place / "data", place / "back"
        _write_random(source)
        container = cell.client.container(handle)
        execute = shlex.join(runc.exec_argv(name))
        runc.run_ms(name)

        def tar_in() -> None:
            _shell(f"tar -C {place} -cf - data | {execute} /bin/tar -xf - -C /tmp")

        def tar_out() -> None:
            back.mkdir()
            _shell(f"{execute} /bin/tar -cf - -C /tmp data | tar -xf - -C {back}")

        def clear() -> None:
            container.run(["rm", "-f", "/tmp/data"]).wait()
            _shell(f"{execute} /bin/rm -f /tmp/data")

        def clear_back() -> None:
            if back.exists():
                _require_same(source, back / "data")
                shutil.rmtree(back)

        try:
            copied_in = {"ours": lambda: container.copy_in(source, "/tmp"), "tar": tar_in}
            found = _alternate(copied_in, clear, setting.throughput_rounds)
            yield Row("copy 1 GiB in", "MB/s", found["ours"], _PEER, found["tar"], _MARKS)
            container.copy_in(source, "/tmp")
            tar_in()
            copied_out = {"ours": lambda: container.copy_out("/tmp/data", back), "tar": tar_out}
            found = _alternate(copied_out, clear_back, setting.throughput_rounds)
            clear_back()
            yield Row("copy 1 GiB out", "MB/s", found["ours"], _PEER, found["tar"], _MARKS)
        finally:
            runc.delete_ms(name)


def _alternate(
    acts: dict[str, Callable[[], None]], clear: Callable[[], None], rounds: int
) -> dict[str, Samples]:
    def subject(act: Callable[[], None]) -> Subject:
        def measure() -> float:
            clear()
            return COPY_BYTES / 1e6 / (timed_ms(act) / 1e3)

        return measure

    return alternate({name: subject(act) for name, act in acts.items()}, rounds=rounds, warm_up=1)


def _write_random(path: Path) -> None:
    block = random.Random(1).randbytes(16 << 20)
    with path.open("wb") as file:
        for number in range(COPY_BYTES // len(block)):
            file.write(number.to_bytes(8, "little") + block[8:])


def _require_same(one: Path, other: Path) -> None:
    subprocess.run(["cmp", one, other], check=True, timeout=_TIMEOUT_S)


def _shell(line: str) -> None:
    subprocess.run(["bash", "-o", "pipefail", "-c", line], check=True, timeout=_TIMEOUT_S)
