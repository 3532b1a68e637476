"""The embedded default root file system: the host's static busybox and the few files programs expect."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from garden_py.model.errors import NotSupported

_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/shells": "/bin/sh\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
_PLAIN = ("bin", "dev", "etc", "home", "proc", "run", "sbin", "sys", "usr/bin", "usr/sbin")
_DIRECTORIES = dict.fromkeys(_PLAIN, 0o755) | {"root": 0o700, "tmp": 0o1777, "var/tmp": 0o1777}


def build_embedded_rootfs(parent: Path) -> Path:
    """The directory `parent/busybox`, made once from the host's busybox; a newer busybox makes it anew.

    Raises:
        NotSupported: the host has no static busybox.
    """
    busybox = shutil.which("busybox", path="/bin:/usr/bin:/usr/local/bin")
    if busybox is None:
        raise NotSupported("the embedded root file system needs busybox: apt-get install busybox-static")
    facts = os.stat(busybox)
    target = parent / f"busybox-{facts.st_size:x}-{int(facts.st_mtime):x}"
    if target.is_dir():
        return target
    parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
    try:
        _fill(work, Path(busybox))
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # another server made it meanwhile
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _fill(root: Path, busybox: Path) -> None:
    for name, mode in _DIRECTORIES.items():
        directory = root / name
        directory.mkdir(parents=True)
        directory.chmod(mode)
    for name, content in _FILES.items():
        (root / name).write_text(content)
        (root / name).chmod(0o644)
    target = root / "bin" / "busybox"
    shutil.copyfile(busybox, target)
    target.chmod(0o755)
    listed = subprocess.run([target, "--list-full"], check=True, capture_output=True, text=True, timeout=20)
    for name in listed.stdout.split():
        link = root / name
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to("/bin/busybox")
